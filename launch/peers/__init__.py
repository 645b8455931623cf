"""The other side of a benchmark: a peer's own program in the peers' environment (`make peers`), and the pipe to it.

`process.py` starts such a program and talks to it in JSON lines; `answering.py` is the program's end of them.
`transformers_serve.py`, `llama_cpp_serve.py`, `peft_train.py` and `deepxde_pde.py` are such programs: they run by their
paths, under another interpreter, and import nothing else of this project but a neighbour (`poisson.py`).
"""

from launch.peers.process import PeerProcess, find_interpreter

__all__ = ["PeerProcess", "find_interpreter"]
