"""The tasks of the study: what base stage, demonstrations, prompts and grades they have, behind one protocol.

`RelayTask` carries the study, `CountdownTask` is its control: there the search of the embedded model is perturbed, and
an all-wrong training set must teach a false hit, one verdict at a predictable place.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxstack.models import DecoderConfig
from jaxstack.reasoning import countdown, relay, traces
from jaxstack.reasoning.longcot.perturb import Noise, perturb, random_digits
from jaxstack.reasoning.longcot.steps import keyword_spans, split_steps
from jaxstack.reasoning.tokenizer import BOS, EOS, PAD, RELAY_VOCABULARY, VOCABULARY
from jaxstack.reasoning.traces import END_THINK, THINK
from jaxstack.runtime.errors import UserError
from jaxstack.training import Example

# Samples whose steps `insert` and `replace` draw from. They are none of the demonstrations, and as many for any number
# of those, so that more demonstrations change none.
BANK_SIZE = 256
_BANK_SEED = 1_000_003
_NO_THINKING_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Document:
    """A training text of words separated by one space: `prompt` is shown, `response` is learned."""

    prompt: str
    response: str

    def example(self, ids: dict[str, int]) -> Example:
        """As token ids with a mask; `ids` numbers the words."""
        prompt, response = ([ids[word] for word in text.split(" ") if word] for text in (self.prompt, self.response))
        mask = np.repeat([False, True], [len(prompt), len(response)])
        return Example(np.array(prompt + response, np.int32), mask)


class Problem(Protocol):
    @property
    def content(self) -> str: ...

    @property
    def identity(self) -> Any: ...


class StudyTask(Protocol):
    """What the study asks of a task.

    Attributes:
      name: as flags spell it.
      vocabulary: the words of its tokenizer, in order of their ids.
      no_thinking: whether the model also answers with its thought closed at once.
      seq_len, max_tokens: length of a packed row, and of an answer.
    """

    name: str
    vocabulary: tuple[str, ...]
    no_thinking: bool
    seq_len: int
    max_tokens: int

    def model(self, width: int, layers: int) -> DecoderConfig:
        """The decoder that is trained from scratch, of so many features and layers."""
        ...

    def base_documents(self, count: int, seed: int) -> Iterator[Document]:
        """Texts of the base stage: every local skill, nothing of the chain."""
        ...

    def demonstrations(self, kind: str, fraction: float, count: int, seed: int) -> Iterator[Document]:
        """Texts of the SFT stage, perturbed."""
        ...

    def problems(self, count: int) -> Sequence[Problem]:
        """Held-out problems, the same at every call."""
        ...

    def slip(self, problem: Any) -> str | None:
        """The beginning of a thought whose last step has a wrong result, the same at every call: whether the model
        notices tells if it backtracks. None of every problem where the task has no step that could be repaired.
        """
        ...

    def correct(self, problem: Any, text: str) -> tuple[bool, str]:
        """Whether an answer is right, and why (not)."""
        ...

    def diagnostics(self, problems: Sequence[Any], texts: Sequence[str]) -> dict[str, float | None]:
        """What the thoughts look like, whatever the answers."""
        ...


def task_named(name: str) -> StudyTask:
    """The task of a name.

    Raises:
      UserError: there is none.
    """
    tasks: dict[str, type[RelayTask] | type[CountdownTask]] = {"relay": RelayTask, "countdown": CountdownTask}
    if name not in tasks:
        raise UserError(f"task {name!r} is unknown; expected one of {', '.join(tasks)}")
    return tasks[name]()


def prompt_of(content: str, *, thinking: bool = True) -> str:
    """What the model is shown, as the chat template writes it."""
    return f"{BOS} {content} {THINK}" + ("" if thinking else f" {END_THINK}")


def small_decoder(vocabulary: Sequence[str], width: int, layers: int, *, tied: bool) -> DecoderConfig:
    """A decoder for a word-level task: of width 64 and 3 layers it has about 168,000 parameters."""
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=width // 4,
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=vocabulary.index(BOS),
        eos_token_ids=(vocabulary.index(EOS),),
        pad_token_id=vocabulary.index(PAD),
        initializer_range=width**-0.5,
    )


class RelayTask:
    """`jaxstack.reasoning.relay`: numbers are tokens, and `digits` draws values and counters anew."""

    name = "relay"
    vocabulary: tuple[str, ...] = RELAY_VOCABULARY
    no_thinking = False
    seq_len = 288
    max_tokens = 278

    def model(self, width: int, layers: int) -> DecoderConfig:
        return small_decoder(self.vocabulary, width, layers, tied=False)

    def base_documents(self, count: int, seed: int) -> Iterator[Document]:
        rng = random.Random(f"relay base {seed}")
        for _ in range(count):
            yield self._document(relay.base_trace(rng))

    def demonstrations(self, kind: str, fraction: float, count: int, seed: int) -> Iterator[Document]:
        if kind in relay.WRONG_KINDS:
            for trace in relay.training_traces(count, seed=seed, wrong=kind):  # type: ignore[arg-type]
                yield self._document(trace)
            return
        bank = [split_steps(t.thought) for t in relay.training_traces(BANK_SIZE, seed=seed + _BANK_SEED)]
        for number, trace in enumerate(relay.training_traces(count, seed=seed)):
            thought = _perturbed(trace.thought, kind, fraction, bank, seed, number, relay.random_numbers)
            yield self._document(dataclasses.replace(trace, thought=thought))

    def problems(self, count: int) -> Sequence[relay.RelayProblem]:
        return relay.held_out(count)

    def slip(self, problem: relay.RelayProblem) -> str:
        return relay.slipped_thought(problem, random.Random(f"relay slip {problem.identity}"))

    def correct(self, problem: relay.RelayProblem, text: str) -> tuple[bool, str]:
        verdict = relay.grade(problem, text)
        return verdict.correct, verdict.reason

    def diagnostics(self, problems: Sequence[relay.RelayProblem], texts: Sequence[str]) -> dict[str, float | None]:
        counts = relay.Coherence()
        for text in texts:
            counts.add(text)
        return {
            "right_steps": _share(counts.right, counts.steps),
            "carried_on": _share(counts.carried, counts.transitions),
            "counted_down": _share(counts.counted_down, counts.transitions),
            "keywords_per_sample": _share(counts.keywords, len(texts)),
            "illegal_steps": _share(counts.illegal, counts.paragraphs),
            "repeated_steps": _share(counts.repeated, counts.transitions),
        }

    def _document(self, trace: relay.Trace) -> Document:
        prompt = BOS if trace.problem is None else prompt_of(trace.problem.content)
        return Document(prompt, f"{trace.response} {EOS}" if trace.stops else trace.response)


class CountdownTask:
    """`jaxstack.reasoning.countdown`, three quarters search traces and one quarter direct answers, never perturbed.

    "wrong": the trace claims a false hit strictly before the first true one, so every trace is incorrect.
    """

    name = "countdown"
    vocabulary: tuple[str, ...] = VOCABULARY
    no_thinking = True
    seq_len = 272
    max_tokens = 150

    def model(self, width: int, layers: int) -> DecoderConfig:
        return small_decoder(self.vocabulary, width, layers, tied=True)

    def base_documents(self, count: int, seed: int) -> Iterator[Document]:
        rng = random.Random(f"countdown base {seed}")
        pool = countdown.prompts("train")
        for _ in range(count):
            yield self._document(traces.base_sample(rng.choice(pool), rng))

    def demonstrations(self, kind: str, fraction: float, count: int, seed: int) -> Iterator[Document]:
        pool = countdown.prompts("train")
        deep = [p for p in pool if _solution(p).depth >= 1]
        bank_rng = random.Random(f"countdown bank {seed}")
        bank = [traces.search_steps(bank_rng.choice(pool), bank_rng) for _ in range(BANK_SIZE)]
        for number in range(count):
            rng = random.Random(f"countdown {seed} {number}")
            if rng.random() < _NO_THINKING_SHARE:
                yield self._document(traces.direct_answer(rng.choice(pool)))
                continue
            if kind == "wrong":
                yield self._document(_false_hit(rng.choice(deep), rng))
                continue
            sample = traces.search_trace(rng.choice(pool), rng)
            thought, tag, answer = sample.response.partition(END_THINK)
            thought = _perturbed(thought, kind, fraction, bank, seed, number, _random_words)
            yield self._document(dataclasses.replace(sample, response=f"{thought} {tag}{answer}"))

    def problems(self, count: int) -> Sequence[countdown.Problem]:
        return countdown.held_out(count)

    def slip(self, problem: countdown.Problem) -> None:
        return None  # a search goes on to the next candidate

    def correct(self, problem: countdown.Problem, text: str) -> tuple[bool, str]:
        verdict = countdown.grade(problem, text)
        return verdict.correct, verdict.reason

    def diagnostics(self, problems: Sequence[countdown.Problem], texts: Sequence[str]) -> dict[str, float | None]:
        steps = right = illegal = repeated = keywords = 0
        for problem, text in zip(problems, texts):
            possible = {traces.step_text(c, problem.target) for c in countdown.candidates(problem.numbers)}
            seen: set[str] = set()
            thought = text.partition(END_THINK)[0]
            keywords += len(keyword_spans(thought))
            for step in split_steps(thought):
                bare = step[step.find("try") :] if "try" in step else step
                if not bare.startswith("try"):
                    illegal += not bare.startswith("check")
                    continue
                steps += 1
                right += bare in possible
                repeated += bare in seen
                seen.add(bare)
        return {
            "right_steps": _share(right, steps),
            "keywords_per_sample": _share(keywords, len(texts)),
            "illegal_steps": _share(illegal, steps + illegal),
            "repeated_steps": _share(repeated, steps),
        }

    def _document(self, sample: traces.Sample) -> Document:
        prompt = prompt_of(sample.problem.content, thinking=sample.thinking)
        return Document(prompt, f"{sample.response} {EOS}" if sample.stops else sample.response)


def _perturbed(
    thought: str, kind: str, fraction: float, bank: Sequence[Sequence[str]], seed: int, number: int, noise: Noise
) -> str:
    if kind == "correct":
        return thought
    return perturb(thought, kind, fraction, bank=bank, seed=seed, sample_id=str(number), noise=noise, repair_case=False)


def _random_words(text: str, fraction: float, rng: random.Random) -> str:
    """`random_digits` of numbers that stay words of the vocabulary: without leading zeros."""
    words = (str(int(random_digits(w, fraction, rng))) if w.isdigit() else w for w in text.split(" "))
    return " ".join(words)


def _false_hit(problem: countdown.Problem, rng: random.Random) -> traces.Sample:
    """A search that takes one wrong result, strictly before the first hit, for the target, and answers with it."""
    place = rng.randrange(_solution(problem).depth)
    tried = countdown.candidates(problem.numbers)[: place + 1]
    steps = [
        traces.step_text(c, problem.target, rng.choice(traces.KEYWORDS) if i else None) for i, c in enumerate(tried)
    ]
    leaf, candidate = rng.randrange(3), tried[-1]
    words = steps[-1].split(" ")
    words[words.index(":") + 1 + leaf] = str(problem.target)
    words[-1] = "yes"
    operation = candidate.last_operation(leaf).rpartition(" ")[0]
    steps = [*steps[:-1], " ".join(words), f"check {operation} {problem.target} ok"]
    response = f"{traces.thought_text(steps)} {END_THINK} answer {candidate.expression(leaf)}"
    return traces.Sample(problem, response, thinking=True)


def _solution(problem: countdown.Problem) -> countdown.Solution:
    solution = countdown.solve(problem)
    assert solution is not None  # the prompts of both splits have one
    return solution


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
