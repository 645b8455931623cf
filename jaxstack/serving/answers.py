"""OpenAI's response objects, whole and in chunks, from the pieces of a generation."""

import dataclasses
import time
import uuid
from collections.abc import Iterable
from typing import Any

from jaxstack.engine import TokenLogprob
from jaxstack.engine.detokenise import IncrementalDetokenizer
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.serving.generation import Piece, Usage
from jaxstack.serving.journal import Journal
from jaxstack.serving.logprobs import CompletionLogprobs, chat_logprobs, join, prompt_logprobs
from jaxstack.serving.message import MessageReader
from jaxstack.serving.prompts import Job
from jaxstack.serving.tools import CallPiece


class Answer:
    """What both endpoints share. One per HTTP request.

    Attributes:
      usage: once the answer is complete.
      journal: for an answer that can go on elsewhere, or comes from there.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, job: Job, tokenizer: Tokenizer | None, model_name: str, journal: Journal | None = None):
        self.job, self._tokenizer, self.journal = job, tokenizer, journal
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        if journal is not None and journal.resumed is not None:
            self.id, self.created = journal.resumed.id, journal.resumed.created
        self._head = {"id": self.id, "created": self.created, "model": model_name}
        options = job.request.stream_options
        self._include_usage = options is not None and options.include_usage
        self.usage: dict[str, Any] | None = None

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> dict[str, Any]:
        """The response object; `pieces` are the choices, each in one piece."""
        choices = [self._whole_choice(piece) for piece in sorted(pieces, key=lambda p: p.choice)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self._usage_json(usage)}

    def replay(self) -> dict[int, Piece]:
        """What has been drawn elsewhere of each choice that is open, its text as far as it was certain."""
        pieces: dict[int, Piece] = {}
        if self.journal is None or self.journal.resumed is None:
            return pieces
        sampling = self.job.sampling
        for choice, drawn in enumerate(self.journal.resumed.choices):
            if drawn.ended or not drawn.token_ids:
                continue
            text = ""
            if self._tokenizer is not None:
                text = IncrementalDetokenizer(
                    self._tokenizer, sampling.stop, sampling.include_stop_str_in_output, sampling.skip_special_tokens
                ).push(drawn.token_ids)
            entries = list(drawn.logprobs)
            if self.job.logprobs is not None and not entries:  # have been shown: only their places matter now
                entries = [TokenLogprob(token, 0.0) for token in drawn.token_ids]
            pieces[choice] = Piece(choice, text, list(drawn.token_ids), entries)
        return pieces

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece."""
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Chunks for one piece; none if there is nothing to show yet."""
        raise NotImplementedError

    def closing(self, usage: Usage) -> list[dict[str, Any]]:
        """The chunk with the usage, if it was asked for."""
        self.usage = self._usage_json(usage)
        if not self._include_usage:
            return []
        return [{**self._head, "object": self.chunk_object, "choices": [], "usage": self.usage}]

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": [choice]}
        # OpenAI's promise: with include_usage every chunk has the field.
        return {**chunk, "usage": None} if self._include_usage else chunk

    def _usage_json(self, usage: Usage) -> dict[str, Any]:
        # Of a prompt alone nothing was asked beyond it.
        generated = 0 if self.job.prompt_only else usage.completion_tokens
        return dataclasses.replace(usage, completion_tokens=generated).as_json()

    def _prompt_logprobs(self, piece: Piece) -> list[dict[str, Any] | None]:
        return prompt_logprobs(self._tokenizer, piece.prompt_logprobs or (), self.job.request.prompt_logprobs or 0)

    def _extras(self, piece: Piece) -> dict[str, Any]:
        """Fields that OpenAI does not have: vLLM's, and our own mark of an answer cut by its deadline."""
        extras: dict[str, Any] = {}
        if self.job.request.return_token_ids:
            extras["token_ids"] = [] if self.job.prompt_only else piece.token_ids
        if piece.finish_reason is not None:
            extras["stop_reason"] = piece.stop_reason
            if piece.timed_out:
                extras["timeout"] = True
        return extras


class CompletionAnswer(Answer):
    """`text_completion`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, job: Job, tokenizer: Tokenizer | None, model_name: str, journal: Journal | None = None):
        super().__init__(job, tokenizer, model_name, journal)
        self._lists: dict[int, CompletionLogprobs] = {}
        self._begun: set[int] = set()

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece)

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        choice = self._choice(piece)
        shown = choice["text"] or piece.logprobs or piece.finish_reason or self.job.request.return_token_ids
        return [self._chunk(choice)] if shown else []

    def _choice(self, piece: Piece) -> dict[str, Any]:
        job, which = self.job, piece.choice // self.job.sampling.n
        first = piece.choice not in self._begun
        self._begun.add(piece.choice)
        text = "" if job.prompt_only else piece.text
        logprobs = None
        if job.logprobs is not None:
            lists = self._lists.get(piece.choice)
            if lists is None:
                skip = job.sampling.skip_special_tokens
                lists = self._lists[piece.choice] = CompletionLogprobs(self._tokenizer, job.logprobs, skip)
            before = None
            if first and job.echo is not None:
                before = lists.echo(job.echo[which], job.prompts[which], piece.prompt_logprobs)
            entries = [] if job.prompt_only else piece.logprobs
            logprobs = lists.lists([entry.token_id for entry in entries], entries)
            logprobs = logprobs if before is None else join(before, logprobs)
        if first and job.echo is not None:
            text = job.echo[which] + text
        choice = {
            "index": piece.choice,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if job.prompt_only and piece.finish_reason == "stop" else piece.finish_reason,
            **self._extras(piece),
        }
        if first and job.request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(piece)
        return choice


class ChatAnswer(Answer):
    """`chat.completion` and `chat.completion.chunk`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, job: Job, tokenizer: Tokenizer | None, model_name: str, journal: Journal | None = None):
        super().__init__(job, tokenizer, model_name, journal)
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

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> dict[str, Any]:
        pieces = list(pieces)
        answer = super().whole(pieces, usage)
        if self.job.request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(pieces[0])
        return answer

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
        return None if self.job.logprobs is None else chat_logprobs(self._tokenizer, piece.logprobs)


def _call_json(call: CallPiece, *, whole: bool = False) -> dict[str, Any]:
    """A call, or a part of one; only parts are numbered."""
    head: dict[str, Any] = {} if whole else {"index": call.index}
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is not None:
        head |= {"id": call.id, "type": "function"}
        function = {"name": call.name, **function}
    return {**head, "function": function}
