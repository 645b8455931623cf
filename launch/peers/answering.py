"""The peer's end of the pipe: one request a line on stdin, one answer a line on what was stdout at the start.

A request is `{"do": NAME, ...arguments}`, its answer what the object's method NAME returns, or `{"error": one line}`.
Imported by the peers' programs as their neighbour, under their own interpreter: standard library only.
"""

import ctypes
import json
import os
import signal
import sys
import traceback


def answer_requests(peer: object) -> None:
    """Answers until stdin ends. Linux ends this process with the one that started it, also while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # Libraries print to stdout as they like; the answers get the pipe to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(peer, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
