"""The parts of `launch.bench_kernels`, in the order in which a run uses them.

case.py   one operation on one set of arrays, and the implementations that can run it here
matmul.py, attention.py, mixture.py, heads_and_rows.py   the cases of each operation
measure.py   copy bandwidth, errors, times        report.py   table, plot
"""
