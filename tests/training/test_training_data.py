import dataclasses
import json

import numpy as np
import pytest
from tiny_decoder import examples

from jaxstack.models.tokenizer import CHATML, Tokenizer, byte_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.training.data import DataConfig, Example, build_dataset, load_dataset, read_jsonl, tokenize_row

TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
PAIR = {"prompt": "ab", "response": "cd"}
IDS = {"token_ids": [1, 2, 3], "loss_mask": [0, 0, 1]}


def build(rows, *, row_length=64, vocab_size=261, tokenizer=None, **config):
    named = ((f"data.jsonl:{n}", row) for n, row in enumerate(rows, start=1))
    tokenizer = tokenizer or byte_tokenizer()
    return build_dataset(named, tokenizer, DataConfig(**config), row_length=row_length, vocab_size=vocab_size)


def test_every_row_form():
    data = build([TALK, SHAREGPT, PAIR, IDS, Example(np.array([7, 8], np.int32), np.array([True, True]))])
    docs = [data.token_ids[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:])]
    masks = [data.loss_mask[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:])]
    assert docs[0] == docs[1] and docs[0][-1] == ord("\n") and docs[0][-2] == 260
    assert [t for t, m in zip(docs[0], masks[0]) if m] == [*b"yo", 260]
    assert docs[2] == [*b"abcd", 258] and masks[2] == [False, False, True, True, True]
    assert docs[3] == [1, 2, 3] and masks[3] == [False, False, True]
    assert masks[4] == [False, True]  # the first token has nothing before it
    assert data.report.examples == 5 and data.report.target_tokens == 3 * 2 + 3 + 1 + 1


def test_mask_all_and_append_eos_and_template_variables():
    config = DataConfig(mask="all", append_eos=False)
    found = tokenize_row(PAIR, byte_tokenizer(), config)
    assert found.token_ids.tolist() == [*b"abcd"] and found.loss_mask.all()
    template = "{{ 'T' if enable_thinking else 'F' }}" + CHATML
    tokenizer = Tokenizer(byte_tokenizer().pipeline, chat_templates={"default": template})
    row = {**TALK, "chat_template_kwargs": {"enable_thinking": True}}
    assert tokenize_row(row, tokenizer, DataConfig()).token_ids[0] == ord("T")
    assert tokenize_row(TALK, tokenizer, DataConfig()).token_ids[0] == ord("F")


def test_overflow_and_empty_masks_are_counted_never_silent():
    long = {"token_ids": list(range(10)), "loss_mask": [0] * 8 + [1, 1]}
    silent = {"token_ids": [1, 2, 3], "loss_mask": [1, 0, 0]}
    report = build([long, IDS, silent], row_length=9).report
    assert (report.rows, report.examples, report.dropped_too_long, report.dropped_without_targets) == (3, 1, 1, 1)
    line = report.line()
    assert (
        "1 dropped as too long (33.3% of rows); 1 dropped without targets (33.3% of rows, the first data.jsonl:3"
        in line
    )
    assert report.as_json()["dropped_too_long"] == 1
    data = build([long, IDS], row_length=9, overflow="truncate")
    assert data.report.truncated == 1 and data.lengths.tolist() == [9, 3]
    assert build([long, IDS], row_length=8, overflow="truncate").report.dropped_without_targets == 1
    with pytest.raises(UserError, match=r"data\.jsonl:1: 10 tokens, expected at most seq_len=9"):
        build([long], row_length=9, overflow="error")


