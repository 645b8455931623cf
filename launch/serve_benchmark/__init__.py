"""The parts of `launch.bench_serve`, in the order in which a run uses them.

workload.py   which requests        machine.py   which processor, and who else uses it
ours.py       our engine, in process and over HTTP        contest.py   both sides in turn: trials, then rounds
agreement.py  did both sides do the same work             matmul_limit.py   how far from the roof we are
report.py     figures, summary, plot
"""
