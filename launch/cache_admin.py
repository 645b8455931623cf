"""Looks into the file of a semantic cache, and takes answers out of it.

    python -m launch.cache_admin show PATH                  owners: entries, hits, labels, the error so far
    python -m launch.cache_admin list PATH --owner=t:ann    entries, those used last first; --contains=TEXT, --lines=N
    python -m launch.cache_admin entry PATH 17              one entry whole, with its labels
    python -m launch.cache_admin remove PATH --owner=t:ann --model=old      entries that fit all that is given

The first three may be used while a server has the file, and change nothing; `--json` is for programs. `remove` needs
the file to itself: a running server removes by `POST /v1/cache/invalidate`. An owner is a tenant (`t:` and its name) or
a group that shares (`g:` and its name).
"""

import datetime
import json
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.budget import estimate_of
from jaxstack.serving.semantic_cache.entry import Entry
from jaxstack.serving.semantic_cache.store import CacheStore
from jaxstack.serving.semantic_cache.store_reader import StoreReader, reading
from launch import job

_OWNER = flags.DEFINE_string("owner", None, "list, remove: this owner's entries alone")
_MODEL = flags.DEFINE_string("model", None, "list, remove: answers of this model alone")
_CONTAINS = flags.DEFINE_string("contains", None, "list, remove: prompts with this text alone")
_OLDER = flags.DEFINE_float("older_than_s", None, "list, remove: answers older than this alone", lower_bound=0)
_EVERYTHING = flags.DEFINE_bool("everything", False, "remove: all entries")
_LINES = flags.DEFINE_integer("lines", 40, "list: entries at most", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "show, list, entry: as JSON")

COMMANDS = {"show": 1, "list": 1, "entry": 2, "remove": 1}
_words: list[str] = []

_Found = TypeVar("_Found")


def take_words(argv: list[str]) -> list[str]:
    """Takes the command and what it is about off the command line; absl sees the flags."""
    _words[:] = [word for word in argv[1:] if not word.startswith("-")]
    return [argv[0], *(word for word in argv[1:] if word.startswith("-"))]


def run() -> dict[str, Any] | None:
    if not _words or _words[0] not in COMMANDS:
        found = repr(_words[0]) if _words else "none"
        raise job.BadUsage(f"command: found {found}, expected one of {', '.join(COMMANDS)}")
    command, *about = _words
    if len(about) != COMMANDS[command]:
        expected = "a cache's file" + (" and an entry's number" if command == "entry" else "")
        raise job.BadUsage(f"{command}: found {len(about)} further words, expected {expected}")
    if command == "remove":
        return _remove(about[0])
    with reading(about[0]) as store:
        if command == "show":
            _say(show(store), _owners_table)
        elif command == "list":
            _say([_brief(entry) for entry in _chosen(store)[: _LINES.value]], _entries_table)
        else:
            _say(_whole(store, about[1]), _entry_text)
    return None


# ----------------------------------------------------------------------------------------------------------------- show


def show(store: StoreReader) -> list[dict[str, Any]]:
    """How each owner does, as far as the file knows."""
    owners: dict[str, dict[str, Any]] = {}

    def of(owner: str) -> dict[str, Any]:
        empty = {"entries": 0, "bytes": 0, "hits": 0, "saved_s": 0.0, "labels": 0, "wrong_labels": 0, "policies": []}
        return owners.setdefault(owner, {"owner": owner, **empty})

    for entry, _ in store.entries():
        row = of(entry.owner)
        row["entries"] += 1
        row["bytes"] += entry.size_bytes
        row["hits"] += entry.hits
        row["saved_s"] += entry.saved_s
    for owner, (labels, wrong) in store.label_counts().items():
        of(owner).update(labels=labels, wrong_labels=wrong)
    for owner, embedder, policy, state in store.all_states():
        found: dict[str, Any] = {"policy": policy, "embedder": embedder}
        if saved := state.get("policy", {}).get("budget"):
            estimate = estimate_of(saved)
            if estimate.requests:
                found |= {"requests": estimate.requests, "error": estimate.error, "half_width": estimate.half_width}
        of(owner)["policies"].append(found)
    return [owners[owner] for owner in sorted(owners)]


