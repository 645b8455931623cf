"""Programs run for real: what passes, what fails, and that every limit holds."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from jaxstack.reasoning.grading.code import CodeLimits, CodeTest, extract_code, grade_code, run_test

ADD = "a, b = map(int, input().split())\nprint(a + b)\n"
TESTS = [CodeTest("1 2\n", "3\n"), CodeTest("40 2\n", "42")]
QUICK = CodeLimits(cpu_s=20, wall_s=60.0, memory_bytes=256 << 20, file_bytes=1 << 16)


def fenced(code: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{code}```\nDone."


def test_extract_code():
    assert extract_code(fenced("x = 1\n")) == "x = 1\n"
    assert extract_code(fenced("first\n") + fenced("second\n") + fenced("1\n2\n", "text")) == "second\n"
    assert extract_code(fenced("bare\n", "")) == "bare\n"
    assert extract_code("```python\nx = 1\n") is None  # cut off
    assert extract_code("<think>\n" + fenced("x = 1\n")) is None
    assert extract_code("<think>\n" + fenced("x = 1\n") + "</think>\n" + fenced("y = 2\n")) == "y = 2\n"
    assert extract_code("x = 1") is None and extract_code("```python\n```") is None


def test_programs():
    assert grade_code(fenced(ADD), TESTS).correct
    verdict = grade_code(fenced(ADD.replace("a + b", "3")), TESTS)
    assert (verdict.outcome, verdict.reason) == ("wrong", "test 2 of 2: line 1: printed '3', expected '42'")
    assert grade_code("no code", TESTS).outcome == "no_answer"
    assert grade_code(fenced(ADD), []).outcome == "error"
    assert "ZeroDivisionError" in run_test("1 / 0", TESTS[0]).reason
    assert "SyntaxError" in run_test("def", TESTS[0]).reason


@pytest.mark.parametrize(
    ("printed", "expected", "equal"),
    [
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("1.50\n", "1.5", True),
        ("YES", "yes", False),
        ("1\n2", "1 2", False),
        ("0.1000001", "0.1", False),
        ("nan x", "nan y", False),
    ],
)
def test_outputs(printed: str, expected: str, equal: bool):
    assert run_test(f"print({printed!r})", CodeTest("", expected)).correct == equal


def test_functions():
    test = CodeTest([[3, 1, 2], 2], [3, 2], "largest")
    method = (
        "class Solution:\n    def largest(self, xs: List[int], k: int) -> List[int]:\n        return nlargest(k, xs)"
    )
    assert run_test(method, test).correct
    plain = "print('noise')\ndef largest(xs, k):\n    return tuple(sorted(xs)[-k:][::-1])"
    assert run_test(plain, test).correct
    assert run_test("def largest(xs, k): return xs", test).reason == "returned [3, 1, 2], expected [3, 2]"
    assert "no function 'largest'" in run_test("x = 1", test).reason
    assert run_test("def largest(xs, k): return {1}", test).outcome == "wrong"
    modular = "class Solution:\n    def f(self, a): return pow(a, 3, 7)"
    assert run_test(modular, CodeTest([3], 6, "f")).correct
    # What it forges is no result, since it does not know the right one; a link is not followed.
    forged = "import os\nos.symlink('/etc/passwd', 'result.json')\ndef largest(xs, k): os._exit(0)"
    assert run_test(forged, test).reason == "it returned nothing that JSON can say"


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        ("x = bytearray(1 << 30)", "wrong", "MemoryError"),
        ("while True: print('x' * 999)", "wrong", "more than 65536 bytes of output"),
        ("open('big', 'wb').write(bytes(1 << 20))", "wrong", "File too large"),
        ("import os\nos.kill(os.getpid(), 11)", "wrong", "ended by signal 11"),
        ("import sys\nsys.exit('no')", "wrong", "no"),
        ("input()", "wrong", "EOFError"),
    ],
)
def test_limits(code: str, outcome: str, reason: str):
    verdict = run_test(code, CodeTest("", "1"), QUICK)
    assert verdict.outcome == outcome and reason in verdict.reason, verdict


def test_time_limits():
    verdict = run_test("while True: pass", CodeTest("", "1"), CodeLimits(cpu_s=1, wall_s=60.0))
    assert (verdict.outcome, verdict.reason) == ("timeout", "more than 1 s of CPU time")
    verdict = run_test("import time\ntime.sleep(60)", CodeTest("", "1"), CodeLimits(wall_s=0.5))
    assert (verdict.outcome, verdict.reason) == ("timeout", "more than 0.5 s")


def test_nothing_is_left_behind(tmp_path):
    """Processes that a program starts end with it, and its folder goes."""
    note = tmp_path / "pid"
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        f"    open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{os.getcwd()}}')\n"
        "    time.sleep(3600)\n"
        f"while not os.path.exists({str(note)!r}) or not os.path.getsize({str(note)!r}): time.sleep(0.001)\n"
        "print(1)\n"
    )
    assert run_test(code, CodeTest("", "1")).correct
    pid, folder = note.read_text().split()
    deadline = time.monotonic() + 300
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not os.path.exists(folder)


def test_a_program_does_not_outlive_its_grader(tmp_path):
    note = tmp_path / "pid"
    program = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(3600)"
    code = f"from jaxstack.reasoning.grading.code import CodeTest, run_test\nrun_test({program!r}, CodeTest('', ''))"
    grader = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 300
    while not note.exists() or not note.read_text():
        assert time.monotonic() < deadline and grader.poll() is None
        time.sleep(0.01)
    grader.kill()
    grader.wait()
    pid = int(note.read_text())
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_surroundings():
    code = (
        "import os, sys\nprint(sorted(k for k in os.environ if 'KEY' in k or 'PYTHON' in k), os.listdir('.'), sys.argv)"
    )
    os.environ["SECRET_KEY"] = "x"
    try:
        verdict = run_test(code, CodeTest("", "?"))
    finally:
        del os.environ["SECRET_KEY"]
    assert 'printed "[] [' in verdict.reason and "SECRET" not in verdict.reason
    # A file of the folder does not take a library module's place.
    assert run_test("open('json.py', 'w').write('1/0')\nimport decimal, json\nprint(1)", CodeTest("", "1")).correct