BAD_ROWS = [
    ({"text": "x"}, "found the fields 'text'; expected 'messages', 'conversations'"),
    ({}, "found the fields none"),
    ({"messages": []}, r"messages: found \[\], expected a list with at least one message"),
    ({"messages": "hello"}, "messages: found 'hello'"),
    ({"messages": [{"content": "x"}]}, r"messages\[0\]: found .* expected an object with 'role' and 'content'"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content: found None, expected a string"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "from is 'alien'"),
    ({"prompt": 3, "response": "x"}, "prompt: found 3, expected a string"),
    ({"token_ids": []}, r"token_ids: found \[\], expected a list of integers"),
    ({"token_ids": [1.5]}, "token_ids: found"),
    ({"token_ids": "abc"}, "token_ids: found 'abc'"),
    ({"token_ids": [[1], [2]]}, "token_ids: found"),
    ({"token_ids": [-1, 2]}, "token_ids: found -1..2, expected ids of the vocabulary"),
    ({"token_ids": [1, 2], "loss_mask": [1]}, "loss_mask: found .*, expected 2 zeros and ones"),
    ({"token_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask: found"),
    ({"token_ids": [1, 261]}, "token id 261 is not below the model's vocabulary size 261"),
    (7, "found int, expected a mapping"),
]


@pytest.mark.parametrize("row,message", BAD_ROWS)
def test_bad_rows_are_named_or_skipped_and_counted(row, message):
    with pytest.raises(UserError, match=message) as error:
        build([IDS, row])
    assert str(error.value).startswith("data.jsonl:2: ") and "\n" not in str(error.value)
    report = build([IDS, row, TALK], on_bad_row="skip").report
    assert (report.examples, report.skipped_bad_rows) == (2, 1)


def test_data_sets_without_any_example():
    with pytest.raises(UserError, match="the data set is empty"):
        build([])
    with pytest.raises(
        UserError, match=r"no example is left of 2 rows: 1 longer .* the first without targets is data\.j"
    ):
        build([{"token_ids": [1, 2], "loss_mask": [1, 0]}, {"token_ids": [1] * 70}])


def test_jsonl_errors_name_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(IDS) + "\n\n{broken\n[1]\n")
    found = list(read_jsonl([path]))
    assert found[0] == (f"{path}:1", IDS)
    assert f"{path}:3: not valid JSON" in str(found[1][1]) and f"{path}:4: found list" in str(found[2][1])
    with pytest.raises(UserError, match=r"x\.jsonl:3: not valid JSON"):
        build_dataset(read_jsonl([path]), None, DataConfig(), row_length=9, vocab_size=9)
    with pytest.raises(UserError, match="No such file"):
        list(read_jsonl([tmp_path / "missing.jsonl"]))
    with pytest.raises(UserError, match="Is a directory"):
        list(read_jsonl([tmp_path]))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_jsonl([path]))
    with pytest.raises(UserError, match="without a tokenizer only 'token_ids' rows"):
        tokenize_row(PAIR, None, DataConfig())
    with pytest.raises(UserError, match="names no end-of-sequence token"):
        tokenize_row(PAIR, Tokenizer(byte_tokenizer().pipeline), DataConfig())


def test_tokenised_rows_are_cached_by_everything_that_shapes_them(tmp_path):
    path, cache = tmp_path / "x.jsonl", tmp_path / "cache"
    path.write_text(json.dumps(TALK) + "\n" + json.dumps({"token_ids": [1, 2], "loss_mask": [0, 0]}) + "\n")

    def load(config=None, row_length=64, key="t"):
        options = {"row_length": row_length, "vocab_size": 261, "cache_folder": cache, "cache_key": key}
        return load_dataset([str(path)], byte_tokenizer(), config or DataConfig(), **options)

    first = load()
    assert len(list(cache.iterdir())) == 1
    again = load()
    assert again.digest() == first.digest() and again.report == first.report
    assert first.report.dropped_without_targets == 1
    load(dataclasses.replace(DataConfig(), mask="all"))
    load(row_length=63)
    load(key="another tokenizer")
    assert len(list(cache.iterdir())) == 4
    path.write_text(json.dumps(IDS) + "\n")
    assert load().digest() != first.digest() and len(list(cache.iterdir())) == 5
    for file in cache.iterdir():
        file.write_bytes(b"torn")
    assert len(load()) == 1
    with pytest.raises(UserError, match="No such file"):
        path.unlink()
        load()


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"paths": "x.jsonl"}, "data.paths='x.jsonl': expected a tuple"),
        ({"mask": "user"}, "data.mask='user': expected one of assistant, last_assistant, all"),
        ({"overflow": "cut"}, "data.overflow='cut'"),
        ({"on_bad_row": "ignore"}, "data.on_bad_row='ignore'"),
        ({"window": 0}, "data.window=0: expected at least 1"),
    ],
)
def test_bad_data_configs(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


def test_digest_depends_on_content():
    a, b = (build(examples(5, seed=s)) for s in (1, 2))
    assert a.digest() == build(examples(5, seed=1)).digest() != b.digest()
