"""A checkpoint's chat template: a conversation in, the prompt's text out. Clients cannot supply templates.

It runs in a sandbox, with the functions that transformers offers to templates, and within bounds of time and
memory (`template/`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import nodes

from ...core.checkpoint_files import shown_text
from ...core.errors import CheckpointError, InvalidRequest
from .template.account import MAX_BYTES, TemplateBound, check_chars, open_account
from .template.sandbox import Sandbox

TIMEOUT_S = 1.0


class TooCostly(InvalidRequest):
    """The template exceeds its time or memory bound on a conversation."""


class ChatTemplate:
    """One compiled template. Renders on any thread."""

    def __init__(self, source: str, special_tokens: Mapping[str, object]) -> None:
        """Raises CheckpointError if `source` is not a template."""
        sandbox = Sandbox()
        try:
            parsed = sandbox.parsed(source)
            self.takes_tools = any(name.name == "tools" for name in parsed.find_all(nodes.Name))
            self._template = sandbox.compiled(parsed)
        except (
            Exception
        ) as error:  # jinja2's errors, and Python's for deep nesting and long numbers: it is third-party code
            reason = shown_text(str(error) or type(error).__name__)
            raise CheckpointError(f"its chat template cannot be compiled: {reason}") from error
        self.source = source
        self.takes_calls = "tool_calls" in source
        self._special_tokens = {
            name: str(token) for name, token in special_tokens.items() if isinstance(token, str)
        }

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        timeout_s: float = TIMEOUT_S,
        max_bytes: int = MAX_BYTES,
    ) -> str:
        """Renders the conversation as text, with `tools` in OpenAI's format. Raises InvalidRequest, or
        TooCostly."""
        variables = self._special_tokens | {
            "messages": [dict(message) for message in messages],
            "tools": tools,
        }
        open_account(timeout_s, max_bytes)
        try:
            return self._text(variables | {"documents": None, "add_generation_prompt": add_generation_prompt})
        except TemplateBound as error:
            raise TooCostly("prompt.chat", f"{len(messages)} message(s)", str(error)) from error
        except (
            Exception
        ) as error:  # the template refuses, or fails on unexpected input: it is third-party code
            reason = str(error) or type(error).__name__
            raise InvalidRequest("prompt.chat", [message["role"] for message in messages], reason) from error

    def _text(self, variables: Mapping[str, Any]) -> str:
        parts, num_chars = [], 0
        for part in self._template.generate(variables):
            num_chars += len(part)
            check_chars(num_chars)
            parts.append(part)
        return "".join(parts)
