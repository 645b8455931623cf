"""What finished cells have left in their folders. Read without jax, by the study that waits for its workers."""

import json
from pathlib import Path
from typing import Any


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What a finished cell says; None where it is not finished."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """A finished cell's graded answers: for each problem its text, its cluster, and what each mode answered."""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
