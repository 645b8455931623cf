"""Builds the word-level tokenizer of the embedded models: one id a word, words separated by one space.

The folder it writes opens with `jaxstack.models.tokenizer.load_tokenizer`, with the `tokenizers` library and with
transformers. encode(decode(ids)) == ids for every sequence of ids, the blank line included: the pre-tokeniser splits at
single spaces only, so "\\n\\n" survives as a word, and decoding joins words by one space.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from jaxstack.reasoning import relay
from jaxstack.reasoning.traces import BLANK_LINE, END_THINK, KEYWORDS, THINK

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN)
_WORDS = (
    *("numbers", "target", "try", "=", "&", ":", "goal", "no", "yes", "check", "ok", "(", ")", "+", "-", "*"),
    *(BLANK_LINE, *KEYWORDS, ",", "answer", "big"),
)
_SPARE = ("<spare_0>", "<spare_1>")
VOCABULARY = (*SPECIAL, THINK, END_THINK, *_WORDS, *_SPARE, *(str(value) for value in range(100)))
"""Countdown's words, in order of their ids."""
RELAY_VOCABULARY = (*SPECIAL, THINK, END_THINK, *relay.WORDS)
"""Relay's words, in order of their ids."""

# Text follows the generation prompt: ` <think>` opens a thought, ` <think> </think>` closes it at once (NoThinking).
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- ('' if loop.first else ' ') + '<bos> ' + message['content'] | trim -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] | trim(' ') + ' <eos>' -}}
{%- else -%}
{{- raise_exception('this model takes user and assistant messages only, found role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- ' <think>' if enable_thinking is not defined or enable_thinking else ' <think> </think>' -}}
{%- endif -%}"""


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> Tokenizer:
    """The word-level tokenizer of a vocabulary; other words become `<unk>`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    # Only these are special. `<think>` and `</think>` are ordinary words, so that a decoded answer still shows its
    # thought's end.
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return tokenizer


def write_tokenizer(folder: str | Path, *, max_length: int, vocabulary: Sequence[str] = VOCABULARY) -> None:
    """Writes tokenizer.json and tokenizer_config.json (chat template included) into an existing folder.

    Args:
      folder: where to write.
      max_length: the model's window in tokens (`model_max_length`).
      vocabulary: its words, which begin with `SPECIAL`.
    """
    folder = Path(folder)
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "model_max_length": max_length,
        # Or transformers would decode "Hmm ," as "Hmm,", which does not encode back.
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
