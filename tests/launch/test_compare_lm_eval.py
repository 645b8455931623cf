"""The tasks that lm-eval gets and what is read of its logs; the comparison itself needs the peers' environment."""

import json
import re
from pathlib import Path

import pytest

from jaxstack.reasoning.countdown import grade, held_out
from jaxstack.runtime.errors import UserError
from launch import lm_eval_tasks
from launch.lm_eval_tasks import CHOOSING, GENERATING


def test_the_tasks(tmp_path: Path) -> None:
    problems = held_out(40)
    choosing, generating = lm_eval_tasks.choosing_documents(problems), lm_eval_tasks.generating_documents(problems)
    assert {document["label"] for document in choosing} == set(range(lm_eval_tasks.CHOICES))
    for problem, choose, generate in zip(problems, choosing, generating):
        right = [grade(problem, answer).correct for answer in choose["choices"]]
        assert right == [i == choose["label"] for i in range(lm_eval_tasks.CHOICES)]
        assert len(set(choose["choices"])) == lm_eval_tasks.CHOICES
        assert choose["choices"][choose["label"]] == generate["answer"]
        thought = f"try 1 + 2 = 3 </think> {generate['answer']}"
        assert re.findall(lm_eval_tasks.ANSWER, thought) == [generate["answer"]]
    lm_eval_tasks.write_tasks(tmp_path, choosing, generating)
    for name, documents in ((CHOOSING, choosing), (GENERATING, generating)):
        task = json.loads((tmp_path / f"{name}.yaml").read_text())
        lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        assert task["task"] == name and [json.loads(line) for line in lines] == documents
        assert {task["doc_to_text"], task["doc_to_target"]} <= set(documents[0])


def test_the_logs(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UserError, match="found 0 logs"):
        lm_eval_tasks.read_samples(tmp_path, CHOOSING)
    with pytest.raises(UserError, match="found 0 results"):
        lm_eval_tasks.read_results(tmp_path)
    (folder / f"samples_{CHOOSING}_1.jsonl").write_text('{"doc_id": 1}\n{"doc_id": 0}\n')
    (folder / "results_1.json").write_text('{"results": {"a": {"acc,none": 0.5}}}')
    assert [sample["doc_id"] for sample in lm_eval_tasks.read_samples(tmp_path, CHOOSING)] == [0, 1]
    assert lm_eval_tasks.read_results(tmp_path) == {"a": {"acc,none": 0.5}}
