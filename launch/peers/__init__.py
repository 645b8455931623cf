"""The other side of a benchmark: a peer's own program in the peers' environment (`make peers`), and the pipe to it.

`process.py` starts such a program and talks to it in JSON lines. `transformers_serve.py` is one: it runs by its path,
under another
interpreter, and imports nothing of this project.
"""

from launch.peers.process import PeerProcess, find_interpreter

__all__ = ["PeerProcess", "find_interpreter"]
