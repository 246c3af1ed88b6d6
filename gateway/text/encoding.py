"""Renders conversations and encodes prompts to token ids, within bounds."""

from ...core.errors import InvalidRequest
from ...core.limited_process import OutOfTime, soft_limits
from ...core.validation import check_prompt_length
from ...proto import pdserve_pb2 as pb
from ..tools.conversation import template_messages
from ..tools.offer import OfferedTools
from ..vetting import Bounds, check_chars, check_counted
from .chat_template import ChatTemplates, TooCostly
from .tokenizer import Tokenizer

SLICE_CHARS = 1 << 16
RENDER_S = 1.0  # of processor time
RENDER_BYTES = 256 << 20  # of memory that a template takes
USUAL_CHARS = 8  # of a token, at most, in natural text


def bounded_ids(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, bounds: Bounds, is_counted: bool = False
) -> tuple[int, ...]:
    """Returns the token ids of `text`. `is_counted`: for Tokenize, which accepts twice as many as a request.
    Raises InvalidRequest for more, with their number if the excess is moderate."""
    check_chars(len(text), bounds)
    max_tokens = bounds.max_counted_tokens if is_counted else bounds.max_prompt_tokens
    if len(text) > max(USUAL_CHARS * max_tokens, SLICE_CHARS):
        _check_slices(tokenizer, text, max_tokens)
    token_ids = tokenizer.encode(text, add_special_tokens)
    check_num_tokens(len(token_ids), bounds, is_counted)
    return token_ids


def check_num_tokens(num_tokens: int, bounds: Bounds, is_counted: bool) -> None:
    """Raises InvalidRequest."""
    if is_counted:
        check_counted(num_tokens, bounds)
    else:
        check_prompt_length(num_tokens, bounds.limits, bounds.max_model_len)


def _check_slices(tokenizer: Tokenizer, text: str, max_tokens: int) -> None:
    """Counts a text slice by slice if it is longer than `max_tokens` tokens usually are, so that most of a
    far too long text is never processed. A cut splits tokens: hence twice as many are admitted, to be counted
    as a whole."""
    num_tokens = 0
    for start in range(0, len(text), SLICE_CHARS):
        num_tokens += tokenizer.count(text[start : start + SLICE_CHARS])
        if num_tokens > 2 * max_tokens:
            raise InvalidRequest(
                "prompt", f"more than {2 * max_tokens} tokens", f"at most {max_tokens} tokens"
            )


def chat_text(
    templates: ChatTemplates, chat: pb.Chat, offer: OfferedTools | None, cpu_s: float = RENDER_S
) -> str:
    """Renders a conversation with the checkpoint's template and its tools, within limits: only for a process
    that has limits itself, on its main thread. Raises InvalidRequest, or TooCostly."""
    messages = template_messages(chat, takes_calls=templates.takes_calls or not templates.can_render)
    add = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    tools = None if offer is None else [tool.for_template() for tool in offer.tools]
    try:
        with soft_limits(cpu_s, RENDER_BYTES):
            return templates.render(messages, add, tools)
    except (OutOfTime, MemoryError):
        expected = (
            f"a conversation that the chat template renders in {cpu_s:g} s and {RENDER_BYTES >> 20} MiB"
        )
        raise TooCostly("prompt.chat", f"{len(messages)} message(s)", expected) from None
