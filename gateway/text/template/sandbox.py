"""jinja2's sandbox, in which every operation of a template goes through a function with a known bound.

Templates are rewritten before they are compiled: operations that jinja2 leaves to Python (literals, slices,
comparisons, loops) become calls, too. Unknown kinds of expressions and statements are refused, and so are
calls of anything not named here."""

from collections.abc import Mapping
from datetime import datetime
from functools import partial
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import Template, TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace, pass_context

from .account import NODE_BYTES, TemplateBound, Weight, account
from .filters import FILTERS, printf, slice_of
from .methods import METHODS, joined

MAX_SOURCE_CHARS = 256 << 10  # ten times what large templates have
MAX_NODES = 20_000  # of expressions and statements: a second of Python's compiler
MAX_EXPONENT = 64
MAX_BITS = 4096
MAX_DATE_CHARS = 256

_STATEMENTS = (
    nodes.Template,
    nodes.Output,
    nodes.For,
    nodes.If,
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.With,
    nodes.Block,
    nodes.ExprStmt,
    nodes.Assign,
    nodes.AssignBlock,
    nodes.Continue,
    nodes.Break,
)
_EXPRESSIONS = (
    nodes.Name,
    nodes.NSRef,
    nodes.Const,
    nodes.TemplateData,
    nodes.Tuple,
    nodes.List,
    nodes.Dict,
    nodes.Pair,
    nodes.Keyword,
    nodes.CondExpr,
    nodes.Filter,
    nodes.Test,
    nodes.Call,
    nodes.Getitem,
    nodes.Getattr,
    nodes.Slice,
    nodes.Concat,
    nodes.Compare,
    nodes.Operand,
    nodes.Mul,
    nodes.Div,
    nodes.FloorDiv,
    nodes.Add,
    nodes.Sub,
    nodes.Mod,
    nodes.Pow,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Neg,
    nodes.Pos,
)
_KNOWN = frozenset((*_STATEMENTS, *_EXPRESSIONS))


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment with the functions that transformers offers to templates."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        extensions: list[type[Extension] | str] = [_Generation, _Counted, loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=_written
        )  # no constant folding, so that everything is counted
        self.filters = dict(FILTERS)
        self.globals = {
            "range": safe_range,
            "dict": _dict,
            "namespace": _namespace,
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
        }
        self._functions = tuple(self.globals.values())

    def parsed(self, source: str) -> nodes.Template:
        """Raises TemplateError, or the errors of Python's parser for deep nesting."""
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(f"it has {len(source)} characters, expected at most {MAX_SOURCE_CHARS}")
        parsed = self.parse(source)
        if any(index > MAX_NODES for index, _ in enumerate(parsed.find_all(nodes.Node))):
            raise TemplateError(f"it has more than {MAX_NODES} expressions and statements")
        return parsed

    def compiled(self, parsed: nodes.Template) -> Template:
        """Returns a template to render; uses up `parsed`. Raises as `parsed`."""
        return self.from_string(_rewritten(parsed))

    def wrap_str_format(self, value: Any) -> None:
        """Disabled: `call` has a str.format of its own."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by jinja2; the template chooses the names of keyword arguments."""
        called = __self._allowed(__obj)
        if isinstance(called, Macro):
            account().built(args)
            account().built(
                {name: value for name, value in kwargs.items() if not name.startswith("_")}
            )  # not jinja2's
        account().tick()
        return super().call(__context, called, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        account().tick()
        if operator == "**" and isinstance(right, int | float) and right > MAX_EXPONENT:
            raise TemplateBound(f"exponents of at most {MAX_EXPONENT} in the chat template")
        if isinstance(left, int) and isinstance(right, int):
            num_bits = (
                left.bit_length() * max(1, right)
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            if num_bits > MAX_BITS:
                raise TemplateBound(f"numbers of at most {MAX_BITS} bits in the chat template")
        if operator == "%" and isinstance(left, str):
            return printf(left, right)
        if operator == "*" and isinstance(left, str | list | tuple) and isinstance(right, int):
            return _repeated(left, right)
        if operator == "*" and isinstance(right, str | list | tuple) and isinstance(left, int):
            return _repeated(right, left)
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            account().charge_text(len(left) + len(right), left, right)
        if operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
            return _chained(left, right)
        return super().call_binop(context, operator, left, right)

    def _allowed(self, called: Any) -> Any:
        """Returns the function to call for it. Raises SecurityError."""
        if isinstance(called, BuiltinMethodType):
            method = METHODS.get((type(called.__self__), called.__name__))
            if method is not None:
                return partial(method, called.__self__)
        elif isinstance(called, MethodType):
            owner = called.__self__
            if isinstance(owner, _Counted) or (
                isinstance(owner, LoopContext) and called.__name__ in ("changed", "cycle")
            ):
                return called
        elif isinstance(called, Macro | LoopContext | BlockReference | Undefined) or any(
            called is f for f in self._functions
        ):
            return called
        name = getattr(called, "__qualname__", type(called).__name__)
        raise SecurityError(f"the chat template may not call {name}")


def _repeated(value: Any, count: int) -> Any:
    if isinstance(value, str):
        account().charge_text(len(value) * max(0, count), value)
        return value * count
    account().charge(NODE_BYTES * len(value) * max(0, count))
    weight = account().weight(value)
    return account().built(value * count, Weight(weight.num_bytes * max(1, count), weight.num_levels))


def _chained(left: Any, right: Any) -> Any:
    account().charge(NODE_BYTES * (len(left) + len(right)))
    weights = account().weight(left), account().weight(right)
    num_levels = max(weight.num_levels for weight in weights)
    return account().built(left + right, Weight(sum(weight.num_bytes for weight in weights), num_levels))


@pass_context  # jinja2 renders output that needs no context by itself, and uncounted
def _written(_: Context, value: Any) -> str:
    text = account().text(value)
    account().charge_text(2 * len(text), text)  # by itself, and in its container
    return text


class _Counted(Extension):
    """The functions that a rewritten template calls."""

    def tick(self) -> bool:
        account().tick()
        return True

    def built(self, value: Any) -> Any:
        return account().built(value)

    def concatenation(self, *parts: object) -> str:
        return joined("", map(account().text, parts))

    def slice_of(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return slice_of(value, start, stop, step)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's output for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _rewritten(node: Any) -> Any:
    """Rewrites the node and all below it, with potentially large operations as calls. Raises
    TemplateError."""
    if type(node) not in _KNOWN:
        raise TemplateError(f"{type(node).__name__} is not for chat templates")
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _rewritten(value))
        elif isinstance(value, list):
            setattr(node, name, [_rewritten(v) if isinstance(v, nodes.Node) else v for v in value])
    if isinstance(node, nodes.For) and node.test is not None:
        node.test = nodes.And(_call("tick"), node.test)
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
        node.body.insert(0, nodes.ExprStmt(_call("tick")))
    return _replaced(node).set_lineno(node.lineno)


def _replaced(node: Any) -> Any:
    match node:
        case nodes.TemplateData():
            return nodes.Const(node.data)
        case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load"):
            return _call("built", node)
        case nodes.Concat():
            return _call("concatenation", *node.nodes)
        case nodes.Getitem(arg=nodes.Slice(start=start, stop=stop, step=step)):
            return _call(
                "slice_of", node.node, *(bound or nodes.Const(None) for bound in (start, stop, step))
            )
        case nodes.Compare() | nodes.Test():
            return nodes.And(_call("tick"), node)
    return node


def _call(method: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.ExtensionAttribute(_Counted.identifier, method), list(arguments), [], None, None)


class _Namespace(Namespace):
    """As in transformers: excludes attributes by which a template could reach Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # not its content, which can change and hold others


def _dict(*values: Any, **named: Any) -> Any:
    if not all(isinstance(value, Mapping) for value in values):
        raise TemplateBound("dict of a mapping and of names in the chat template")
    account().charge(NODE_BYTES * (sum(map(len, values)) + len(named)))
    return account().built(dict(*values, **named))


def _namespace(*values: Any, **named: Any) -> _Namespace:
    return _Namespace(_dict(*values, **named))


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > MAX_DATE_CHARS or any(char.isdigit() for char in form):
        raise TemplateBound("a date's format without widths in the chat template")
    return datetime.now().strftime(form)
