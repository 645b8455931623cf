"""What every launcher shares: configuration files with overrides, one-line errors, exit codes, the summary line.

A launcher declares absl flags, and ends in `job.main(run)`. `run()` returns the job's summary (a JSON-ready dict, or
None). Exit codes: 0 done, 1 failed, 2 bad usage. A `UserError` prints one line and no traceback.
"""

import dataclasses
import json
import logging
import os
import runpy
import select
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import app, flags

from jaxstack.runtime.errors import UserError

_Config = TypeVar("_Config")


class BadUsage(UserError):
    """A wrong flag, configuration field or value on the command line: exit code 2."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)


def load_config(path: str | Path, config_type: type[_Config], overrides: Mapping[str, str] | None = None) -> _Config:
    """Runs `get_config()` of the Python file at `path` and applies dotted `overrides` (field path -> text).

    Raises:
      BadUsage: no such file, no `get_config`, another type than `config_type`, an unknown field, or a value that does
      not parse
        as the field's declared type.
    """
    file = Path(path)
    if not file.is_file():
        raise BadUsage(f"--config: no such file {str(path)!r}; expected a Python file with get_config()")
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
    except SyntaxError as error:
        raise BadUsage(f"--config: {path}, line {error.lineno}: {error.msg}") from error
    if not callable(get_config):
        raise BadUsage(f"--config: {path} defines no get_config()")
    config = get_config()
    if not isinstance(config, config_type):
        raise BadUsage(f"--config: {path} returned {type(config).__name__}, expected {config_type.__name__}")
    for name, text in (overrides or {}).items():
        config = _replace(config, name.split("."), text, name)
    return config


def _replace(config: Any, path: Sequence[str], text: str, whole: str) -> Any:
    fields = {f.name for f in dataclasses.fields(config)}
    head, rest = path[0], path[1:]
    if head not in fields:
        raise BadUsage(
            f"--config.{whole}: {type(config).__name__} has no field {head!r}; it has {', '.join(sorted(fields))}"
        )
    if rest:
        inner = getattr(config, head)
        if not dataclasses.is_dataclass(inner):
            raise BadUsage(f"--config.{whole}: {head!r} is {inner!r} here and has no fields to set")
        value = _replace(inner, rest, text, whole)
    else:
        value = _parse(text, typing.get_type_hints(type(config))[head], whole)
    return dataclasses.replace(config, **{head: value})


def _parse(text: str, kind: Any, whole: str) -> Any:
    """`text` as a value of the declared type `kind`: scalars, optionals, and tuples of scalars separated by commas."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("none", ""):
            return None
        errors = []
        for option in (a for a in arguments if a is not type(None)):
            try:
                return _parse(text, option, whole)
            except BadUsage as error:
                errors.append(error)
        raise errors[0]
    if origin is tuple:
        return tuple(_parse(part, arguments[0], whole) for part in text.split(",") if part)
    if origin is typing.Literal:
        for option in arguments:
            if text == str(option):
                return option
        raise BadUsage(f"--config.{whole}={text!r}: expected one of {', '.join(map(str, arguments))}")
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
    except (ValueError, KeyError):
        pass
    raise BadUsage(f"--config.{whole}={text!r}: expected {getattr(kind, '__name__', kind)}")


class ConfigFlag(typing.Generic[_Config]):
    """`--config=FILE` with `--config.field=value` overrides. Made by `config_flag` at import, read with `.get()`."""

    def __init__(self, config_type: type[_Config], default: str):
        self._type, self._default = config_type, default
        self._overrides: dict[str, str] = {}
        flags.DEFINE_string(
            "config",
            default,
            f"Python file whose get_config() returns a {config_type.__name__}; fields: --config.NAME=VALUE",
        )

    def take_overrides(self, argv: Sequence[str]) -> list[str]:
        """Removes `--config.x=y` (and `--config.x y`) from `argv`, remembering them; absl sees the rest."""
        rest, waiting = [], iter(argv)
        for argument in waiting:
            if not argument.startswith("--config."):
                rest.append(argument)
                continue
            name, equals, text = argument[len("--config.") :].partition("=")
            if not equals:
                text = next(waiting, "")
            self._overrides[name] = text
        return rest

    def get(self) -> _Config:
        return load_config(str(flags.FLAGS["config"].value), self._type, self._overrides)


_config_flags: list[ConfigFlag] = []


def config_flag(config_type: type[_Config], default: str) -> ConfigFlag[_Config]:
    """Declares `--config`; `default` is a path in the repository, or of the same name in the installed `configs`."""
    import configs

    candidate = Path(default)
    if not candidate.is_file():
        packaged = Path(str(configs.__file__)).parent / candidate.name
        candidate = packaged if packaged.is_file() else candidate
    flag = ConfigFlag(config_type, str(candidate))
    _config_flags.append(flag)
    return flag


def main(run: Callable[[], Mapping[str, Any] | None]) -> None:
    """Parses flags, runs `run`, prints its summary as one JSON line, and exits 0, 1 (failed) or 2 (bad usage)."""
    argv = sys.argv
    for flag in _config_flags:
        argv = flag.take_overrides(argv)

    # JAX notes each backend that is not there, which is nobody's concern.
    logging.getLogger("jax").setLevel(logging.WARNING)
    for name in ("httpx", "httpx2", "openai"):  # clients and their transport log each request and each further try
        logging.getLogger(name).setLevel(logging.WARNING)

    def guarded(rest: list[str]) -> int:
        if len(rest) > 1:
            return _fail(BadUsage(f"unexpected argument {rest[1]!r}; flags are written --name=value"))
        try:
            summary = run()
            if summary is not None:
                print(json.dumps(summary), flush=True)
        except UserError as error:
            return _fail(error)
        except BrokenPipeError:
            if not _unread():
                raise
            return 141
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0

    app.run(guarded, argv=argv, flags_parser=_parse_flags)


def _unread() -> bool:
    """Whether nobody reads our output any more, as after `| head`; from then on it goes nowhere."""
    reader = select.poll()
    reader.register(sys.stdout.fileno(), 0)  # errors are told unasked
    if not reader.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _parse_flags(argv: list[str]) -> list[str]:
    if any(a in ("--help", "-h", "-help", "--helpshort", "--helpfull") for a in argv[1:]):
        _print_help(argv[0])
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(_fail(BadUsage(str(error).replace("FATAL Flags parsing error: ", "").strip())))


def _print_help(program: str) -> typing.NoReturn:
    """The launcher's own docstring and flags; absl's dozens of logging flags stay out of the way."""
    module = sys.modules["__main__"]
    print((module.__doc__ or "").strip(), "\n")
    for name, flag in sorted((f.name, f) for f in flags.FLAGS.get_key_flags_for_module(module)):
        print(f"  --{name}={flag.default}\n      {flag.help}")
    for config in _config_flags:
        flag = flags.FLAGS["config"]
        print(f"  --config={flag.default}\n      {flag.help}")
        for field in dataclasses.fields(config._type):
            print(f"        --config.{field.name}")
    sys.exit(0)


def _fail(error: UserError) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code
