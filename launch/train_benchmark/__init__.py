"""The parts of `launch.bench_train`.

workload.py   which examples make which step        ours.py   our trainer's step on them
"""