def _owners_table(rows: list[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [
        ("OWNER", "ENTRIES", "MB", "HITS", "SAVED", "LABELS", "WRONG", "POLICY", "REQUESTS", "ERROR")
    ]
    for row in rows:
        counts = (row["entries"], f"{row['bytes'] / 1e6:.1f}", row["hits"], f"{row['saved_s']:.0f} s")
        cells = tuple(map(str, (row["owner"], *counts, row["labels"], row["wrong_labels"])))
        for policy in row["policies"] or [{"policy": "-"}]:
            error = f"{policy['error']:.4f} +- {policy['half_width']:.4f}" if policy.get("requests") else "-"
            lines.append((*cells, policy["policy"], str(policy.get("requests", "-")), error))
            cells = ("",) * len(cells)
    return _aligned(lines)


# -------------------------------------------------------------------------------------------------------------- entries


def _chosen(store: StoreReader) -> list[Entry]:
    """The entries that fit the flags, those used last first."""
    now = time.time()
    found = [
        entry
        for entry, _ in store.entries()
        if (_OWNER.value is None or entry.owner == _OWNER.value)
        and (_MODEL.value is None or entry.model == _MODEL.value)
        and (_CONTAINS.value is None or _CONTAINS.value in entry.prompt)
        and (_OLDER.value is None or now - entry.created_s > _OLDER.value)
    ]
    return sorted(found, key=lambda entry: (-entry.last_used_s, entry.id))


def _brief(entry: Entry) -> dict[str, Any]:
    shown = {name: getattr(entry, name) for name in ("id", "owner", "model", "semantic", "hits", "saved_s", "reports")}
    return {**shown, "created": _date(entry.created_s), "last_used": _date(entry.last_used_s), "prompt": entry.prompt}


def _entries_table(rows: list[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [("ENTRY", "OWNER", "MODEL", "HITS", "SAVED", "REPORTS", "LAST USED", "PROMPT")]
    for row in rows:
        prompt = " ".join(row["prompt"].split())
        prompt = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
        use = (row["hits"], f"{row['saved_s']:.1f} s", row["reports"], row["last_used"])
        lines.append(tuple(map(str, (row["id"], row["owner"], row["model"] or "-", *use, prompt))))
    return _aligned(lines)


def _whole(store: StoreReader, number: str) -> dict[str, Any]:
    entry = store.entry(int(number)) if number.isdecimal() else None
    if entry is None:
        raise UserError(f"entry: found no entry {number}, expected a number that `list` shows", exit_code=2)
    labels = [
        {"similarity": similarity, "correct": correct, "source": source, "at": _date(at_s)}
        for similarity, correct, source, at_s in store.labels_of(entry.id)
    ]
    expires = None if entry.expires_s is None else _date(entry.expires_s)
    return {**_brief(entry), "expires": expires, "answer": entry.response.text, "labels": labels}


def _entry_text(entry: dict[str, Any]) -> str:
    long = ("prompt", "answer", "labels")
    lines = [f"{name}: {value}" for name, value in entry.items() if name not in long]
    lines += ["", "prompt:", entry["prompt"], "", "answer:", entry["answer"], "", f"labels: {len(entry['labels'])}"]
    for label in entry["labels"]:
        verdict = "right" if label["correct"] else "wrong"
        lines.append(f"  {label['at']}  similarity {label['similarity']:.3f}  {verdict}  {label['source']}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- remove


def _remove(path: str) -> dict[str, Any]:
    given = (_OWNER, _MODEL, _CONTAINS, _OLDER)
    if not _EVERYTHING.value and all(flag.value is None for flag in given):
        names = ", ".join(f"--{flag.name}" for flag in given)
        raise job.BadUsage(f"remove: found nothing to go by, expected one of {names}, --everything")
    with reading(path):  # There is one: the next line would make it.
        pass
    store = CacheStore(path)
    try:
        chosen = _chosen(store)
        store.begin()
        for entry in chosen:
            store.delete(entry.id)
        if not store.flush():
            raise UserError(f"path: {store.failed}")
    finally:
        store.close()
    return {"removed": len(chosen)}


# ---------------------------------------------------------------------------------------------------------------- shown


def _say(found: _Found, text: Callable[[_Found], str]) -> None:
    print(json.dumps(found, ensure_ascii=False) if _JSON.value else text(found), flush=True)


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _date(at_s: float) -> str:
    return datetime.datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")


if __name__ == "__main__":
    sys.argv = take_words(sys.argv)
    job.main(run)
