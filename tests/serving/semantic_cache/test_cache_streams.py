"""Made-up streams are what they say they are; streams from files, and files that hold none."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.datasets import read_pairs, read_stream
from jaxstack.serving.semantic_cache.embedders import HashedNgramEmbedder
from jaxstack.serving.semantic_cache.questions import questions
from jaxstack.serving.semantic_cache.streams import STREAMS, make_stream


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_unit_vectors_and_the_same_for_the_same_seed(name):
    stream, again, other = make_stream(name, 600, 1), make_stream(name, 600, 1), make_stream(name, 600, 2)
    assert len(stream) == 600 and stream.name == name
    np.testing.assert_allclose(np.linalg.norm(stream.vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(stream.vectors, again.vectors)
    np.testing.assert_array_equal(stream.answers, again.answers)
    assert (stream.answers != other.answers).any()
    # Requests of one class are nearer to each other than to others, on average.
    same = stream.classes[:, None] == stream.classes
    s = stream.vectors @ stream.vectors.T
    off = ~np.eye(600, dtype=bool)
    assert s[same & off].mean() > s[~same].mean() + 0.2


def test_what_answers_do():
    combo, noisy, drift = (make_stream(name, 4000, 0) for name in ("combo", "noisy", "drift"))
    np.testing.assert_array_equal(combo.classes, combo.answers)
    changed = noisy.answers != noisy.classes
    assert 0.04 < changed.mean() < 0.14  # a quarter of the classes, 35 % of their requests
    assert len(set(noisy.answers[changed].tolist())) == changed.sum()  # each time another one
    first, second = drift.answers[:2000], drift.answers[2000:]
    assert not set(first.tolist()) & set(second.tolist()) and (first == drift.classes[:2000]).all()
    hostile = make_stream("hostile", 4000, 0)
    hot = hostile.classes == np.bincount(hostile.classes).argmax()
    assert hot.sum() == 400 and (np.diff(hostile.answers[hot]) >= 0).all()
    assert len(set(hostile.answers[hot].tolist())) == 8


def test_combo_s_parts_are_as_hard_as_they_should_be():
    stream = make_stream("combo", 4000, 0)
    s = stream.vectors @ stream.vectors.T
    np.fill_diagonal(s, -1)

    def of(first, last, same):
        rows = np.flatnonzero((stream.classes >= first) & (stream.classes < last))
        mask = (stream.classes[rows, None] == stream.classes) == same
        return np.where(mask, s[rows], -1).max(axis=1)

    lone, groups = (0, 40), (40, 160)
    assert np.median(of(*groups, False)) > 0.95 > np.median(of(*lone, True)) > np.median(of(*lone, False))
    assert (of(*groups, False) > of(*groups, True)).mean() > 0.004  # sometimes the wrong one is nearest


def test_questions_that_mean_the_same_are_spelled_differently():
    texts, meanings = questions(2000, np.random.default_rng(0))
    assert len(set(texts)) == 2000 == len(meanings)
    assert 100 < len(set(meanings.tolist())) < 1900
    assert all("{" not in text for text in texts)
    stream = make_stream("text", 100, 0)
    np.testing.assert_array_equal(HashedNgramEmbedder().embed(stream.prompts), stream.vectors)


def test_no_such_stream():
    with pytest.raises(UserError, match="stream: found 'calm', expected one of combo"):
        make_stream("calm", 100, 0)
    with pytest.raises(UserError, match="requests: found 3, expected at least 8"):
        make_stream("combo", 3, 0)


ROWS = [
    {"prompt": "a", "id_set": 7, "emb_x": [3.0, 4.0], "response_m": "Yes."},
    {"prompt": "b", "id_set": 2, "emb_x": [0.0, 2.0], "response_m": "no"},
    {"prompt": "c", "id_set": 7, "emb_x": [1.0, 0.0], "response_m": " YES"},
]


def write(folder, ending, rows=ROWS):
    path = folder / f"log{ending}"
    table = pa.Table.from_pylist(rows)
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif ending == ".csv":
        texts = [row | {"emb_x": json.dumps(row["emb_x"])} for row in rows]
        pyarrow.csv.write_csv(pa.Table.from_pylist(texts), path)
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl", ".json"])
def test_the_papers_layout(tmp_path, ending):
    stream = read_stream(write(tmp_path, ending))
    assert stream.name == "log" and stream.prompts == ("a", "b", "c") and stream.answers.tolist() == [0, 1, 0]
    np.testing.assert_allclose(stream.vectors, [[0.6, 0.8], [0, 1], [1, 0]], atol=1e-6)
    assert len(read_stream(tmp_path / f"log{ending}", limit=2)) == 2


def test_answers_stand_for_classes_where_there_are_none_and_columns_are_chosen(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "id_set"} | {"emb_y": [1.0, 1.0]} for row in ROWS]
    path = write(tmp_path, ".parquet", rows)
    stream = read_stream(path, embedding="x", response="m")
    assert stream.answers.tolist() == [0, 1, 0]
    with pytest.raises(UserError, match=r"expected one column emb_\.\.\."):
        read_stream(path)
    with pytest.raises(UserError, match=r"expected id_set, or response_z"):
        read_stream(path, embedding="x", response="z")
    embedder = HashedNgramEmbedder(64)
    np.testing.assert_array_equal(read_stream(path, embedder=embedder).vectors, embedder.embed(["a", "b", "c"]))


def test_pairs(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"origin": "how are you", "similar": "how do you do"}] * 2))
    stream = read_pairs(path, HashedNgramEmbedder(64))
    assert stream.classes.tolist() == [0, 0, 0, 0] and len(stream) == 4
    path.write_text('{"origin": 1}')
    with pytest.raises(UserError, match="not readable, expected a JSON list"):
        read_pairs(path, HashedNgramEmbedder(64))


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "found no rows"),
        ([ROWS[0] | {"emb_x": [0.0, 0.0]}], "row 0: found an embedding of length 0"),
        ([ROWS[0], ROWS[1] | {"emb_x": [1.0]}], "unequally long"),
        ([{"prompt": "a", "emb_x": [1.0]}], "expected id_set, or one column response_"),
    ],
)
def test_files_that_hold_no_stream(tmp_path, rows, complaint):
    path = tmp_path / "log.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError) as error:
        read_stream(path)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"found ending '\.txt', expected one of \.json"):
        read_stream(tmp_path / "log.txt")
    (tmp_path / "log.parquet").write_text("no")
    with pytest.raises(UserError, match="cannot be read"):
        read_stream(tmp_path / "log.parquet")
