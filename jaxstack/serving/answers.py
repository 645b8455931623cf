"""OpenAI's response objects, whole and in chunks, from the pieces of a generation."""

import time
import uuid
from collections.abc import Iterable
from typing import Any

from jaxstack.engine import TokenLogprob
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.serving.generation import Piece, Usage
from jaxstack.serving.message import MessageReader
from jaxstack.serving.prompts import Job
from jaxstack.serving.tools import CallPiece


class Answer:
    """What both endpoints share. One per HTTP request."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, job: Job, tokenizer: Tokenizer | None, model_name: str):
        self.job, self._tokenizer = job, tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model_name}
        options = job.request.stream_options
        self._include_usage = options is not None and options.include_usage

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> dict[str, Any]:
        """The response object; `pieces` are the choices, each in one piece."""
        choices = [self._whole_choice(piece) for piece in sorted(pieces, key=lambda p: p.choice)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage.as_json()}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece."""
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Chunks for one piece; none if there is nothing to show yet."""
        raise NotImplementedError

    def closing(self, usage: Usage) -> list[dict[str, Any]]:
        """The chunk with the usage, if it was asked for."""
        if not self._include_usage:
            return []
        return [{**self._head, "object": self.chunk_object, "choices": [], "usage": usage.as_json()}]

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": [choice]}
        # OpenAI's promise: with include_usage every chunk has the field.
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _extras(self, piece: Piece) -> dict[str, Any]:
        """Fields that OpenAI does not have: vLLM's, and our own mark of an answer cut by its deadline."""
        extras: dict[str, Any] = {}
        if self.job.request.return_token_ids:
            extras["token_ids"] = piece.token_ids
        if piece.finish_reason is not None:
            extras["stop_reason"] = piece.stop_reason
            if piece.timed_out:
                extras["timeout"] = True
        return extras

    def _token_text(self, token_id: int) -> str:
        """A token as text; one that is not whole characters as `bytes:\\xe2\\x82`, as OpenAI writes them."""
        raw = self._token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _token_bytes(self, token_id: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)


class CompletionAnswer(Answer):
    """`text_completion`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, job: Job, tokenizer: Tokenizer | None, model_name: str):
        super().__init__(job, tokenizer, model_name)
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "text": self._echo(piece.choice) + piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            **self._extras(piece),
        }

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        text = piece.text
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            text = self._echo(piece.choice) + text
        if not (text or piece.logprobs or piece.finish_reason or self.job.request.return_token_ids):
            return []
        choice = {
            "index": piece.choice,
            "text": text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            **self._extras(piece),
        }
        return [self._chunk(choice)]

    def _echo(self, choice: int) -> str:
        return "" if self.job.echo is None else self.job.echo[choice // self.job.sampling.n]

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """The parallel lists of the older format. `text_offset` counts characters of the tokens before."""
        if self.job.sampling.logprobs is None:
            return None
        tokens = [self._token_text(entry.token_id) for entry in piece.logprobs]
        offset, offsets = self._offsets.get(piece.choice, 0), []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[piece.choice] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [finite(entry.logprob) for entry in piece.logprobs],
            "top_logprobs": [self._alternatives(entry) for entry in piece.logprobs],
            "text_offset": offsets,
        }

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        # Of two tokens with one spelling the likelier stays; the chosen one is always there.
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            found.setdefault(self._token_text(token_id), finite(logprob))
        return found


class ChatAnswer(Answer):
    """`chat.completion` and `chat.completion.chunk`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, job: Job, tokenizer: Tokenizer | None, model_name: str):
        super().__init__(job, tokenizer, model_name)
        self._readers = [MessageReader(job.reading) for _ in range(job.sampling.n)]

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        reader = self._readers[piece.choice]
        part = reader.push(piece.text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": part.content, "refusal": None}
        if self.job.reading.thinking is not None and self.job.reading.show_thinking:
            message["reasoning_content"] = part.reasoning or None
        if part.calls:
            message["content"] = part.content or None
            message["tool_calls"] = [_call_json(call, whole=True) for call in part.calls]
        return {
            "index": piece.choice,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": self._finish_reason(piece),
            **self._extras(piece),
        }

    def opening(self) -> list[dict[str, Any]]:
        return [
            self._delta(choice, {"role": "assistant", "content": "", "refusal": None})
            for choice in range(self.job.sampling.n)
        ]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        part = self._readers[piece.choice].push(piece.text, last=piece.finish_reason is not None)
        deltas: list[dict[str, Any]] = []
        if part.reasoning:
            deltas.append({"reasoning_content": part.reasoning})
        if part.content:
            deltas.append({"content": part.content})
        if part.calls:
            deltas.append({"tool_calls": [_call_json(call) for call in part.calls]})
        if not deltas and (piece.logprobs or self.job.request.return_token_ids):
            deltas.append({"content": ""})
        chunks = []
        for number, delta in enumerate(deltas):
            # What is said of the tokens goes with the first.
            logprobs = None if number else self._logprobs(piece)
            extras = {"token_ids": piece.token_ids} if self.job.request.return_token_ids and not number else {}
            chunks.append(self._delta(piece.choice, delta, logprobs, **extras))
        if piece.finish_reason is not None:
            extras = {name: value for name, value in self._extras(piece).items() if name != "token_ids"}
            chunks.append(
                self._delta(piece.choice, {}, None, **{"finish_reason": self._finish_reason(piece), **extras})
            )
        return chunks

    def _finish_reason(self, piece: Piece) -> str | None:
        called = self._readers[piece.choice].calls > 0
        return "tool_calls" if called and piece.finish_reason == "stop" else piece.finish_reason

    def _delta(
        self, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, **extras: Any
    ) -> dict[str, Any]:
        return self._chunk({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": None, **extras})

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self.job.sampling.logprobs is None:
            return None
        content = [
            {
                **self._entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in entry.top],
            }
            for entry in piece.logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def _call_json(call: CallPiece, *, whole: bool = False) -> dict[str, Any]:
    """A call, or a part of one; only parts are numbered."""
    head: dict[str, Any] = {} if whole else {"index": call.index}
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is not None:
        head |= {"id": call.id, "type": "function"}
        function = {"name": call.name, **function}
    return {**head, "function": function}


def finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI writes -9999 for "practically never"."""
    return max(logprob, -9999.0)
