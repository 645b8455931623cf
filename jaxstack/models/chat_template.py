"""Chat templates: Jinja source from a model folder, rendered in a sandbox that it can neither leave nor hang.

A template comes with the weights, so it is somebody else's program. Jinja's `ImmutableSandboxedEnvironment` keeps it
away from Python; this file also bounds what it can spend. Every loop turn, call, comparison and string operation is
charged to a budget of work units (about one unit a character written), and the operations that make much out of little
(`range(10**9)`, `'a' * 10**9`, `**`, nested loops, recursion, `%999999d`) are checked before they run. What remains
costs a second or two at the very worst.

The environment offers what transformers offers to templates: `raise_exception`, `strftime_now`, `tojson` without HTML
escaping, loop controls, and `{% generation %}` blocks. These print their content unchanged; `render_with_spans` says
where they lie.
"""

import datetime
import html
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxstack.runtime.errors import UserError

Messages = Sequence[Mapping[str, Any]]
_LOOP_TURN = 256  # work units a loop turn, a call or another small step costs
_VISIT = 128  # work units for looking at one value inside a list or dictionary


@dataclass(frozen=True)
class TemplateLimits:
    """What a template may spend.

    Attributes:
      source_bytes: longest template source.
      output_chars: longest rendered text.
      work: work units for one rendering; about one a character written, 256 a loop turn.
      range_length: longest `range(...)`.
    """

    source_bytes: int = 1 << 20
    output_chars: int = 8 << 20
    work: int = 256 << 20
    range_length: int = 100_000


class TemplateRefused(UserError):
    """The template itself refused the messages (`raise_exception`); the text is the template's own."""


class _TooMuch(Exception):
    """A template went over one of its limits."""


class _Raised(Exception):
    """`raise_exception` was called."""


class _Budget:
    """What one rendering has left, and the marks around its `{% generation %}` blocks if they are wanted."""

    def __init__(self, limits: TemplateLimits, marks: tuple[str, str] | None = None):
        self.left, self.limits, self.marks = limits.work, limits, marks

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise _TooMuch(f"more than {self.limits.work} units of work")


_budget: ContextVar[_Budget] = ContextVar("chat_template_budget")


@contextmanager
def _spending(limits: TemplateLimits, marks: tuple[str, str] | None = None) -> Iterator[_Budget]:
    budget = _Budget(limits, marks)
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)


def _charge(units: int) -> None:
    _budget.get().spend(units)


def _touch(value: Any, depth: int = 0) -> Any:
    """Charges what reading the whole of `value` costs, shared parts counted each time they occur; returns `value`."""
    if isinstance(value, str):
        _charge(len(value) >> 3)  # comparing and searching run at many characters a nanosecond
    elif isinstance(value, (list, tuple)):
        if depth > 200:
            raise _TooMuch("values nested more than 200 deep")
        _charge(_VISIT * (1 + len(value)))
        for item in value:
            _touch(item, depth + 1)
    elif isinstance(value, dict):
        _touch(tuple(value.keys()), depth + 1)
        _touch(tuple(value.values()), depth + 1)
    return value


def _glance(value: Any) -> Any:
    """As `_touch`, for operations that look at a list or dictionary but not inside its items."""
    if isinstance(value, (str, list, tuple, dict)):
        _charge(len(value) >> 3)
    return value


def _text(value: Any) -> str:
    """`str(value)`, charged before it is made."""
    if isinstance(value, str):
        _charge(len(value))
        return value
    _touch(value)
    return str(value)


