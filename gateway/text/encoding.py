"""Renders conversations and encodes prompts to token ids, within bounds."""

from ...core.errors import context_length_exceeded
from ...core.limited_process import OutOfTime, soft_limits
from ...core.validation import check_prompt_length
from ...proto import pdserve_pb2 as pb
from ..tools.conversation import opens_answer, template_messages, template_options
from ..tools.offer import OfferedTools
from ..vetting import Fit, RequestBounds, check_chars, check_counted
from .chat_template import ChatTemplates, TooCostly
from .tokenizer import Tokenizer

SLICE_CHARS = 1 << 16
RENDER_S = 1.0  # of processor time
RENDER_BYTES = 256 << 20  # of memory that a template takes
USUAL_CHARS = 8  # of a token, at most, in natural text


def bounded_ids(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, bounds: RequestBounds, fit: Fit = Fit.REQUEST
) -> tuple[int, ...]:
    """Returns the token ids of `text`. Raises InvalidRequest for more than `fit` allows, with their number if
    the excess is moderate."""
    check_chars(len(text), bounds)
    if fit is not Fit.TRUNCATED:
        max_tokens = bounds.max_counted_tokens if fit is Fit.COUNTED else bounds.max_prompt_tokens
        if len(text) > max(USUAL_CHARS * max_tokens, SLICE_CHARS):
            _check_slices(tokenizer, text, max_tokens, bounds)
    token_ids = tokenizer.encode(text, add_special_tokens)
    if fit is Fit.REQUEST:
        check_prompt_length(len(token_ids), bounds.limits, bounds.max_model_len)
    elif fit is Fit.COUNTED:
        check_counted(len(token_ids), bounds)
    return token_ids


def _check_slices(tokenizer: Tokenizer, text: str, max_tokens: int, bounds: RequestBounds) -> None:
    """Counts a text slice by slice if it is longer than `max_tokens` tokens usually are, so that most of a
    far too long text is never processed. A cut splits tokens: hence twice as many are admitted, to be counted
    as a whole."""
    num_tokens = 0
    for start in range(0, len(text), SLICE_CHARS):
        num_tokens += tokenizer.count(text[start : start + SLICE_CHARS])
        if num_tokens > 2 * max_tokens:
            expected = f"at most {max_tokens} tokens"
            raise context_length_exceeded(
                "prompt", f"more than {2 * max_tokens} tokens", expected, bounds.max_context
            )


def chat_text(
    templates: ChatTemplates, chat: pb.Chat, offer: OfferedTools | None, cpu_s: float = RENDER_S
) -> str:
    """Renders a conversation with the checkpoint's template and its tools, within limits: only for a process
    that has limits itself, on its main thread. Raises InvalidRequest, or TooCostly."""
    messages = template_messages(chat, takes_calls=templates.takes_calls or not templates.can_render)
    tools = None if offer is None else [tool.for_template() for tool in offer.tools]
    try:
        with soft_limits(cpu_s, RENDER_BYTES):
            return templates.render(messages, opens_answer(chat), tools, template_options(chat))
    except (OutOfTime, MemoryError):
        expected = (
            f"a conversation that the chat template renders in {cpu_s:g} s and {RENDER_BYTES >> 20} MiB"
        )
        raise TooCostly("prompt.chat", f"{len(messages)} message(s)", expected) from None
