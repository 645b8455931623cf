"""Runs one program on one test: started by `grade_code`, in the test's folder, with its limits as arguments.

It limits itself, leaves the network if it may, and then runs `solution.py`; stdin and stdout are files. For a test of a
function, the result goes into `result.json`. It knows the inputs of the test, never the expected output.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import types

_PARENT_DEATH_SIGNAL = 1
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
# What the sites of such exercises have imported for everyone; builtins last, for math has another pow.
_PRELUDE = """
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from builtins import *
from typing import *
import bisect, collections, functools, heapq, itertools, math, random, re, string
"""


def main() -> None:
    job = json.loads(sys.argv[1])
    _limit(job["resources"], job["processes"])
    _end_with_the_grader()
    _leave_network()
    function = job["function"]
    sys.argv = ["solution.py"]
    with open("solution.py", encoding="utf-8") as file:
        code = compile(file.read(), "solution.py", "exec")
    module = types.ModuleType("solution" if function else "__main__")
    sys.modules[module.__name__] = module
    names = module.__dict__
    if not function:
        exec(code, names)
        return
    with open("arguments.json", encoding="utf-8") as file:
        arguments = json.load(file)
    exec(_PRELUDE, names)
    exec(code, names)
    call = names.get(function)
    if call is None and "Solution" in names:
        call = getattr(names["Solution"](), function, None)
    if call is None:
        sys.exit(f"no function {function!r}")
    result = call(*arguments)
    with open("result.json", "w", encoding="utf-8") as file:
        json.dump(result, file)


def _limit(resources: dict[str, int], processes: int) -> None:
    # The kernel counts all threads of the user, so the limit is on top of those that are.
    limits = {**resources, "RLIMIT_NPROC": _threads_of_this_user() + processes}
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        # At the soft limit of CPU time comes a signal that can be told from others, a second later the kill.
        last = value + 1 if name == "RLIMIT_CPU" and hard == resource.RLIM_INFINITY else value
        resource.setrlimit(kind, (value, last))


def _threads_of_this_user() -> int:
    count, user = 0, os.getuid()
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count


def _end_with_the_grader() -> None:
    """The kernel kills this process when the thread that started it ends, however that comes about."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _leave_network() -> None:
    """A network namespace of its own has no way out; where the kernel does not grant one, all stays as it is."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        if libc.unshare(_NEW_NETWORK) != 0 and os.geteuid() != 0:
            libc.unshare(_NEW_USER | _NEW_NETWORK)


if __name__ == "__main__":
    main()