# ----------------------------------------------------------------------------------------------- filters and methods


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and not 0 <= indent <= 16:
        raise _TooMuch(f"tojson(indent={indent})")
    return json.dumps(
        _touch(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _join(parts: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise _TooMuch("join(attribute=...)")
    texts = []
    for part in parts:
        _charge(len(separator))
        texts.append(_text(part))
    return separator.join(texts)


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    text, old, new = _text(text), _text(old), _text(new)
    hits = text.count(old) if count < 0 else min(count, text.count(old))
    _charge(len(text) + hits * len(new))
    return text.replace(old, new, count)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = " " * _small(width, 1000) if isinstance(width, int) else width
    lines = _text(text).splitlines(keepends=True)
    _charge(len(lines) * len(pad))
    return "".join(pad + line if (i > 0 or first) and (blank or line.strip()) else line for i, line in enumerate(lines))


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    return jinja2.filters.do_round(value, precision=_small(precision, 20), method=method)  # type: ignore[arg-type]


def _small(number: int, limit: int) -> int:
    if abs(number) > limit:
        raise _TooMuch(f"the number {number} where at most {limit} is allowed")
    return number


def _format(template: str, *args: Any) -> str:
    """`template % args` without field widths that make megabytes of blanks."""
    if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)", _text(template)):
        raise _TooMuch("a field width of more than three digits")
    _touch(args)
    return template % args


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PLAIN_FILTERS = _names(
    "abs capitalize count d default first float int items last length list lower map reject rejectattr reverse select "
    "selectattr title trim upper wordcount"
)
# Those that compare whole items with each other.
_COMPARING_FILTERS = _names("dictsort groupby max min sort unique")
_COMPARING_TESTS = _names("eq equalto == ne != lt lessthan < le <= gt greaterthan > ge >= in")
_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "tojson": _tojson,
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "round": _round,
    "format": _format,
    "string": _text,
    "safe": _text,
    "escape": lambda value: html.escape(_text(value)),
    "e": lambda value: html.escape(_text(value)),
}
_METHODS: dict[type, frozenset[str]] = {
    str: _names(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
        "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
        "rsplit rstrip split splitlines startswith strip swapcase title upper"
    ),
    dict: _names("copy get items keys values"),
    list: _names("copy count index"),
    tuple: _names("count index"),
    float: _names("is_integer"),
    int: frozenset(),
    bytes: frozenset(),
}


def _charged(function: Callable[..., Any], look: Callable[[Any], Any]) -> Callable[..., Any]:
    """A Jinja filter or test that pays for its arguments, by `look`, and for its result."""

    def call(*args: Any, **kwargs: Any) -> Any:
        _charge(_LOOP_TURN)
        for argument in args:
            look(argument)
        result = function(*args, **kwargs)
        if isinstance(result, str):
            _charge(len(result))
        return result

    # Jinja marks filters that want the environment or context with an attribute.
    call.__dict__.update(getattr(function, "__dict__", {}))
    return call


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise _TooMuch("a strftime format longer than 100 characters or with a field width")
    return datetime.datetime.now().strftime(form)


def _raise_exception(message: Any = "") -> Any:
    raise _Raised(_text(message))


# ------------------------------------------------------------------------------------------------------- environment


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: the text an assistant would have generated."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Callable[[], str]) -> str:
        marks = _budget.get().marks
        return caller() if marks is None else f"{marks[0]}{caller()}{marks[1]}"


class _Meter(jinja2.visitor.NodeTransformer):
    """Rewrites a parsed template so that it pays as it goes."""

    def _call(self, name: str, line: int, *arguments: Any) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None, lineno=line)

    def _metered_body(self, node: Any) -> Any:
        """Loops, macros and blocks: each turn pays for itself and for the literal text it may print."""
        self.generic_visit(node)
        literal = sum(len(data.data) for child in node.body for data in _literals(child))
        payment = self._call("pay", node.lineno, nodes.Const(_LOOP_TURN + literal, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(payment, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_FilterBlock = visit_Block = visit_AssignBlock = _metered_body

    def visit_For(self, node: nodes.For) -> nodes.For:
        node.iter = self._call("pay_for_loop", node.lineno, node.iter)
        return self._metered_body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concatenate", node.lineno, *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._call("touch", node.lineno, node.expr)
        for operand in node.ops:
            operand.expr = self._call("touch", node.lineno, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("touch", node.lineno, node) if isinstance(node.arg, nodes.Slice) else node


def _literals(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, limits: TemplateLimits):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            finalize=_text,
            extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"],
        )
        self._limits = limits
        plain = {name: _charged(self.filters[name], _glance) for name in _PLAIN_FILTERS}
        plain |= {name: _charged(self.filters[name], _touch) for name in _COMPARING_FILTERS}
        self.filters = plain | {name: _charged(function, _glance) for name, function in _OWN_FILTERS.items()}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {
            name: _charged(test, _touch if name in _COMPARING_TESTS else _glance) for name, test in tests.items()
        }
        self.globals = {
            "range": self._range,
            "dict": dict,
            "namespace": jinja2.utils.Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > self._limits.range_length:
            raise _TooMuch(f"a range of {len(numbers)} numbers, at most {self._limits.range_length} are allowed")
        return numbers

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Meter().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    # What `_Meter` calls.
    pay = staticmethod(_charge)
    touch = staticmethod(_touch)

    @staticmethod
    def pay_for_loop(items: Any) -> Any:
        """Pays for the turns of a loop before it starts: a filtered loop takes turns that its body never sees."""
        if isinstance(items, Undefined):
            return items
        sized = items if hasattr(items, "__len__") else list(items)
        _charge(_LOOP_TURN // 2 * len(sized))
        return sized

    @staticmethod
    def concatenate(*parts: Any) -> str:
        return "".join([_text(part) for part in parts])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _charge(1)
        if operator == "%" and isinstance(left, str):
            return _format(left, *(right if isinstance(right, tuple) else (right,)))
        if operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                _charge(len(left) + len(right))
        elif operator in ("*", "**") and isinstance(left, (str, list, tuple)):
            _charge(max(0, int(right)) * len(left) * (1 if isinstance(left, str) else _LOOP_TURN))
        elif operator in ("*", "**") and isinstance(right, (str, list, tuple)):
            _charge(max(0, int(left)) * len(right) * (1 if isinstance(right, str) else _LOOP_TURN))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(1, right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > 4096:
                raise _TooMuch("an integer of more than 4096 bits")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing: `str.format` is refused with the other methods outside `_METHODS`."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if function in (_charge, _touch, self.pay_for_loop, self.concatenate):
            return function(*args)
        _charge(_LOOP_TURN)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, tuple(_METHODS)):
            look = _glance if isinstance(owner, (str, dict)) else _touch  # list.index compares
            look(owner)
            for argument in args:
                look(argument)
            if isinstance(owner, str) and function.__name__ in ("replace", "join"):
                return _replace(owner, *args) if function.__name__ == "replace" else _join(*args, separator=owner)
        elif isinstance(function, LoopContext):
            args = (self.pay_for_loop(args[0]),)
        return super().call(context, function, *args, **kwargs)


class ChatTemplate:
    """A chat template, compiled once; rendering is safe from several threads at once.

    Args:
      source: Jinja source.
      name: what errors call it, for instance the file it came from.
      limits: what it may spend.

    Raises:
      UserError: the source is longer than the limit, or is not a Jinja template.
    """

    def __init__(self, source: str, *, name: str = "chat template", limits: TemplateLimits | None = None):
        self.source, self.name = source, name
        self.limits = limits or TemplateLimits()
        if len(source.encode("utf-8", "replace")) > self.limits.source_bytes:
            raise UserError(f"{name}: longer than the {self.limits.source_bytes} bytes a chat template may have")
        try:
            with _spending(self.limits):
                self._template = _Environment(self.limits).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}: not a valid Jinja template, line {error.lineno}: {error.message}") from None
        except (_TooMuch, RecursionError, MemoryError, SyntaxError, OverflowError) as error:
            raise UserError(f"{name}: not a usable Jinja template: {_reason(error)}") from None

    def render(self, messages: Messages, **variables: Any) -> str:
        """The prompt text of `messages` (`{"role", "content", ...}` each).

        `variables` are the template's own, for instance `add_generation_prompt`, `tools`, `bos_token`.

        Raises:
          TemplateRefused: the template called `raise_exception`.
          UserError: it failed, or went over a limit.
        """
        return self._render(messages, variables, None)

    def render_with_spans(self, messages: Messages, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """As `render`, and the character spans `[start, end)` of the text's `{% generation %}` blocks, in order."""
        nonce = secrets.token_hex(8)
        begin, end = f"\ue000{nonce}(", f"\ue000{nonce})"
        text, spans, start = "", [], 0
        for piece in re.split(
            f"({re.escape(begin)}|{re.escape(end)})", self._render(messages, variables, (begin, end))
        ):
            if piece == begin:
                start = len(text)
            elif piece == end:
                spans.append((start, len(text)))
            else:
                text += piece
        return text, spans

    def _render(self, messages: Messages, variables: Mapping[str, Any], marks: tuple[str, str] | None) -> str:
        pieces, length = [], 0
        try:
            with _spending(self.limits, marks):
                for piece in self._template.generate(messages=messages, **variables):
                    length += len(piece)
                    if length > self.limits.output_chars:
                        raise _TooMuch(f"more than {self.limits.output_chars} characters of output")
                    pieces.append(piece)
        except _Raised as error:
            raise TemplateRefused(f"{self.name} refuses these messages: {error}") from None
        except _TooMuch as error:
            raise UserError(f"{self.name} was stopped: {error}") from None
        except Exception as error:  # whatever a foreign program may raise: it is the template's failure, not ours
            raise UserError(f"{self.name} failed on these messages: {_reason(error)}") from None
        return "".join(pieces)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
