"""The demo's server process: what a failed start says, and that nothing is left running."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from jaxstack.models.embedded import embedded_model
from jaxstack.runtime.errors import UserError
from launch import server_process


def test_a_server_that_does_not_start_names_its_last_words(tmp_path):
    with (
        pytest.raises(UserError) as error,
        server_process.server_process(tmp_path / "no_such_model", tmp_path / "logs" / "server.log"),
    ):
        pass
    assert str(error.value).startswith("the server ended with exit code 1: error: ")
    assert "no_such_model" in str(error.value)
    assert str(tmp_path / "logs" / "server.log") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_child_ends_with_its_parent(tmp_path, number):
    """The parent is told to stop while the server is still starting."""
    program = f"""
        import signal
        from pathlib import Path
        from launch.server_process import server_process
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
        with server_process({str(embedded_model())!r}, Path({str(tmp_path / "server.log")!r})):
            pass
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.DEVNULL)
    try:
        child = _child_of(parent)
        parent.send_signal(number)
        assert parent.wait(60) != 0
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    finally:
        parent.kill()
        parent.wait()


def _child_of(parent):
    end = time.monotonic() + 300
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(parent.pid).children():
                if "launch.serve" in child.cmdline():
                    return child
        assert parent.poll() is None
        time.sleep(0.05)
    raise AssertionError("no server was started")
