"""Training examples: rows of JSONL or Parquet files, or any sequence in memory, to token ids with a loss mask.

A row, in a Parquet file with these names as columns, is one of

    {"messages": [{"role": "user", "content": ...}, ...]}          rendered with the tokenizer's chat template
    {"conversations": [{"from": "human", "value": ...}, ...]}      ShareGPT, with an optional "system"
    {"prompt": str, "response": str}                               the response and an end-of-sequence token are trained
    {"token_ids": [...], "loss_mask": [...]}                       already tokenised; the mask says which tokens are
    targets

Nothing is dropped or cut in silence: `DataReport` counts it, and the counts stand in the job's summary.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jaxstack.models.tokenizer import Tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.training.chat import MaskPolicy, messages_of_sharegpt, render
from jaxstack.training.parquet import files_of, is_parquet, read_parquet


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become rows.

    Attributes:
      paths: JSONL and Parquet files, read in order; a folder stands for the Parquet files in it, by name.
      dataset: name of a data set that the launcher generates into the workdir when `paths` is empty.
      dataset_size: examples to generate.
      eval_paths: files to evaluate on; empty for none.
      mask: which tokens of a conversation are trained.
      overflow: what happens to an example longer than a row: "drop" and "truncate" are counted, "error" stops.
      on_bad_row: "error" stops at a row that is not an example, "skip" counts it.
      packing: several examples in a row; False gives each a row of its own.
      window: examples that are packed together.
      append_eos: prompt/response rows end with the tokenizer's end-of-sequence token.
    """

    paths: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_size: int = 4096
    eval_paths: tuple[str, ...] = ()
    mask: MaskPolicy = "assistant"
    overflow: Literal["drop", "truncate", "error"] = "drop"
    on_bad_row: Literal["error", "skip"] = "error"
    packing: bool = True
    window: int = 4096
    append_eos: bool = True

    def __post_init__(self) -> None:
        for name in ("paths", "eval_paths"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"data.{name}={getattr(self, name)!r}: expected a tuple of paths")
        for name, allowed in (
            ("mask", ("assistant", "last_assistant", "all")),
            ("overflow", ("drop", "truncate", "error")),
            ("on_bad_row", ("error", "skip")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"data.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name in ("window", "dataset_size"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: expected at least 1")


@dataclasses.dataclass(frozen=True)
class Example:
    """One document.

    Attributes:
      token_ids: int32 [n].
      loss_mask: bool [n], true where the token is a target. The first token never is one: nothing precedes it.
    """

    token_ids: Int32[np.ndarray, "n"]
    loss_mask: Bool[np.ndarray, "n"]


@dataclasses.dataclass
class DataReport:
    """What became of the rows."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    dropped_too_long: int = 0
    truncated: int = 0
    dropped_without_targets: int = 0
    skipped_bad_rows: int = 0
    first_bad_row: str | None = None
    first_without_targets: str | None = None

    def as_json(self) -> dict[str, int]:
        return {k: v for k, v in dataclasses.asdict(self).items() if isinstance(v, int)}

    def line(self) -> str:
        """One line for people; names only what happened."""
        parts = [f"{self.examples} examples, {self.tokens} tokens, {self.target_tokens} of them targets"]
        return "; ".join(parts + self.losses())

    def losses(self) -> list[str]:
        """What was lost of the rows, one entry a reason, with its part of them and the first of them where known."""
        reasons = (
            ("dropped as too long", self.dropped_too_long, None),
            ("truncated", self.truncated, None),
            ("dropped without targets", self.dropped_without_targets, self.first_without_targets),
            ("bad rows skipped", self.skipped_bad_rows, self.first_bad_row),
        )
        return [
            f"{count} {what} ({count / self.rows:.1%} of rows{f', the first {first}' if first else ''})"
            for what, count, first in reasons
            if count
        ]


@dataclasses.dataclass(frozen=True)
class TokenizedDataset:
    """Examples end to end in flat arrays: example i is `token_ids[offsets[i]:offsets[i + 1]]`."""

    token_ids: Int32[np.ndarray, "tokens"]
    loss_mask: Bool[np.ndarray, "tokens"]
    offsets: Int64[np.ndarray, "examples+1"]
    report: DataReport

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, "examples"]:
        return np.diff(self.offsets)

    def digest(self) -> str:
        """A short fingerprint of the content: a resumed job must see the same data."""
        state = hashlib.sha256()
        for array in (self.token_ids, self.loss_mask, self.offsets):
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()[:16]


def read_jsonl(paths: Sequence[str | Path]) -> Iterator[tuple[str, Any]]:
    """(`file:line`, row) of every line that is not blank; the row is the `UserError` of a line that is not a JSON
    object.

    Raises:
      UserError: no such file, or it is not UTF-8 text.
    """
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    where = f"{path}:{number}"
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        row = UserError(f"{where}: not valid JSON: {error}; expected one JSON object a line")
                    else:
                        if not isinstance(row, dict):
                            row = UserError(f"{where}: found {type(row).__name__}, expected a JSON object")
                    yield where, row
        except OSError as error:
            raise UserError(f"data file {str(path)!r}: {error.strerror}; expected a JSONL file") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"data file {str(path)!r}: not UTF-8 text ({error.reason}); expected a JSONL file"
            ) from error


def read_rows(paths: Sequence[str | Path]) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row of JSONL and Parquet files, a few rows in memory at a time; as `read_jsonl` and
    `read_parquet`.
    """
    for path in paths:
        yield from read_parquet(path) if is_parquet(path) else read_jsonl([path])


def tokenize_row(row: Mapping[str, Any] | Example, tokenizer: Tokenizer | None, config: DataConfig) -> Example:
    """One row as an example, unlimited in length.

    Raises:
      UserError: the row has none of the known forms, or a field of the wrong type; the message does not say which row.
    """
    if isinstance(row, Example):
        return row
    if "token_ids" in row:
        return _pretokenized(row)
    if tokenizer is None:
        found = ", ".join(map(repr, row))
        raise UserError(f"found the fields {found}; without a tokenizer only 'token_ids' rows can be read")
    if "messages" in row or "conversations" in row:
        name = "messages" if "messages" in row else "conversations"
        if not isinstance(row[name], list) or not row[name]:
            raise UserError(f"{name}: found {_brief(row[name])}, expected a list with at least one message")
        messages = row["messages"] if name == "messages" else messages_of_sharegpt(row)
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                found = _brief(message)
                raise UserError(f"messages[{number}]: found {found}, expected an object with 'role' and 'content'")
            if not isinstance(message.get("content"), str):
                found = _brief(message.get("content"))
                raise UserError(f"messages[{number}].content: found {found}, expected a string")
        variables = row.get("chat_template_kwargs") or {}
        if not isinstance(variables, Mapping):
            raise UserError(f"chat_template_kwargs: found {_brief(variables)}, expected an object")
        return Example(*render(tokenizer, messages, mask=config.mask, **variables))
    if "prompt" in row and "response" in row:
        for name in ("prompt", "response"):
            if not isinstance(row[name], str):
                raise UserError(f"{name}: found {_brief(row[name])}, expected a string")
        prompt = tokenizer.encode(row["prompt"])
        response = tokenizer.encode(row["response"], add_special_tokens=False)
        if config.append_eos:
            if not tokenizer.eos_token_ids:
                raise UserError("the tokenizer names no end-of-sequence token; set data.append_eos=false or name one")
            response = [*response, tokenizer.eos_token_ids[0]]
        trained = np.ones(len(prompt) + len(response), bool)
        trained[: len(prompt)] = config.mask == "all"
        return Example(np.array(prompt + response, np.int32), trained)
    raise UserError(
        f"found the fields {', '.join(map(repr, row)) or 'none'}; expected 'messages', 'conversations', "
        "'prompt' and 'response', or 'token_ids'"
    )


def _pretokenized(row: Mapping[str, Any]) -> Example:
    try:
        ids = np.asarray(row["token_ids"])
        mask = np.ones(len(ids), bool) if row.get("loss_mask") is None else np.asarray(row["loss_mask"])
    except (ValueError, TypeError) as error:
        raise UserError(f"token_ids: found {_brief(row['token_ids'])}, expected a list of integers") from error
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise UserError(f"token_ids: found {_brief(row['token_ids'])}, expected a list of integers")
    if mask.shape != ids.shape or mask.dtype.kind not in "iufb" or not np.isin(mask, (0, 1)).all():
        raise UserError(f"loss_mask: found {_brief(row['loss_mask'])}, expected {len(ids)} zeros and ones")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise UserError(f"token_ids: found {ids.min()}..{ids.max()}, expected ids of the vocabulary")
    return Example(ids.astype(np.int32), mask.astype(bool))


def build_dataset(
    rows: Iterable[tuple[str, Any]],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    *,
    row_length: int,
    vocab_size: int,
) -> TokenizedDataset:
    """Tokenises rows and applies the overflow and mask rules.

    Args:
      rows: (where, row) pairs; `where` names the row in messages. A row may be a mapping, an `Example` or a
        `UserError`.
      row_length: the longest example.
      vocab_size: of the model; larger ids are an error.

    Raises:
      UserError: a bad row (unless skipped), an example too long with overflow="error", no rows, or no example left.
    """
    report = DataReport()
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for where, row in rows:
        report.rows += 1
        try:
            if isinstance(row, UserError):
                raise row
            if not isinstance(row, Mapping | Example):
                raise UserError(f"found {type(row).__name__}, expected a mapping or an Example")
            example = tokenize_row(row, tokenizer, config)
            if len(example.token_ids) and int(example.token_ids.max()) >= vocab_size:
                raise UserError(
                    f"token id {int(example.token_ids.max())} is not below the model's vocabulary size {vocab_size}; "
                    "expected the model's own tokenizer"
                )
        except UserError as error:
            if config.on_bad_row == "skip":
                report.skipped_bad_rows += 1
                found = str(error) if isinstance(row, UserError) else f"{where}: {error}"
                report.first_bad_row = report.first_bad_row or found
                continue
            if isinstance(row, UserError):
                raise
            raise UserError(f"{where}: {error}") from error
        tokens, mask = example.token_ids, example.loss_mask
        if len(tokens) > row_length:
            if config.overflow == "error":
                raise UserError(
                    f"{where}: {len(tokens)} tokens, expected at most seq_len={row_length} (or data.overflow=drop)"
                )
            if config.overflow == "drop":
                report.dropped_too_long += 1
                continue
            report.truncated += 1
            tokens, mask = tokens[:row_length], mask[:row_length]
        if not mask[1:].any():
            report.dropped_without_targets += 1
            report.first_without_targets = report.first_without_targets or where
            continue
        ids.append(tokens)
        masks.append(mask)
    if not report.rows:
        raise UserError("the data set is empty; expected at least one row")
    if not ids:
        first = f"; the first without targets is {report.first_without_targets}" if report.first_without_targets else ""
        raise UserError(
            f"no example is left of {report.rows} rows: {report.dropped_too_long} longer than seq_len={row_length}, "
            f"{report.dropped_without_targets} without a trained token, {report.skipped_bad_rows} bad{first}"
        )
    flat_mask = np.concatenate(masks)
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in ids])]).astype(np.int64)
    flat_mask[offsets[:-1]] = False  # a document's first token has nothing to be predicted from
    report.examples, report.tokens, report.target_tokens = len(ids), int(offsets[-1]), int(flat_mask.sum())
    return TokenizedDataset(np.concatenate(ids).astype(np.int32), flat_mask, offsets, report)


