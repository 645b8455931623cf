r"""Finds what a text gives as its answer: what follows the thought, the last \boxed{}, the last number.

All of it takes time linear in the text, whatever the text.
"""

import re

# How thoughts begin and end: as most models mark them, and as Sky-T1's data do.
_MARKERS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)
# Boxes within boxes that are opened; each costs a pass over the text.
_DEEPEST_BOXES = 4
_OPENING, _CLOSING = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|(?<![\w.])-?\.\d+")


def after_thought(text: str, *, thinking: bool = False) -> str | None:
    """What follows the end of the last thought; the whole text if there was no thought.

    None if a thought was begun and has not ended: a truncated answer must not be credited for what it considered.

    Args:
      text: a completion.
      thinking: the prompt has begun the thought already, so that a text without its end is all thought.
    """
    end = max(text.rfind(closing) + len(closing) if closing in text else -1 for _, closing in _MARKERS)
    rest = text if end < 0 else text[end:]
    if any(opening in rest for opening, _ in _MARKERS) or (thinking and end < 0):
        return None
    return rest


def last_boxed(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{...}` (or `\fbox{...}`), without boxes around all of it; None for none.

    A box that is cut off does not count; what it holds may.
    """
    open_braces: list[int] = []  # where the content of a box begins, or -1 for another brace
    found: str | None = None
    for token in _BOX.finditer(text):
        piece = token.group()
        if piece == "{":
            open_braces.append(-1)
        elif piece == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0:
                found = text[start : token.start()]
        elif piece.endswith("{") and len(piece) > 2:
            open_braces.append(token.end())
    return None if found is None else unboxed(found)


def unboxed(text: str) -> str:
    r"""`text` without a `\boxed{}` that encloses all of it, blanks and dollars around it removed."""
    text = text.strip()
    for _ in range(_DEEPEST_BOXES):
        opening = re.match(r"\$*\s*\\f?box(?:ed)?\s*\{", text)
        inner = text.rstrip("$ \n")
        if not opening or not inner.endswith("}") or not _closes_at_end(inner, opening.end()):
            break
        text = inner[opening.end() : -1].strip()
    bare = text.strip("$").strip()
    return text if "$" in bare else bare


def _closes_at_end(text: str, start: int) -> bool:
    depth = 1
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return start + token.end() == len(text)
    return False


def last_number(text: str) -> str | None:
    """The last number in `text`, thousands separators removed. Credits luck: for a metric of its own only."""
    found = None
    for number in _NUMBER.finditer(text):
        found = number.group()
    return None if found is None else found.replace(",", "")


def split_list(text: str) -> list[str]:
    r"""The parts of `text` between commas, semicolons and `\text{ and }` outside all brackets; blanks removed."""
    text = re.sub(r"\\(?:text|mathrm|textrm)\s*\{\s*(?:and|or)\s*\}|(?<=\s)(?:and|or)(?=\s)", ",", text)
    text = re.sub(r"(?<=\d)(?:,\\!|\{,\})(?=\d{3})", "", text)
    parts, depth, start = [], 0, 0
    for token in re.finditer(r"\\[a-zA-Z]+|\\.|[(){}\[\],;]", text, re.DOTALL):
        piece = token.group()
        if piece in _OPENING:
            depth += 1
        elif piece in _CLOSING:
            depth -= 1
        elif piece in ",;" and depth <= 0:
            parts.append(text[start : token.start()])
            start = token.end()
    parts.append(text[start:])
    return [part.strip().strip("$").strip() for part in parts if part.strip().strip("$").strip()]
