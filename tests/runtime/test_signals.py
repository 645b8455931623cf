import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxstack.runtime.errors import UserError
from jaxstack.runtime.signals import StopFlag, WorkdirLock


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_the_flag_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        wait_for(stop.is_set)
        assert stop and stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before
    with StopFlag() as stop:
        assert not stop.is_set()


def test_the_second_signal_ends_a_process_that_does_not_listen():
    """In one long call without the interpreter's lock, such as a compilation: Python's handlers would run after it."""
    code = (
        "import time\nfrom jaxstack.runtime.signals import StopFlag\n"
        "with StopFlag() as stop:\n    print('ready', flush=True)\n"
        "    while not stop: time.sleep(0.001)\n    print('noted', flush=True)\n"
        "    import hashlib\n    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "noted\n"
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=600)
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_outside_the_main_thread_it_is_a_flag_and_an_event():
    event, seen = threading.Event(), []

    def work():
        with StopFlag(event) as stop:
            seen.append(stop.is_set())
            event.set()
            seen.append((stop.is_set(), stop.reason))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, (True, "requested")]


def test_the_lock_is_exclusive_and_ends_with_its_holder(tmp_path):
    with (
        WorkdirLock(tmp_path / "w"),
        pytest.raises(UserError, match=rf"in use by another job \(pid {os.getpid()}\)"),
        WorkdirLock(tmp_path / "w"),
    ):
        pass
    with WorkdirLock(tmp_path / "w"):
        pass