def load_dataset(
    paths: Sequence[str],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    *,
    row_length: int,
    vocab_size: int,
    cache_folder: Path | None = None,
    cache_key: str = "",
) -> TokenizedDataset:
    """`build_dataset` of JSONL and Parquet files, kept in `cache_folder` under a digest of everything that shapes it.

    Args:
      cache_key: what else shapes the result, that is the tokenizer's files.

    Raises:
      UserError: see `read_jsonl`, `read_parquet` and `build_dataset`.
    """
    paths = [file for path in paths for file in files_of(path)]

    def build() -> TokenizedDataset:
        return build_dataset(read_rows(paths), tokenizer, config, row_length=row_length, vocab_size=vocab_size)

    if cache_folder is None:
        return build()
    key = hashlib.sha256()
    for part in (cache_key, config.mask, config.overflow, config.on_bad_row, config.append_eos, row_length, vocab_size):
        key.update(repr(part).encode() + b"\0")
    for path in paths:
        try:
            with open(path, "rb") as file:
                key.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            kind = "Parquet" if is_parquet(path) else "JSONL"
            raise UserError(f"data file {str(path)!r}: {error.strerror}; expected a {kind} file") from error
    file_path = cache_folder / f"{key.hexdigest()[:32]}.npz"
    if (cached := _read_cache(file_path)) is not None:
        return cached
    dataset = build()
    cache_folder.mkdir(parents=True, exist_ok=True)
    temporary = file_path.with_suffix(".tmp")
    with open(temporary, "wb") as out:
        np.savez(
            out,
            token_ids=dataset.token_ids,
            loss_mask=dataset.loss_mask,
            offsets=dataset.offsets,
            report=np.array(json.dumps(dataclasses.asdict(dataset.report))),
        )
    temporary.replace(file_path)
    return dataset


def _read_cache(path: Path) -> TokenizedDataset | None:
    try:
        with np.load(path) as found:
            report = DataReport(**json.loads(str(found["report"])))
            return TokenizedDataset(found["token_ids"], found["loss_mask"], found["offsets"], report)
    except Exception:  # a missing, torn or older file: it is made again
        return None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
