"""Tokenizers: a `tokenizers` pipeline with the special tokens, the chat template and the raw bytes of each token.

`load_tokenizer(folder)` reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, and the end-of-sequence
ids of `generation_config.json` or `config.json`. A folder without a tokenizer gets `byte_tokenizer()`: 256 bytes, five
markers and a ChatML template.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxstack.models.chat_template import ChatTemplate, Messages
from jaxstack.runtime.errors import UserError

_MARKERS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Tokenizer:
    """Text to token ids and back.

    Args:
      pipeline: the `tokenizers` object.
      special_tokens: names (`bos_token`, `eos_token`, ...) to token texts; also handed to the chat template.
      eos_token_ids: ids that end a generation; the id of `eos_token` is added to them.
      chat_templates: sources by name; "default" is the usual one, "tool_use" is taken when tools are given.
      config: further content for `tokenizer_config.json`, kept for `save`.

    Attributes:
      pipeline: as given.
      vocab_size: one more than the largest token id.
      bos_token_id, pad_token_id: an id, or None.
      eos_token_ids: ascending, distinct.
      special_ids: ids that `decode(skip_special_tokens=True)` leaves out.
    """

    def __init__(
        self,
        pipeline: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.pipeline = pipeline
        self.special_tokens = dict(special_tokens or {})
        self._config = dict(config or {})
        vocabulary = pipeline.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.bos_token_id = self._marker("bos_token")
        self.pad_token_id = self._marker("pad_token")
        eos = self._marker("eos_token")
        self.eos_token_ids = tuple(sorted({*eos_token_ids, *(() if eos is None else (eos,))}))
        self.special_ids = frozenset(i for i, t in pipeline.get_added_tokens_decoder().items() if t.special)
        self._templates = {
            name: ChatTemplate(s, name=f"chat template {name!r}") for name, s in (chat_templates or {}).items()
        }
        self._decoders = _decoder_types(pipeline)

    def _marker(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.pipeline.token_to_id(token)

    # ------------------------------------------------------------------------------------------------- text and ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the pipeline puts around a text, mostly BOS.

        Raises:
          UserError: `text` holds lone surrogates, which no UTF-8 text can.
        """
        try:
            return self.pipeline.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            raise UserError("text holds half of a surrogate pair; expected valid Unicode") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return self.pipeline.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token ("Ġthe", "▁the"), or None."""
        return self.pipeline.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.pipeline.token_to_id(token)

    # --------------------------------------------------------------------------------------------- tokens as bytes

    @property
    def joins_bytes(self) -> bool:
        """Whether text is the tokens' bytes put end to end and read as UTF-8 (GPT-2's byte-level scheme)."""
        return self._decoders == ("ByteLevel",)

    @functools.cached_property
    def _fallback_bytes(self) -> dict[int, bytes]:
        """Ids of `<0x00>` to `<0xFF>` where runs of them are read as UTF-8 (sentencepiece's byte fallback)."""
        if "ByteFallback" not in self._decoders:
            return {}
        ids = ((self.pipeline.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
        return {token_id: bytes((byte,)) for token_id, byte in ids if token_id is not None}

    def is_raw_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a character, to be read together with its neighbours."""
        return token_id in self._fallback_bytes

    @functools.cached_property
    def _context(self) -> list[int]:
        """One ordinary token, put before another to see how that looks in the middle of a text."""
        vocabulary = self.pipeline.get_vocab(with_added_tokens=False)
        plain = (i for t, i in vocabulary.items() if t.isascii() and t.isalnum() and i not in self.special_ids)
        return [min(plain, default=0)]

    @functools.cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        return {}

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that it does not begin; nothing if the id is outside the vocabulary."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.pipeline.id_to_token(token_id)
        if token is None:
            return b""
        if self.joins_bytes:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # an added token with characters of its own, for instance a blank
                return token.encode()
        if token_id in self._fallback_bytes:
            return self._fallback_bytes[token_id]
        before = self.decode(self._context, skip_special_tokens=False)
        return self.decode([*self._context, token_id], skip_special_tokens=False)[len(before) :].encode()

    # --------------------------------------------------------------------------------------------------------- chat

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def chat_template(self, *, tools: bool = False) -> ChatTemplate:
        """The template used with or without tools.

        Raises:
          UserError: there is none.
        """
        if not self._templates:
            raise UserError(
                "this model has no chat template; expected chat_template.jinja or one in tokenizer_config.json"
            )
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates.get("default") or next(iter(self._templates.values()))

    def render_chat(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation; encode it with `add_special_tokens=False`, the template has written BOS itself.

        Args:
          messages: `{"role": ..., "content": ...}` each.
          add_generation_prompt: end with the header of an assistant's turn.
          continue_final_message: end inside the last message, so that the model goes on with it; excludes the former.
          variables: for the template, for instance `enable_thinking=False` or `tools`.

        Raises:
          UserError: no template, the template refuses or fails, or both endings are asked for.
        """
        template = self.chat_template(tools=bool(variables.get("tools")))
        variables = {"tools": None, "documents": None, **self.special_tokens, **variables}
        if not continue_final_message:
            return template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        if add_generation_prompt:
            raise UserError(
                "continue_final_message and add_generation_prompt exclude each other; set one of them to false"
            )
        if not messages or not isinstance(messages[-1].get("content"), str):
            raise UserError("continue_final_message: the last message needs a string content to go on with")
        # The mark shows where the message ends in the prompt, whatever the template writes after it.
        mark = "\ue000continue\ue000"
        marked = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + mark}]
        text = template.render(marked, add_generation_prompt=False, **variables)
        if mark not in text:
            raise UserError("continue_final_message: the chat template leaves the last message out of the prompt")
        return text[: text.rindex(mark)]

    # ------------------------------------------------------------------------------------------------------ folders

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and, if there is a template, `chat_template.jinja`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.pipeline.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, **self.special_tokens}
        if self._templates:
            sources = {name: template.source for name, template in self._templates.items()}
            default = sources.get("default")
            if default is not None:
                (folder / "chat_template.jinja").write_text(default, encoding="utf-8")
            # Older readers know only this place.
            config["chat_template"] = (
                default
                if set(sources) == {"default"}
                else [{"name": name, "template": source} for name, source in sources.items()]
            )
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where printable, else the next free one from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def _decoder_types(pipeline: tokenizers.Tokenizer) -> tuple[str, ...]:
    if pipeline.decoder is None:
        return ()
    # The state of a decoder is its JSON; the whole tokenizer's would be megabytes.
    decoder = json.loads(pipeline.decoder.__getstate__())
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return tuple(part["type"] for part in parts)


