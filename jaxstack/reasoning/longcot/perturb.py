"""Perturbed thoughts: what is wrong with their content, or with their structure (arXiv 2502.07374, section 4).

    digits      content     each digit character becomes a uniform random digit, with probability `fraction`
    keywords    content     each sentence that holds a keyword loses it, with probability `fraction`
    shuffle     structure   k = round(fraction * steps) places are chosen and their contents permuted
    delete      structure   k steps are dropped
    insert      structure   k steps of other samples are put in at uniform places
    replace     structure   k steps give way to steps of other samples: as `insert`, at the same length

The seventh kind of the paper, wrong answers, is a choice of samples and no change to one. Only the thought changes: the
solution behind it stays, byte for byte. Randomness is keyed by (seed, sample, kind), so more samples never change the
others.
"""

import random
import re
from collections.abc import Callable, Sequence

from jaxstack.reasoning.longcot.steps import (
    Splitter,
    join_steps,
    keyword_spans,
    sentences,
    split_response,
    split_steps,
)
from jaxstack.runtime.errors import UserError

Noise = Callable[[str, float, random.Random], str]
"""(text, fraction, generator) -> the text with that share of its numbers replaced."""

KINDS = ("digits", "keywords", "shuffle", "delete", "insert", "replace")
_NEEDS_BANK = ("insert", "replace")
# A keyword's own punctuation goes with it: "Wait, so" becomes "So".
_AFTER_KEYWORD = re.compile(r"\s*(?:,|\.\.\.|…|:|—|-(?=\s))?[^\S\n]*")


def random_digits(text: str, fraction: float, rng: random.Random) -> str:
    """Each ASCII digit becomes a uniform random digit with probability `fraction`."""
    return re.sub(r"[0-9]", lambda found: rng.choice("0123456789") if rng.random() < fraction else found[0], text)


def without_keywords(text: str, fraction: float, rng: random.Random, *, repair_case: bool = True) -> str:
    """Each sentence that holds keywords loses them all with probability `fraction`; a sentence of nothing else goes.

    Args:
      repair_case: what follows a capitalised keyword at a sentence's start is capitalised in its stead. False where
        words are tokens, and a capital would make another one.
    """
    kept = []
    for sentence in sentences(text):
        if keyword_spans(sentence) and rng.random() < fraction:
            sentence = _strip_keywords(sentence, repair_case)
        kept.append(sentence)
    return "".join(kept)


def perturb(
    thought: str,
    kind: str,
    fraction: float,
    *,
    bank: Sequence[Sequence[str]] = (),
    seed: int,
    sample_id: str,
    splitter: Splitter = "paragraph",
    noise: Noise = random_digits,
    repair_case: bool = True,
) -> str:
    """A perturbed thought; the thought itself where `fraction` times its steps rounds to none.

    Args:
      thought: the text between the tags; see `perturb_response` for a whole response.
      kind: one of `KINDS`.
      fraction: of steps, sentences or numbers, in [0, 1].
      bank: the steps of samples, for `insert` and `replace`: a sample is drawn, then one of its steps. Samples with
        the very steps of this one are passed over.
      seed, sample_id: the key of the randomness, together with the kind.
      splitter: what a step is.
      noise: what `digits` does, for texts whose numbers are not digits.
      repair_case: see `without_keywords`.

    Raises:
      UserError: unknown kind, a fraction outside [0, 1], a thought without steps, or no other sample in the bank.
    """
    if kind not in KINDS:
        raise UserError(f"perturbation {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    if not 0 <= fraction <= 1:  # also refuses nan
        raise UserError(f"perturbation {kind}: fraction is {fraction}, expected 0 to 1")
    steps = split_steps(thought, splitter=splitter)
    if not steps:
        raise UserError(f"perturbation {kind}: sample {sample_id} has no steps in its thought, expected at least one")
    others: list[Sequence[str]] = []
    if kind in _NEEDS_BANK:
        others = [sample for sample in bank if sample and list(sample) != steps]
        if not others:
            raise UserError(
                f"perturbation {kind}: the bank of {len(bank)} samples has none but sample {sample_id} itself, "
                "expected another one"
            )
    count = int(fraction * len(steps) + 0.5)
    rng = random.Random(f"{seed} {sample_id} {kind}")
    if kind == "digits":
        return noise(thought, fraction, rng)
    if kind == "keywords":
        changed = [without_keywords(step, fraction, rng, repair_case=repair_case).strip() for step in steps]
        changed = [step for step in changed if step]
    elif count == 0:
        return thought
    else:
        changed = _restructured(steps, kind, count, others, rng)
    return thought if changed == steps else join_steps(changed, like=thought, splitter=splitter)


def perturb_response(
    response: str,
    kind: str,
    fraction: float,
    *,
    bank: Sequence[Sequence[str]] = (),
    seed: int,
    sample_id: str,
    end: str = "</think>",
    splitter: Splitter = "paragraph",
    noise: Noise = random_digits,
    repair_case: bool = True,
) -> str:
    """`perturb` of a response's thought; its solution, from the tag `end` on, stays as it is.

    Raises:
      UserError: as `perturb` and `split_response`.
    """
    thought, solution = split_response(response, end=end)
    options = {"splitter": splitter, "noise": noise, "repair_case": repair_case}
    return perturb(thought, kind, fraction, bank=bank, seed=seed, sample_id=sample_id, **options) + solution  # type: ignore[arg-type]


def _restructured(
    steps: list[str], kind: str, count: int, others: Sequence[Sequence[str]], rng: random.Random
) -> list[str]:
    places = sorted(rng.sample(range(len(steps)), count))
    changed = list(steps)
    if kind == "delete":
        dropped = set(places)
        return [step for place, step in enumerate(steps) if place not in dropped]
    if kind == "shuffle":
        order = list(places)
        while count > 1 and order == places:
            rng.shuffle(order)
        for place, source in zip(places, order):
            changed[place] = steps[source]
        return changed
    foreign = [rng.choice(rng.choice(others)) for _ in places]
    if kind == "replace":
        for place, step in zip(places, foreign):
            changed[place] = step
        return changed
    for step in foreign:
        changed.insert(rng.randint(0, len(changed)), step)
    return changed


def _strip_keywords(sentence: str, repair_case: bool) -> str:
    """The sentence without its keywords and their punctuation; "" where nothing but punctuation is left."""
    body = sentence.rstrip()
    tail = sentence[len(body) :]
    opens_high = body[:1].isupper()
    while spans := keyword_spans(body):  # again, for a removal may bring two halves together
        begin, end = spans[0]
        end = _AFTER_KEYWORD.match(body, end).end()  # type: ignore[union-attr]
        before, after = body[:begin], body[end:]
        if before.rstrip().endswith(",") and (not after or after[0] in ".!?,;"):
            before = before.rstrip().removesuffix(",")
        if before and after and after[0] in ".!?,;":
            before = before.rstrip()
        elif before and after and not before[-1].isspace():
            before += " "
        body = before + after
    if not re.search(r"[^\s.!?,;:…]", body):
        return ""
    if repair_case and opens_high and body[:1].islower():
        body = body[0].upper() + body[1:]
    return body + tail
