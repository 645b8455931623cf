"""Answers that follow a grammar: compiling grammars, and following one token by token.

llguidance does the parsing. `GrammarCompiler` turns a `Guide` into a `Grammar`, on a thread of its own and once for
equal guides; each sequence gets a `Matcher` from it, which is told every token drawn and says which may come next;
`MaskFiller` writes that down as bits for the sampler, for all guided rows of a step at once and on several cores.

The grammar speaks of the text that the reader of the answer sees. So a token stands for what it adds to a text, and
where a tokenizer drops the blank before the first word (`jaxstack.engine.detokenise` says when), so does the grammar.
"""

import concurrent.futures
import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import llguidance
import llguidance.numpy
import numpy as np
from jaxtyping import Int32

from jaxstack.engine.request import Guide
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.runtime.errors import UserError

# What one grammar may cost: symbols of its productions, and work on its regular expressions (about 50,000 a
# millisecond when it is compiled, 14,000 for each token).
_LIMITS = llguidance.LLParserLimits(
    max_grammar_size=500_000, initial_lexer_fuel=5_000_000, step_lexer_fuel=500_000, verbose_errors=False
)


class Matcher:
    """Follows one answer through its grammar. `words` is how many int32 its masks take, of which the model's tokens may
    be the first part.
    """

    def __init__(self, state: llguidance.LLMatcher, words: int):
        self.state, self.words = state, words

    def consume(self, token: int) -> bool:
        """Takes the next token. False if the grammar does not allow it, now and for ever after."""
        return self.state.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether nothing can follow any more."""
        return self.state.is_stopped()

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        return self.state.is_accepting()

    def valid_prefix(self, tokens: Seq[int]) -> int:
        """How many of `tokens`, from the first on, could come next; nothing is taken."""
        return self.state.validate_tokens(list(tokens))


class Grammar:
    """A compiled guide. `matcher()` gives one at its beginning."""

    def __init__(self, state: llguidance.LLMatcher, words: int):
        self._state, self._words = state, words

    def matcher(self) -> Matcher:
        return Matcher(self._state.deep_copy(), self._words)


class MaskFiller:
    """Writes the tokens that matchers allow next as bits: token t is bit t % 32 of word t // 32."""

    def __init__(self):
        self._threads: llguidance.LLExecutor | None = None

    def fill(self, masks: Int32[np.ndarray, "rows words"], matchers: Seq[tuple[Matcher, int]]) -> None:
        """Row `row` of `masks` for each pair (matcher, row). Bits beyond the vocabulary are not set."""
        if not matchers:
            return
        if self._threads is None:
            self._threads = llguidance.LLExecutor()
        width = matchers[0][0].words
        wide = masks if width == masks.shape[1] else np.zeros((masks.shape[0], width), np.int32)
        llguidance.numpy.fill_next_token_bitmask_par(self._threads, [(m.state, row) for m, row in matchers], wide)
        if wide is not masks:
            masks[:] = wide[:, : masks.shape[1]]


