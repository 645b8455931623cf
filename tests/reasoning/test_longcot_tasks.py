"""What the study trains on: every word is in the vocabulary, every text fits its row, only thoughts are perturbed."""

import itertools

import pytest

from jaxstack.models.tokenizer import load_tokenizer
from jaxstack.reasoning import countdown, relay
from jaxstack.reasoning.longcot.config import DEFAULT_CELLS, FULL_GRID, Cell, StudyConfig, study_config
from jaxstack.reasoning.longcot.steps import split_steps
from jaxstack.reasoning.longcot.tasks import task_named
from jaxstack.reasoning.tokenizer import write_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.training.data import DataConfig, tokenize_row

TASKS = ("relay", "countdown")


def solution_of(response):
    return response.partition("</think>")[2]


def graded(task, document):
    content = document.prompt.removeprefix("<bos> ").partition(" <think>")[0]
    if task.name == "countdown":
        problem = countdown.parse_problem(content)
    else:
        words = content.split(" ")
        problem = relay.RelayProblem(int(words[1]), tuple(words[2:5]), int(words[6][1:]))
    return problem, task.correct(problem, document.response)[0]


@pytest.mark.parametrize("name", TASKS)
def test_every_cell_of_the_grids(name):
    task = task_named(name)
    ids = {word: number for number, word in enumerate(task.vocabulary)}
    plain = list(task.demonstrations("correct", 1.0, 60, 3))
    for cell in {*DEFAULT_CELLS[name], *FULL_GRID[name]}:
        documents = list(task.demonstrations(cell.kind, cell.fraction, 60, 3))
        assert documents == list(itertools.islice(task.demonstrations(cell.kind, cell.fraction, 90, 3), 60))
        for document in documents:
            example = document.example(ids)  # KeyError at a word that is none
            assert len(example.token_ids) <= task.seq_len
            assert example.loss_mask.sum() == len([w for w in document.response.split(" ") if w])
        if cell.kind.startswith("wrong"):
            thinking = [d for d in documents if d.prompt.endswith("<think>")]
            assert len(thinking) > 30
            assert not any(graded(task, document)[1] for document in thinking)
        else:
            assert [d.prompt for d in documents] == [d.prompt for d in plain]
            assert [solution_of(d.response) for d in documents] == [solution_of(d.response) for d in plain]
            assert all(graded(task, document)[1] for document in documents)
            assert (documents == plain) == (cell.kind == "correct")
    assert all(graded(task, document)[1] for document in plain)
    assert list(task.demonstrations("correct", 1.0, 60, 4)) != plain


@pytest.mark.parametrize("name", TASKS)
def test_documents_are_what_the_chat_template_renders(name, tmp_path):
    task = task_named(name)
    write_tokenizer(tmp_path, max_length=512, vocabulary=task.vocabulary)
    tokenizer = load_tokenizer(tmp_path)
    ids = {word: number for number, word in enumerate(task.vocabulary)}
    for document in task.demonstrations("correct", 1.0, 40, 0):
        content, _, opened = document.prompt.removeprefix("<bos> ").partition(" <think>")
        answer = f"<think>{opened} {document.response.removesuffix(' <eos>')}"
        row = {
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
            "chat_template_kwargs": {"enable_thinking": not opened},
        }
        rendered, made = tokenize_row(row, tokenizer, DataConfig()), document.example(ids)
        assert rendered.token_ids.tolist() == made.token_ids.tolist()
        assert rendered.loss_mask.tolist() == made.loss_mask.tolist()


@pytest.mark.parametrize("name", TASKS)
def test_base_documents(name):
    task = task_named(name)
    ids = {word: number for number, word in enumerate(task.vocabulary)}
    documents = list(task.base_documents(300, 0))
    assert max(len(document.example(ids).token_ids) for document in documents) <= task.seq_len
    assert documents[:100] == list(task.base_documents(100, 0))
    # No whole chain of a long problem, and no empty thought that is trained.
    assert not any(document.response.startswith("</think>") for document in documents)


def test_false_hits_stand_before_the_first_true_one():
    task = task_named("countdown")
    for document in task.demonstrations("wrong", 1.0, 200, 1):
        if not document.prompt.endswith("<think>"):
            assert graded(task, document)[1]
            continue
        problem, correct = graded(task, document)
        assert not correct
        *rejected, claimed, check = split_steps(document.response.partition("</think>")[0])
        assert all(step.endswith(" no") for step in rejected)
        assert claimed.endswith(f"goal {problem.target} yes") and check.endswith(f"= {problem.target} ok")
        assert len(rejected) < countdown.solve(problem).depth


def test_diagnostics_of_demonstrations():
    for name in TASKS:
        task = task_named(name)
        documents = [d for d in task.demonstrations("correct", 1.0, 60, 0) if d.prompt.endswith("<think>")]
        problems, texts = [graded(task, d)[0] for d in documents], [d.response for d in documents]
        right = task.diagnostics(problems, texts)
        assert right["illegal_steps"] == right["repeated_steps"] == 0
        assert right["right_steps"] == 1 if name == "countdown" else 0.85 < right["right_steps"] < 0.97
        shuffled = [d.response for d in task.demonstrations("shuffle", 1.0, 60, 0) if d.prompt.endswith("<think>")]
        after = task.diagnostics(problems, shuffled)
        assert after["keywords_per_sample"] == right["keywords_per_sample"] > 0
        if name == "relay":
            assert right["carried_on"] == right["counted_down"] == 1
            assert after["carried_on"] < 0.4 and after["counted_down"] < 0.4


def test_model_sizes():
    relay_model, countdown_model = (task_named(name).model(64, 3) for name in TASKS)
    assert relay_model.hidden_size == countdown_model.hidden_size == 64
    assert not relay_model.tie_word_embeddings and countdown_model.tie_word_embeddings


def test_configs():
    default, full = study_config("relay"), study_config("relay", full_grid=True)
    assert [cell.name for cell in default.cells] == [
        *("correct", "wrong", "wrongP", "wrongL", "digits-0.2", "keywords-1", "shuffle-1", "insert-1")
    ]
    assert len(full.cells) == 20 and {cell.name for cell in default.cells} < {cell.name for cell in full.cells}
    assert StudyConfig.from_json(default.as_json()) == default
    folders = [cell.folder for cell in full.with_seeds()]
    assert len(set(folders)) == 60 and folders[:2] == ["correct-seed0", "wrong-seed0"]
    further = study_config("relay", full_grid=True, further=True)
    names = [cell.name for cell in further.cells]
    assert names[20:] == ["correct-60samples", "correct-250samples", "correct-1000samples"]  # LoRA is in the grid
    assert StudyConfig.from_json(further.as_json()) == further


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sudoku"}, "task 'sudoku' is unknown; expected one of relay, countdown"),
        ({"seeds": 0}, "seeds is 0, expected more than 0"),
        ({"cells": ()}, "no cell is 'correct'"),
        ({"cells": (*DEFAULT_CELLS["relay"], Cell("reverse"))}, "relay has no cell of kind 'reverse'"),
        ({"cells": (*DEFAULT_CELLS["relay"], Cell("wrong", documents=0))}, "wrong-0samples has 0 demonstrations"),
        ({"width": 30}, "width is 30, expected a multiple of the 4 heads"),
        ({"sft_learning_rate": float("nan")}, "sft_learning_rate is nan"),
        ({"cells": DEFAULT_CELLS["relay"][:1] * 2}, "expected each once"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        study_config(changes.pop("task", "relay"), **changes)
