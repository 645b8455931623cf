"""Typed reads from JSON files that come from elsewhere, with complaints that say where to look."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxstack.runtime.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; one-line `UserError` if it is missing, unreadable, or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder with it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({type(error).__name__}: {error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: found a JSON {type(data).__name__}, expected an object")
    return data


_REQUIRED: Any = object()


class Fields:
    """Typed reads from a JSON object; every complaint names file, field, what was found and what was expected.

    A key that is null counts as absent.

    Args:
      data: the object.
      source: the file's name.
      prefix: where the object stands in the file, such as "rope_scaling.".
      keys: where the file keeps what we call otherwise: "hidden_size" -> "d_model", or "attn_config.clip_qkv" inside an
        object.
      defaults: what keys that the file does not have, under our names, are taken for.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        source: str,
        prefix: str = "",
        *,
        keys: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ):
        self.data, self.source, self.prefix = data, source, prefix
        self._keys, self._defaults = keys or {}, defaults or {}

    def key(self, name: str) -> str:
        """The file's own path of what we call `name`."""
        return self._keys.get(name, name)

    def _find(self, name: str) -> tuple[bool, Any]:
        """Whether the file has it, and its value."""
        value: Any = self.data
        for part in self.key(name).split("."):
            if not isinstance(value, Mapping) or part not in value:
                return False, None
            value = value[part]
        return True, value

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value; the family's, else `default`, where the file has no such key."""
        present, value = self._find(name)
        return value if present else self._defaults.get(name, default)

    def given(self, name: str) -> bool:
        """Whether the file has the key and it is not null."""
        return self._find(name)[1] is not None

    def error(self, name: str, expected: str) -> UserError:
        present, value = self._find(name)
        shown = repr(value) if present else "nothing"
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return UserError(f"{self.source}: {self.prefix}{self.key(name)}: found {shown}, expected {expected}")

    def _value(self, name: str, default: Any, expected: str) -> Any:
        value = self.get(name)
        if value is None:
            if default is _REQUIRED:
                raise self.error(name, expected)
            return default
        return value

    def integer(
        self, name: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = 2**31 - 1, optional: bool = False
    ) -> Any:
        """An integer in range; None only where `optional`."""
        expected = f"an integer from {minimum} to {maximum}"
        value = self._value(name, default, expected)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(name, expected)
        return value

    def number(self, name: str, default: Any = _REQUIRED, *, optional: bool = False) -> Any:
        """A finite number as a float; None only where `optional`."""
        value = self._value(name, None if optional and default is _REQUIRED else default, "a finite number")
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            raise self.error(name, "a finite number")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self._value(name, _REQUIRED, "a list of numbers")
        if not isinstance(value, list) or not all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e300 for v in value
        ):
            raise self.error(name, "a list of finite numbers")
        return tuple(float(v) for v in value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._value(name, default, "a string")
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        """A token id; absent keys give `default`, null and the -1 of some old files None."""
        value = self.get(name, default)
        if value is None or value == -1:
            return None
        return self.integer(name, default, minimum=0)

    def token_ids(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """One id or a list of them."""
        value = self.get(name, default)
        if not isinstance(value, list):
            one = self.token_id(name, default)
            return () if one is None else (one,)
        if any(isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 2**31 for v in value):
            raise self.error(name, "a token id or a list of token ids")
        return tuple(value)