class GrammarCompiler:
    """Compiles guides for one model. Safe to use from any thread; blocks the one that asks.

    Args:
      tokenizer: the model's, or None: then there is no guided decoding.
      eos: the token ids that end an answer; allowed where the grammar may end.
      vocab: columns of the logits.
      capacity: grammars kept.
      timeout_s: how long to wait for one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos: Iterable[int],
        vocab: int,
        *,
        capacity: int = 128,
        timeout_s: float = 30.0,
    ):
        self._tokenizer, self._eos, self._vocab = tokenizer, sorted(set(eos)), vocab
        self._capacity, self._timeout_s = capacity, timeout_s
        self._known: OrderedDict[Guide, concurrent.futures.Future[Grammar]] = OrderedDict()
        self._lock = threading.Lock()
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None

    def compile(self, guide: Guide) -> Grammar:
        """The grammar of `guide`.

        Raises:
          UserError: it does not compile (with the reason), takes too long, or no answer of this model can follow it.
        """
        with self._lock:
            future = self._known.get(guide)
            if future is None:
                if self._thread is None:
                    self._thread = concurrent.futures.ThreadPoolExecutor(1, "grammars")
                future = self._known[guide] = self._thread.submit(self._compile, guide)
                if len(self._known) > self._capacity:
                    self._known.popitem(last=False)
            self._known.move_to_end(guide)
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            raise UserError(
                f"{guide.kind}: found a grammar that took more than {self._timeout_s:g} s to compile, "
                "expected a simpler one"
            ) from None

    def _compile(self, guide: Guide) -> Grammar:
        vocabulary = self._vocabulary
        try:
            source = _source(guide)
        except ValueError as error:
            raise UserError(f"{guide.kind}: {error}") from None
        if vocabulary.blank_first:
            source = _after(vocabulary.blank_first, source)
        state = llguidance.LLMatcher(vocabulary.tokenizer, source, limits=_LIMITS, log_level=0)
        if state.is_error():
            message = " ".join(state.get_error().split())
            raise UserError(f"{guide.kind}: {message[:300] or 'this grammar cannot be compiled'}")
        grammar = Grammar(state, _words(len(vocabulary.tokens)))
        masks = np.zeros((1, _words(self._vocab)), np.int32)
        MaskFiller().fill(masks, [(grammar.matcher(), 0)])
        if not masks.any():
            raise UserError(f"{guide.kind}: no token of this model can begin an answer that follows the grammar")
        return grammar

    @functools.cached_property
    def _vocabulary(self) -> "_Vocabulary":
        if self._tokenizer is None:
            raise UserError("guide: found a grammar, but this engine has no tokenizer, which it needs")
        if not self._eos:
            raise UserError("guide: found a grammar, but this model has no end token, which it needs")
        return _Vocabulary(self._tokenizer, self._eos, self._vocab)


class _Vocabulary:
    """The model's tokens as llguidance sees them.

    It takes text that the grammar forces and asks how it is written in tokens; so every text must be writable. Bytes
    that are no token get one of their own here, beyond the model's: a mask may name them, the model never sees them.

    Attributes:
      tokenizer: llguidance's.
      blank_first: what the text of an answer's first token begins with and the reader does not see, as a Lark
        expression; empty if there is no such thing.
    """

    def __init__(self, tokenizer: Tokenizer, eos: Seq[int], vocab: int):
        special = {*tokenizer.special_ids, *eos}
        texts = [tokenizer.token_bytes(i) if i < tokenizer.vocab_size else b"" for i in range(vocab)]
        self.blank_first = ""
        if not tokenizer.joins_bytes:
            begins = {i for i, text in enumerate(texts) if text.startswith(b" ") and i not in special}
            drops = {i for i in begins if _alone(tokenizer, i) == texts[i][1:]}
            if drops:
                others = any(text and i not in begins and i not in special for i, text in enumerate(texts))
                self.blank_first = '" "?' if others else '" "'
                # Written first, these would show the blank that the grammar takes for dropped.
                texts = [b"" if i in begins - drops else text for i, text in enumerate(texts)]
        plain = {text: i for i, text in reversed(list(enumerate(texts))) if text and i not in special}
        for byte in range(256):
            if bytes((byte,)) not in plain:
                plain[bytes((byte,))] = len(texts)
                texts.append(bytes((byte,)))
        self._source, self._texts, self._plain = tokenizer, texts, plain
        self._longest = max(map(len, plain))
        self.eos_token_id, self.bos_token_id = eos[0], None
        self.tokens, self.special_token_ids = texts, sorted(special)
        self.tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(self), n_vocab=len(texts), eos_token=list(eos)
        )

    def __call__(self, text: bytes) -> list[int]:
        """`text` in tokens: as the model's tokenizer writes it, unless that adds or drops something."""
        try:
            ids = self._source.encode(text.decode(), add_special_tokens=False)
        except (UnicodeDecodeError, UserError):
            ids = []
        if ids and b"".join(self._texts[i] for i in ids) == text:
            return ids
        ids, at = [], 0
        while at < len(text):
            length = next(n for n in range(self._longest, 0, -1) if text[at : at + n] in self._plain)
            ids.append(self._plain[text[at : at + length]])
            at += len(self._texts[ids[-1]])
        return ids


def _alone(tokenizer: Tokenizer, token: int) -> bytes:
    """What a text that consists of `token` shows."""
    if tokenizer.is_raw_byte(token):
        return tokenizer.token_bytes(token)
    return tokenizer.decode([token], skip_special_tokens=False).encode()


def _source(guide: Guide) -> str:
    """What llguidance reads, from what the user wrote."""
    if guide.kind == "json_object":
        return llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}')
    if guide.kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(guide.text)
    if guide.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(guide.text)
    if guide.kind == "lark":
        if guide.text.lstrip().startswith("{"):
            raise ValueError("found a text that begins with '{', expected a grammar in Lark's notation")
        return llguidance.LLMatcher.grammar_from_lark(guide.text)
    # By code points: every character then means itself, to the notation of grammars as well.
    strings = dict.fromkeys(json.loads(guide.text))
    pattern = "|".join("".join(f"\\x{{{ord(character):x}}}" for character in string) for string in strings)
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def _after(first: str, source: str) -> str:
    """The grammar `source` after the Lark expression `first`."""
    if source.lstrip().startswith("{"):
        rest = json.loads(source)["grammars"]
    else:
        rest = [{"lark_grammar": source}]
    assert len(rest) == 1
    return json.dumps({"grammars": [{"lark_grammar": f"start: {first} @answer"}, {**rest[0], "name": "answer"}]})


def _words(tokens: int) -> int:
    return -(-tokens // 32)
