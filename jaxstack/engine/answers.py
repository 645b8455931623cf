"""Open requests, and what becomes of the tokens drawn for them: text, stop rules, the listener, the last account."""

import collections
import dataclasses
import heapq
import logging
import time
from collections.abc import Callable, Iterable

from jaxstack.engine.detokenise import IncrementalDetokenizer
from jaxstack.engine.listeners import Collector
from jaxstack.engine.request import Completion, Delta, FinishReason, Request, RequestTiming, Sequence, TokenLogprob
from jaxstack.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Answers:
    """Every request from the moment it is let in until its last choice has ended. Used by one thread at a time.

    Args:
      tokenizer: makes the text; None for token ids alone.
      eos: the token ids that end an answer.
      leave: told of each sequence that has ended, once its `finish_reason` is set: gives back what it holds.

    Attributes:
      eos: as given.
      live: the open requests' sequences, by request id.
      weights_version: given with every piece.
      finished: how many requests ended, by reason.
      corrupted: requests of which a row of logits was not finite.
    """

    def __init__(self, tokenizer: Tokenizer | None, eos: Iterable[int], leave: Callable[[Sequence], None]):
        self.weights_version = 0
        self.live: dict[str, list[Sequence]] = {}
        self.finished: collections.Counter[str] = collections.Counter()
        self.prompt_tokens = self.generation_tokens = self.corrupted = 0
        self.on_finish: list[Callable[[RequestTiming], None]] = []
        self._deadlines: list[tuple[float, int, Request]] = []
        self._held: dict[str, list[Completion]] = {}
        self.eos = frozenset(eos)
        self._tokenizer, self._leave = tokenizer, leave

    def open(self, request: Request) -> list[Sequence]:
        """Lets a request in: one sequence for each of its choices, with what another engine has drawn of it: rules that
        look at the tokens before, and text that is held back, go on where they were.
        """
        if isinstance(request.listener, Collector):
            request.listener.request = request
        sequences = []
        for index, begun in request.begun.items():
            matcher = request.grammar.matcher() if request.grammar is not None else None
            detokenizer = self._detokenizer(request)
            if detokenizer is not None:
                detokenizer.push(begun)
            if matcher is not None:
                for token in begun:
                    matcher.consume(token)
            sequences.append(Sequence(request, index, [*request.prompt, *begun], detokenizer, matcher=matcher))
        self.live[request.request_id] = sequences
        if request.ranked:
            self._held[request.request_id] = [Completion(index) for index in range(request.choices)]
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.order, request))
        self.prompt_tokens += len(request.prompt)
        return sequences

    def take(self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprob, ...], now: float) -> None:
        """A token was drawn for `sequence`: keep it, apply the stop rules, tell the listener.

        Args:
          token: -1 if the logits were not finite, -2 if the request's rules left nothing to draw: this answer is lost,
            the others are not.
        """
        request, sampling = sequence.request, sequence.request.sampling
        if token < 0:
            self.corrupted += token == -1
            self._end(sequence, "error", None, "", (), ())
            return
        sequence.tokens.append(token)
        request.token_times.append(now)
        sequence.cumulative_logprob += sum(entry.logprob for entry in logprobs)
        if sampling.logprobs is None:
            logprobs = ()
        self.generation_tokens += 1
        if request.first_token_s is None:
            request.first_token_s = now
        reason: FinishReason | None = None
        why: int | str | None = None
        shown: tuple[int, ...] = (token,)
        if token in sampling.stop_token_ids:
            reason, why, shown = "stop", token, ()
        elif token in self.eos and not sampling.ignore_eos:
            reason, shown = "stop", ()
        text = ""
        if sequence.detokenizer is not None:
            text = sequence.detokenizer.push(shown) if shown else ""
            if reason is None and sequence.detokenizer.stopped is not None:
                reason, why = "stop", sequence.detokenizer.stopped
        if reason is None and sequence.matcher is not None:
            if not sequence.matcher.consume(token):
                reason = "error"
            elif sequence.matcher.finished:
                reason = "stop"
        if reason is None and sequence.generated >= request.max_tokens:
            reason = "length"
        if reason is not None:
            if sequence.detokenizer is not None:
                text += sequence.detokenizer.finish()
            self._end(sequence, reason, why, text, (token,), logprobs)
        else:
            self._tell(sequence, Delta(sequence.index, text, (token,), logprobs, None, None, *_counts(request)))

    def end_request(self, request_id: str, reason: FinishReason) -> None:
        """Ends every open choice of a request; unknown ids are none of anybody's business any more."""
        for sequence in list(self.live.get(request_id, ())):
            if sequence.finish_reason is None:
                text = sequence.detokenizer.finish() if sequence.detokenizer else ""
                self._end(sequence, reason, None, text, (), ())

    def expire(self, now: float) -> None:
        """Ends the requests whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if request.unfinished:
                self.end_request(request.request_id, "timeout")

    # Inside.

    def _detokenizer(self, request: Request) -> IncrementalDetokenizer | None:
        if self._tokenizer is None:
            return None
        sampling = request.sampling
        return IncrementalDetokenizer(
            self._tokenizer, sampling.stop, sampling.include_stop_str_in_output, sampling.skip_special_tokens
        )

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        why: int | str | None,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
    ) -> None:
        request = sequence.request
        sequence.finish_reason = reason
        self._leave(sequence)
        request.unfinished -= 1
        self._tell(sequence, Delta(sequence.index, text, token_ids, logprobs, reason, why, *_counts(request)))
        if request.unfinished == 0:
            siblings = self.live.pop(request.request_id)
            if request.ranked:
                self._give_best(siblings)
            self.finished[reason] += 1
            timing = _timing(request, siblings, reason)
            for callback in self.on_finish:
                callback(timing)

    def _give_best(self, sequences: list[Sequence]) -> None:
        """Tells the listener of the choices with the highest sum of logprobs, best first; each is one piece."""
        request = sequences[0].request
        held = self._held.pop(request.request_id)
        ranking = sorted(sequences, key=lambda s: (s.finish_reason == "error", -s.cumulative_logprob, s.index))
        kept = [held[s.index] for s in ranking[: request.sampling.n]]
        discarded = sum(s.generated for s in ranking[request.sampling.n :])
        for index, c in enumerate(kept):
            ends = (c.finish_reason, c.stop_reason, *_counts(request), discarded if index == 0 else 0)
            self._send(request, Delta(index, c.text, tuple(c.token_ids), tuple(c.logprobs or ()), *ends))

    def _tell(self, sequence: Sequence, delta: Delta) -> None:
        if sequence.request.ranked:
            self._held[sequence.request_id][delta.index].add(delta)
        else:
            self._send(sequence.request, delta)

    def _send(self, request: Request, delta: Delta) -> None:
        listener, scores = request.listener, request.scores
        if scores is not None and delta.index == 0 and scores.complete:
            request.scores = None  # the first piece carries them
            delta = dataclasses.replace(delta, prompt_logprobs=scores.entries())
        if listener is None:
            return
        if self.weights_version:
            delta = dataclasses.replace(delta, weights_version=self.weights_version)
        try:
            listener(delta)
        except Exception:
            log.exception("the listener of %s failed", request.request_id)


def _counts(request: Request) -> tuple[int, int]:
    return len(request.prompt), request.cached_tokens or 0


def _timing(request: Request, sequences: list[Sequence], reason: FinishReason) -> RequestTiming:
    now = time.perf_counter()
    return RequestTiming(
        arrival_s=request.arrival_s,
        scheduled_s=request.scheduled_s or now,
        first_token_s=request.first_token_s or now,
        finished_s=now,
        prompt_tokens=len(request.prompt),
        generation_tokens=sum(s.generated for s in sequences),
        cached_tokens=request.cached_tokens or 0,
        finish_reason=reason,
        n=request.sampling.n,
        max_tokens=request.sampling.max_tokens,
        token_times=tuple(request.token_times),
    )
