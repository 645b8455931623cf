"""The parts of `launch.bench_pde`.

laplacian.py   what the Laplacian's gradient costs, by form
sides.py       who takes part: our methods in process, DeepXDE in its own environment
contest.py     sides in turn on the same problems, and what comes out     plot.py   error against seconds
"""
