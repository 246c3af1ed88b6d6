"""The formats of tool calls, as the checkpoint's chat template shows them to the model. A call is written as
one JSON object."""

import enum


class ToolFormat(enum.Enum):
    """Named after the models that introduced them."""

    HERMES = "hermes"  # text, then for each call: <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>
    LLAMA3 = "llama3"  # text, or one call and nothing else: {"name": ..., "parameters": ...}
    MISTRAL = "mistral"  # text, then all calls: [TOOL_CALLS][{"name": ..., "arguments": ...}, ...]

    @property
    def marker(self) -> str:
        """The end of the text before a call; empty where calls have no text before them."""
        return _MARKERS[self]

    @property
    def markers(self) -> tuple[str, ...]:
        """All texts with a meaning in this format, where they are tokens of their own."""
        return _ALL_MARKERS[self]

    @property
    def arguments_key(self) -> str:
        return "parameters" if self is ToolFormat.LLAMA3 else "arguments"


CLOSING = "</tool_call>"  # ends a call of Hermes
PYTHON_TAG = "<|python_tag|>"  # may begin a call of Llama 3
_ALL_MARKERS = {
    ToolFormat.HERMES: ("<tool_call>", CLOSING),
    ToolFormat.LLAMA3: (PYTHON_TAG,),
    ToolFormat.MISTRAL: ("[TOOL_CALLS]",),
}
_MARKERS = {ToolFormat.HERMES: "<tool_call>", ToolFormat.LLAMA3: "", ToolFormat.MISTRAL: "[TOOL_CALLS]"}


def tool_format(template: str) -> ToolFormat | None:
    """Returns the format that a chat template of this source shows its model; None if it is unsupported.
    Other formats use some of the same markers around something other than JSON with these keys."""
    if "<tool_call>" in template and '"arguments' in template:
        return ToolFormat.HERMES
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
        return ToolFormat.MISTRAL
    if "<|start_header_id|>" in template and '"parameters' in template:
        return ToolFormat.LLAMA3
    return None