def byte_tokenizer() -> Tokenizer:
    """Token i < 256 is byte i; then `<pad>` 256, `<bos>` 257, `<eos>` 258 and the ChatML markers 259 and 260."""
    vocabulary = dict(_BYTE_OF)
    pipeline = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.decoder = tokenizers.decoders.ByteLevel()
    pipeline.add_special_tokens(["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(
        pipeline,
        special_tokens={"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"},
        eos_token_ids=(260,),
        chat_templates={"default": CHATML},
    )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; `byte_tokenizer()` if the folder holds none.

    Raises:
      UserError: no such folder, a file that cannot be read, or a tokenizer in another form than `tokenizer.json`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such model folder: {str(folder)!r}")
    file = folder / "tokenizer.json"
    if not file.is_file():
        for other in ("tokenizer.model", "vocab.json", "spiece.model"):
            if (folder / other).is_file():
                raise UserError(
                    f"{folder}: found {other}, expected tokenizer.json; load and save it once with transformers"
                )
        return byte_tokenizer()
    try:
        pipeline = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file}: not a tokenizer.json: {' '.join(str(error).split())[:300]}") from None
    # Both would change prompts behind the user's back.
    pipeline.no_truncation()
    pipeline.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    special = {}
    for name in _MARKERS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return Tokenizer(
        pipeline,
        special_tokens=special,
        eos_token_ids=_eos_ids(folder),
        chat_templates=_templates(folder, config),
        config={k: v for k, v in config.items() if k not in ("chat_template", *_MARKERS)},
    )


def _eos_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise UserError(f"{folder / name}: eos_token_id is {found!r}, expected an integer or a list of them")
        if ids:
            return ids
    return []


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    found = config.get("chat_template")
    if isinstance(found, str):
        templates = {"default": found}
    elif isinstance(found, list) and all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in found
    ):
        templates = {t["name"]: t["template"] for t in found}
    elif found is None:
        templates = {}
    else:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a string nor a list of named ones"
        )
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8", errors="replace")
    return templates


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds {type(content).__name__}, expected a JSON object")
    return content
