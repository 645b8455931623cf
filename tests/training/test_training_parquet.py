import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy
from tiny_decoder import CONFIG, examples

from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.training import DataConfig, OptimizerConfig, SftConfig, train_sft
from jaxstack.training.data import build_dataset, load_dataset, read_jsonl, read_rows
from jaxstack.training.parquet import read_parquet

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
# Every form, so that most columns of a row, and "train" of most messages, are null in the Parquet file.
ROWS = [
    {"messages": TURNS},
    {"messages": [*TURNS, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "train": False}]},
    {"system": "be brief", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    {"prompt": "ab", "response": "cd"},
    {"token_ids": [1, 2, 3], "loss_mask": [0, 0, 1]},
    {"token_ids": [4, 5, 6]},
]


def write(path: Path, rows, *, group: int = 2, **options) -> Path:
    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, path, row_group_size=group, **options)
    return path


def build(rows, **config):
    return build_dataset(rows, byte_tokenizer(), DataConfig(**config), row_length=64, vocab_size=261)


def test_rows_are_those_of_a_jsonl_file(tmp_path):
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = write(tmp_path / "x.parquet", [{**row, "id": "not read"} for row in ROWS])
    assert pyarrow.parquet.ParquetFile(columns).num_row_groups == 3
    ours, theirs = build(read_rows([columns])), build(read_jsonl([lines]))
    assert ours.digest() == theirs.digest() and len(ours) == len(ROWS)
    both = build(read_rows([columns, lines]))
    assert len(both) == 2 * len(ROWS)


def test_a_folder_stands_for_its_files_by_name(tmp_path):
    for name, rows in (("b", ROWS[3:]), ("a", ROWS[:3])):
        write(tmp_path / f"{name}.parquet", rows)
    (tmp_path / "README.md").write_text("not data")
    options = {"row_length": 64, "vocab_size": 261}
    found = load_dataset([str(tmp_path)], byte_tokenizer(), DataConfig(), **options, cache_folder=tmp_path / "cache")
    assert found.digest() == build((str(i), row) for i, row in enumerate(ROWS)).digest()
    again = load_dataset([str(tmp_path)], byte_tokenizer(), DataConfig(), **options, cache_folder=tmp_path / "cache")
    assert again.digest() == found.digest() and len(list((tmp_path / "cache").iterdir())) == 1
    with pytest.raises(UserError, match=r"found no \.parquet file"):
        load_dataset([str(tmp_path / "cache")], None, DataConfig(), **options)


def test_row_groups_are_read_as_they_are_needed(tmp_path):
    path = write(
        tmp_path / "x.parquet", [{"token_ids": list(range(200))}] * 6, compression="none", use_dictionary=False
    )
    chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0)
    spoiled = bytearray(path.read_bytes())
    spoiled[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(spoiled)
    rows = read_parquet(path)
    assert [next(rows)[0] for _ in range(4)] == [f"{path}: row {n}" for n in (1, 2, 3, 4)]
    with pytest.raises(UserError, match=r"cannot be read behind row 4 of 6: .*expected a whole Parquet file") as error:
        next(rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row,message",
    [
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content: found None, expected a string"),
        ({"messages": []}, r"messages: found \[\], expected a list with at least one message"),
        ({"token_ids": [1, None]}, r"token_ids: found array\(\[ 1\., nan\]\), expected a list of integers"),
        ({"token_ids": []}, r"token_ids: found array\(\[\], dtype=int64\), expected a list of integers"),
        ({"token_ids": [1, 2], "loss_mask": [1]}, "loss_mask: found .*, expected 2 zeros and ones"),
        ({}, "found the fields none; expected 'messages'"),
    ],
)
def test_bad_rows_are_named_or_skipped_and_counted(tmp_path, row, message):
    path = write(tmp_path / "x.parquet", [*ROWS[:2], row, *ROWS[2:]])
    with pytest.raises(UserError, match=message) as error:
        build(read_rows([path]))
    assert str(error.value).startswith(f"{path}: row 3: ") and "\n" not in str(error.value)
    report = build(read_rows([path]), on_bad_row="skip").report
    assert (report.examples, report.skipped_bad_rows) == (len(ROWS), 1)
    assert f"1 bad rows skipped (14.3% of rows, the first {path}: row 3: " in report.line()


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"missing\.parquet': No such file or directory; expected a Parquet file"):
        list(read_rows([tmp_path / "missing.parquet"]))
    (tmp_path / "text.parquet").write_text("not columns at all")
    with pytest.raises(UserError, match=r"text\.parquet': .*; expected a Parquet file"):
        list(read_rows([tmp_path / "text.parquet"]))
    with pytest.raises(UserError, match=r"found the columns 'prompt', 'text'; expected 'messages'"):
        list(read_rows([write(tmp_path / "columns.parquet", [{"prompt": "a", "text": "b"}])]))


def test_a_run_resumes_at_its_place_in_the_data(tmp_path):
    items = examples(40, seed=1)
    path = write(
        tmp_path / "x.parquet",
        [{"token_ids": e.token_ids.tolist(), "loss_mask": e.loss_mask.tolist()} for e in items],
        group=7,
    )
    config = SftConfig(
        model=CONFIG,
        data=DataConfig(paths=(str(path),)),
        batch_rows=2,
        accum_steps=2,
        seq_len=32,
        max_steps=12,  # of 4 in an epoch
        log_every=4,
        optimizer=OptimizerConfig(learning_rate=5e-3, schedule="constant"),
    )
    whole = train_sft(
        dataclasses.replace(config, data=DataConfig()), tmp_path / "whole", examples=items, progress=False
    )
    for steps in (3, 7, 12):
        parts = train_sft(dataclasses.replace(config, max_steps=steps), tmp_path / "parts", progress=False)
    assert parts.steps == 12 and parts.final_loss == whole.final_loss
    ours, theirs = (safetensors.numpy.load_file(r.model_folder / "model.safetensors") for r in (parts, whole))
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
