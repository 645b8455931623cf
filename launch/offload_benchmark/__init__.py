"""What `launch.bench_offload` measures: the same decode steps by several ways of moving weights.

model.py: the shape, its random weights, and where they lie     contestants.py: the runners, one for each way
peers.py: accelerate itself, where it is installed
"""
