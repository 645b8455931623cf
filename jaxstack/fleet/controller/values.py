"""Values of a parsed file, each as what it is expected to be, or a line that names it, what was found and expected."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxstack.runtime.errors import UserError


def wrong(where: str, found: Any, expected: str) -> UserError:
    text = repr(found)
    return UserError(f"{where}: found {text if len(text) < 80 else text[:77] + '...'}, expected {expected}")


def known(found: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    keys = list(keys)
    for key in found:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(keys)}"
            raise UserError(f"{where}{key}: no such key; {hint}")


def as_object(found: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise wrong(where, found, "an object with named keys")
    return found


def as_list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list):
        raise wrong(where, found, "a list")
    return found


def list_of_objects(found: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    where = f"resources.{key}"
    return [as_object(option, where) for option in as_list(found.get(key) or [], where)]


def text(found: Mapping[str, Any], key: str, where: str) -> str:
    value = found.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong(where, value, "text")
    return value.strip()


def strings(found: Any, where: str) -> dict[str, str]:
    if found is None:
        return {}
    named = as_object(found, where)
    for key, value in named.items():
        if isinstance(value, (Mapping, list)) or value is None:
            raise wrong(f"{where}.{key}", value, "text")
    return {key: str(value) for key, value in named.items()}


def number(found: Mapping[str, Any], key: str, default: float | None, where: str, *, least: float = 0.0) -> float:
    value = found.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        bound = "> 0" if 0 < least < 0.01 else f">= {least:g}"
        raise wrong(f"{where}.{key}", value, f"a number {bound}")
    return float(value)


def integer(found: Mapping[str, Any], key: str, default: int | None, where: str, *, least: int) -> int:
    value = found.get(key, default)
    if value is None:
        raise UserError(f"{where}.{key}: missing; expected an integer >= {least}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise wrong(f"{where}.{key}", value, f"an integer >= {least}")
    return value
