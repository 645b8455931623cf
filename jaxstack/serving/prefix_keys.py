"""Keys of a prompt's prefixes: two prompts have as many leading keys in common as they begin alike.

A router that has no tokenizer, and a replica that tells it what its prefix cache has lost, name prefixes by these keys.
Both make them from the body of the request, with this code, so nothing but keys passes between them.
"""

import array
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

# Bytes of a chunk: about a page of 16 tokens. The size doubles after so many chunks, so that a prompt of any length has
# few keys, and the place where two prompts part is known to less than a hundredth of it.
_CHUNK, _CHUNKS_OF_A_SIZE = 64, 256


class PrefixKeys(NamedTuple):
    """Key i stands for the first `ends[i]` units (bytes of text, or tokens) of a prompt of `length` units."""

    keys: tuple[int, ...]
    ends: tuple[int, ...]
    length: int


def keys_of_text(text: bytes, salt: bytes = b"") -> PrefixKeys:
    """Of a text. Prompts with different `salt` (another model, another tenant) share no key."""
    return _chain(text, _text_ends(len(text)), salt)


def keys_of_tokens(token_ids: Sequence[int], page_size: int = 16, salt: bytes = b"") -> PrefixKeys:
    """Of token ids below 2**31, one key a whole page."""
    ends = range(page_size, len(token_ids) + 1, page_size)
    width = array.array("i").itemsize
    keys, _, _ = _chain(array.array("i", token_ids).tobytes(), (end * width for end in ends), salt)
    return PrefixKeys(keys, tuple(ends), len(token_ids))


def keys_of_body(body: Mapping[str, Any]) -> PrefixKeys:
    """Of a request to a generating endpoint, the first prompt if it has several. A body that no server would take may
    have no keys.
    """
    salt = str(body.get("model") or "").encode("utf-8", "surrogatepass")
    return keys_of_text(prompt_text(body), salt)


def prompt_text(body: Mapping[str, Any]) -> bytes:
    """What stands in a request's prompt, in the order in which chat templates write it. Token ids are four bytes each.

    Roles and tools are kept apart by bytes that are no text, so that different conversations have different texts.
    """
    messages = body.get("messages")
    if isinstance(messages, list):
        parts = [_json(body["tools"])] if body.get("tools") else []
        for message in messages:
            if isinstance(message, dict):
                calls = message.get("tool_calls")
                parts += [_text(message.get("role")), _text(message.get("content")), _json(calls) if calls else b""]
        return b"\xff".join(parts)
    prompt = body.get("prompt", body.get("input"))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    return _text(prompt)


def _text(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode("utf-8", "surrogatepass")
    if isinstance(content, list):
        try:
            return array.array("i", content).tobytes()
        except (TypeError, OverflowError):  # parts of a message
            return b"\xfe".join(_text(part.get("text")) if isinstance(part, dict) else b"" for part in content)
    return b""


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _text_ends(length: int) -> Iterator[int]:
    end = 0
    for number in itertools.count():
        end += _CHUNK << (number // _CHUNKS_OF_A_SIZE)
        if end > length:
            return
        yield end


def _chain(data: bytes, ends: "Iterator[int] | Any", salt: bytes) -> PrefixKeys:
    state = blake2b(salt, digest_size=8).digest()
    start, keys, passed = 0, [], []
    for end in ends:
        state = blake2b(state + data[start:end], digest_size=8).digest()
        keys.append(int.from_bytes(state, "little"))
        passed.append(end)
        start = end
    return PrefixKeys(tuple(keys), tuple(passed), len(data))
