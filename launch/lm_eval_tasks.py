"""Two small tasks for lm-eval in files: choosing the right answer by its likelihood, and generating one.

lm-eval reads a task from a YAML file and its documents from a JSON file beside it, so nothing has to be downloaded.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxstack.reasoning.countdown import OPERATORS, Problem, candidates, grade, solve
from jaxstack.reasoning.evaluation import MAX_TOKENS
from jaxstack.runtime.errors import UserError

CHOOSING, GENERATING = "countdown_choose", "countdown_generate"
CHOICES = 4
ANSWER = r"(answer .*)$"


def choosing_documents(problems: Sequence[Problem], seed: int = 0) -> list[dict[str, Any]]:
    """`prompt` (the thinking skipped), `choices` (answers in random order, one right) and its place `label`."""
    rng = random.Random(seed)
    documents = []
    for problem in problems:
        right = _solution(problem)
        written = (c.expression(leaf) for c in candidates(problem.numbers) for leaf in range(len(OPERATORS)))
        answers = sorted({f"answer {expression}" for expression in written})
        wrong = [answer for answer in answers if not grade(problem, answer).correct]
        choices = [right, *rng.sample(wrong, CHOICES - 1)]
        rng.shuffle(choices)
        prompt = f"<bos> {problem.content} <think> </think>"
        documents.append({"prompt": prompt, "choices": choices, "label": choices.index(right)})
    return documents


def generating_documents(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """`prompt` and `answer`, the one that the search in canonical order finds."""
    return [{"prompt": f"<bos> {problem.content} <think>", "answer": _solution(problem)} for problem in problems]


def write_tasks(folder: Path, choosing: Sequence[dict[str, Any]], generating: Sequence[dict[str, Any]]) -> None:
    """Writes both tasks and their documents into `folder`, which lm-eval takes as `--include_path`."""
    likelihood = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    generation = {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": MAX_TOKENS, "do_sample": False, "temperature": 0.0},
        "filter_list": [
            {"name": "answer", "filter": [{"function": "regex", "regex_pattern": ANSWER}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents, task in ((CHOOSING, choosing, likelihood), (GENERATING, generating, generation)):
        data = folder.resolve() / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        whole = {"task": name, **where, "doc_to_text": "prompt", **task, "metadata": {"version": 1}}
        (folder / f"{name}.yaml").write_text(json.dumps(whole, indent=2) + "\n")  # JSON is YAML


def read_samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """What lm-eval logged for each document of `task`, in the documents' order.

    Raises:
      UserError: it logged nothing, or several runs are in the folder.
    """
    files = list(folder.rglob(f"samples_{task}_*.jsonl"))
    if len(files) != 1:
        raise UserError(f"{folder}: found {len(files)} logs of {task}, expected one")
    return sorted(map(json.loads, files[0].read_text().splitlines()), key=lambda sample: sample["doc_id"])


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """lm-eval's figures by task. Raises UserError: there is not exactly one result."""
    files = list(folder.rglob("results_*.json"))
    if len(files) != 1:
        raise UserError(f"{folder}: found {len(files)} results, expected one")
    return json.loads(files[0].read_text())["results"]


def _solution(problem: Problem) -> str:
    solution = solve(problem)
    if solution is None:
        raise UserError(f"{problem.content}: found no solution, expected one")
    return f"answer {solution.expression}"
