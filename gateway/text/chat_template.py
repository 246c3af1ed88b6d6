"""A checkpoint's chat templates: a conversation in, the prompt's text out. Clients cannot supply templates.

They run in jinja2's sandbox with the functions that transformers offers to templates. They have no bounds of
their own on time and memory: only processes with limits compile and render them (`offload/`)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

from ...core.checkpoint_files import shown_text
from ...core.errors import CheckpointError, InvalidRequest
from ..tools.formats import tool_format
from .tokenizer_loading.messages import TemplateData

MAX_SOURCE_CHARS = 256 << 10  # ten times what large templates have
MAX_NODES = 20_000  # of expressions and statements: a second of Python's compiler
MAX_CHARS = 16 << 20  # of a prompt; as many bytes as a message has by default

CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # behind the message that goes on, while it is rendered
# by which transformers and vLLM call what a template gets, and jinja2 what it has by itself
RESERVED_NAMES = frozenset(
    ("messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message",
     "chat_template", "tokenize", "tokenizer", "return_dict", "self", "super", "loop", "caller", "varargs",
     "kwargs", "true", "false", "none", "True", "False", "None")
)  # fmt: skip


class TooCostly(InvalidRequest):
    """The template exceeds its time or memory bound on a conversation."""


@dataclass(frozen=True, kw_only=True)
class TemplateOptions:
    """The values that few conversations have beside messages and tools."""

    documents: Sequence[Mapping[str, str]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # the client's variables
    continues_final_message: bool = False  # the text ends with the content of the last message


NO_OPTIONS = TemplateOptions()


class ChatTemplates:
    """The templates of one checkpoint: one for all conversations, and perhaps one for those with tools."""

    def __init__(self, data: TemplateData) -> None:
        """Raises CheckpointError for a template that cannot be parsed."""
        templates = {name: ChatTemplate(source, data.special_tokens) for name, source in data.sources.items()}
        self._default = templates.get("default")
        self._for_tools = templates.get("tool_use", self._default)
        source = "" if self._for_tools is None else self._for_tools.source
        self.takes_tools = self._for_tools is not None and self._for_tools.takes_tools
        self.takes_calls = "tool_calls" in source  # of earlier messages
        self.tool_format = tool_format(source)  # of the model's calls; None if it is unknown

    @property
    def can_render(self) -> bool:
        """Whether there is a template for any conversation."""
        return self._default is not None

    def compile(self) -> None:
        """Compiles the templates ahead of the first conversation. Raises CheckpointError."""
        for template in (self._default, self._for_tools):
            if template is not None:
                template.compile()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: TemplateOptions = NO_OPTIONS,
    ) -> str:
        """Renders a conversation as text, with `tools` in OpenAI's format. Raises InvalidRequest, or
        TooCostly if the text is too long."""
        template = self._default if tools is None else self._for_tools
        if template is None:
            expected = "text or token_ids, as the model has no chat template"
            raise InvalidRequest("prompt.chat", f"{len(messages)} message(s)", expected)
        return template.render(messages, add_generation_prompt, tools, options)


class ChatTemplate:
    """One template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises CheckpointError if `source` is not a template."""
        self.source = source
        self._special_tokens = special_tokens
        self._environment = _environment()
        try:
            if len(source) > MAX_SOURCE_CHARS:
                raise TemplateError(f"it has {len(source)} characters, expected at most {MAX_SOURCE_CHARS}")
            parsed = self._environment.parse(source)
            for index, node in enumerate(parsed.find_all(nodes.Node)):
                if index > MAX_NODES:
                    raise TemplateError(f"it has more than {MAX_NODES} expressions and statements")
                if isinstance(node, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends):
                    raise TemplateError(f"{type(node).__name__} is not for chat templates")
        except Exception as error:  # jinja2's, and Python's for deep nesting and long numbers
            raise _broken(error) from error
        names = {name.name for name in parsed.find_all(nodes.Name)}
        self.takes_tools = "tools" in names
        self._takes_documents = "documents" in names

    @cached_property
    def _compiled(self) -> Template:
        return self._environment.from_string(self.source)

    def compile(self) -> None:
        """Raises CheckpointError."""
        try:
            _ = self._compiled
        except Exception as error:  # jinja2's, and Python's
            raise _broken(error) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: TemplateOptions = NO_OPTIONS,
    ) -> str:
        """As `ChatTemplates.render`. Also raises MemoryError."""
        variables: dict[str, object] = {
            **self._special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": options.documents,
            "add_generation_prompt": add_generation_prompt,
        }
        if options is not NO_OPTIONS:
            self._add(options, variables)
            if options.continues_final_message:
                variables["messages"] = [*messages[:-1], _marked(messages[-1])]
        parts, num_chars = [], 0
        try:
            for part in self._compiled.generate(variables):
                num_chars += len(part)
                if num_chars > MAX_CHARS:
                    raise TooCostly(
                        "prompt.chat", f"{len(messages)} message(s)", f"at most {MAX_CHARS} characters"
                    )
                parts.append(part)
        except (TooCostly, MemoryError):
            raise
        except Exception as error:  # the template refuses, or fails on unexpected input
            reason = str(error) or type(error).__name__
            raise InvalidRequest("prompt.chat", [message["role"] for message in messages], reason) from error
        text = "".join(parts)
        return _cut(text, messages[-1]) if options.continues_final_message else text

    def _add(self, options: TemplateOptions, variables: dict[str, object]) -> None:
        """Adds the client's variables. Raises InvalidRequest for one that would hide another, and for
        documents that the template does not look at."""
        for name, value in options.kwargs.items():
            if name in variables or name in RESERVED_NAMES or name in self._environment.globals:
                expected = "names that the template does not get from elsewhere"
                raise InvalidRequest("prompt.chat.template_kwargs", name, expected)
            variables[name] = value
        if options.documents is not None and not self._takes_documents:
            expected = "none, as the model's chat template has no place for documents"
            got = f"{len(options.documents)} document(s)"
            raise InvalidRequest("prompt.chat.documents", got, expected)


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": message["content"] + CONTINUED}


def _cut(text: str, message: Mapping[str, Any]) -> str:
    """Returns the text up to the end of the message that goes on, as transformers does: with the blanks at
    its end, if the template keeps them."""
    end = text.rfind(CONTINUED.rstrip())
    if end < 0 or message["content"].strip() not in text:
        expected = "a final message that the chat template writes as it stands"
        raise InvalidRequest("prompt.chat.continue_final_message", True, expected)
    return text[:end] if text.startswith(CONTINUED, end) else text[:end].rstrip()


def _broken(error: Exception) -> CheckpointError:
    reason = shown_text(str(error) or type(error).__name__)
    return CheckpointError(f"its chat template cannot be compiled: {reason}")


def _environment() -> ImmutableSandboxedEnvironment:
    """Renders as that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        optimized=False,  # so that compiling computes nothing
        finalize=_unfolded,
    )
    environment.filters["tojson"] = _to_json  # jinja2's own escapes for HTML
    environment.globals |= {
        "dict": _Dict(),
        "namespace": _Namespace,
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
    }
    return environment


@pass_context  # jinja2 computes output that needs no context when it compiles
def _unfolded(_: Context, value: Any) -> Any:
    return value


class _Generation(Extension):
    """`{% generation %}` marks the assistant's output for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """Python's dict, without the attributes by which a template could reach Python's own."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """Excludes attributes by which a template could reach Python's own."""

    def __init__(self, /, *values: Any, **named: Any) -> None:
        super().__init__()
        for name, value in dict(*values, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
