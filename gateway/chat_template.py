"""A checkpoint's chat template: a conversation in, the prompt's text out. Clients never bring templates of their own.

It runs in jinja2's immutable sandbox, with what transformers offers to templates, and within bounds: each round of a loop and
each call of a macro looks at the clock, and neither a product of its arithmetic nor its output may grow without limit.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..core.errors import CheckpointError, InvalidRequest

TIMEOUT_S = 1.0
MAX_CHARS = 16 << 20  # of output, and of any text put together on the way; as many bytes as a message has by default
MAX_EXPONENT = 64

_give_up_s: ContextVar[float] = ContextVar("give_up_s")


class TemplateBound(Exception):
    """A template does more than it may."""


class ChatTemplate:
    """One compiled template. Renders on any thread."""

    def __init__(self, source: str, special_tokens: Mapping[str, object]) -> None:
        """Raises CheckpointError when `source` is no template."""
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, _Bounds, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now, "namespace": _Namespace}
        try:
            self._template = environment.from_string(_bounded(environment.parse(source)))
        except TemplateError as error:
            raise CheckpointError(f"its chat template cannot be compiled: {error}") from error
        self._special_tokens = {name: str(token) for name, token in special_tokens.items() if isinstance(token, str)}

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, timeout_s: float = TIMEOUT_S
    ) -> str:
        """The conversation as text. Raises InvalidRequest."""
        variables = self._special_tokens | {"messages": [dict(message) for message in messages], "tools": None}
        _give_up_s.set(time.monotonic() + timeout_s)
        try:
            return self._text(variables | {"documents": None, "add_generation_prompt": add_generation_prompt})
        except TemplateBound as error:
            raise InvalidRequest("prompt.chat", f"{len(messages)} message(s)", str(error)) from error
        except Exception as error:  # the template refuses, or fails over what it did not expect: it is not our code
            reason = str(error) or type(error).__name__
            raise InvalidRequest("prompt.chat", [message["role"] for message in messages], reason) from error

    def _text(self, variables: Mapping[str, Any]) -> str:
        parts, num_chars = [], 0
        for part in self._template.generate(variables):
            num_chars += len(part)
            _check_size(num_chars)
            parts.append(part)
        return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses arithmetic whose result could be huge."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int | float) and right > MAX_EXPONENT:
            raise TemplateBound(f"exponents of at most {MAX_EXPONENT} in the chat template")
        if operator == "*":
            for sized, count in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and isinstance(count, int):
                    _check_size(len(sized) * count)
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            raise TemplateBound("no % on texts in the chat template")
        return super().call_binop(context, operator, left, right)


class _Namespace(Namespace):
    """As in transformers: no attribute by which a template could reach Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounds(Extension):
    """What compiled templates call where they could go on for long."""

    def tick(self) -> bool:
        if time.monotonic() > _give_up_s.get():
            raise TemplateBound("a conversation that the chat template renders in time")
        return True

    def concatenation(self, *parts: object) -> str:
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)


def _bounded(template: nodes.Template) -> nodes.Template:
    """The template with a look at the clock in each round of a loop and each call of a macro."""
    for loop in template.find_all(nodes.For):
        if loop.test is not None:
            loop.test = nodes.And(_call("tick"), loop.test).set_lineno(loop.lineno)
    for block in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        block.body.insert(0, nodes.ExprStmt(_call("tick")).set_lineno(block.lineno))  # type: ignore[attr-defined]
    _bound_concatenation(template)
    return template


def _bound_concatenation(node: Any) -> Any:
    """The node, with `a ~ b` below it as a call that looks at the sizes."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _bound_concatenation(value))
        elif isinstance(value, list):
            setattr(node, name, [_bound_concatenation(v) if isinstance(v, nodes.Node) else v for v in value])
    if isinstance(node, nodes.Concat):
        return _call("concatenation", *node.nodes).set_lineno(node.lineno)
    return node


def _call(method: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.ExtensionAttribute(_Bounds.identifier, method), list(arguments), [], None, None)


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise TemplateBound(f"at most {MAX_CHARS} characters from the chat template")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
