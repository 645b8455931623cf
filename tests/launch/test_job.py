"""What launchers share: configuration files, overrides on the command line, one-line errors and exit codes."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import pytest

from jaxstack.runtime.errors import UserError
from launch.job import BadUsage, load_config

CONFIG = """
    import dataclasses
    from typing import Literal

    @dataclasses.dataclass(frozen=True)
    class Inner:
        rate: float = 0.5
        kind: Literal["a", "b"] = "a"

    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: int = 3
        name: str | None = None
        flag: bool = False
        sizes: tuple[int, ...] = (1, 2)
        inner: Inner = Inner()

        def __post_init__(self):
            if self.steps < 1:
                raise ValueError("steps")

    def get_config():
        return Config()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(textwrap.dedent(CONFIG))
    return path


def load(path, **overrides):
    return load_config(path, object, {name.replace("__", "."): text for name, text in overrides.items()})


def test_overrides_take_the_declared_types(file):
    config = load(file, steps="7", name="x", flag="true", sizes="3,4,5", inner__rate="1e-3", inner__kind="b")
    assert dataclasses.asdict(config) == {
        "steps": 7,
        "name": "x",
        "flag": True,
        "sizes": (3, 4, 5),
        "inner": {"rate": 1e-3, "kind": "b"},
    }
    assert load(file, name="none").name is None


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("stepz", "1", "--config.stepz: Config has no field 'stepz'; it has flag, inner, name, sizes, steps"),
        ("inner.rat", "1", "--config.inner.rat: Inner has no field 'rat'; it has kind, rate"),
        ("steps.x", "1", "--config.steps.x: 'steps' is 3 here and has no fields to set"),
        ("steps", "many", "--config.steps='many': expected int"),
        ("flag", "maybe", "--config.flag='maybe': expected bool"),
        ("sizes", "1,x", "--config.sizes='x': expected int"),
        ("inner.kind", "c", "--config.inner.kind='c': expected one of a, b"),
    ],
)
def test_a_bad_override_names_field_value_and_type(file, field, text, message):
    with pytest.raises(BadUsage) as error:
        load_config(file, object, {field: text})
    assert str(error.value) == message
    assert error.value.exit_code == 2


def test_a_file_that_is_no_configuration(tmp_path, file):
    with pytest.raises(BadUsage, match="no such file 'nowhere"):
        load("nowhere.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(BadUsage, match=r"defines no get_config\(\)"):
        load(tmp_path / "empty.py")
    (tmp_path / "torn.py").write_text("def get_config(:")
    with pytest.raises(BadUsage, match="line 1: "):
        load(tmp_path / "torn.py")
    with pytest.raises(BadUsage, match="returned Config, expected int"):
        load_config(file, int)
    assert issubclass(BadUsage, UserError)


LAUNCHER = """
    '''Does a thing.'''
    import sys
    from absl import flags
    from jaxstack.runtime.errors import UserError
    from launch import job

    COUNT = flags.DEFINE_integer("count", 1, "how many")

    def run():
        print("on the way")
        if COUNT.value == 1_000_000:
            for number in range(COUNT.value):
                print(number, flush=True)
        if COUNT.value == 13:
            raise UserError("count: found 13,\\nexpected luck")
        return {"count": COUNT.value}

    job.main(run)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--count=2"], 0, None),
        (["--count=13"], 1, "error: count: found 13, expected luck"),
        (["--count=x"], 2, "error: flag --count=x: invalid literal for int() with base 10: 'x'"),
        (["--cuont=1"], 2, "error: Unknown command line flag 'cuont'. Did you mean: count ?"),
        (["stray"], 2, "error: unexpected argument 'stray'; flags are written --name=value"),
    ],
)
def test_exit_codes_and_one_line_each(tmp_path, arguments, code, line):
    program = tmp_path / "thing.py"
    program.write_text(textwrap.dedent(LAUNCHER))
    done = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == code
    if code == 0:
        assert json.loads(done.stdout.splitlines()[-1]) == {"count": 2}
    else:
        assert done.stderr.splitlines() == [line]


def test_output_that_nobody_reads_on_ends_it_without_a_word(tmp_path):
    program = tmp_path / "thing.py"
    program.write_text(textwrap.dedent(LAUNCHER))
    command = [sys.executable, str(program), "--count=1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "on the way\n"
        job.stdout.close()
        assert job.wait(600) == 141
        assert job.stderr.read() == ""
