"""The price of a request in units of its key's quota per minute, and the account of a request in progress.
Pure.

A price is fixed before any of the work, from the message alone: a text is estimated at one token per four
characters, about right for English; other scripts may have more. Once the tokens are counted the account is
corrected, and at the end the output that was not produced is refunded. So with no request in progress, a
bucket has lost exactly what was used.

A token that is reported with k alternatives counts 1 + k/10, as each alternative is sorted, stored and sent.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...core.config import LimitsSection
from ...core.errors import NoWorkerAvailable, QueueFull
from ...core.request import SamplingParams
from ...proto import pdserve_pb2 as pb
from .rate_limit import TokenBucket

CHARS_PER_TOKEN = 4
ALTERNATIVES_PER_TOKEN = 10
_DEFAULTS = SamplingParams()


@dataclass(frozen=True, kw_only=True)
class RequestPrice:
    """The most that a request can cost, as far as is known before it is tokenised."""

    num_prompt_tokens: int  # estimated, unless token ids are given
    num_choices: int = 1
    max_tokens: int = 0  # per choice
    num_prompt_alternatives: int = 0
    num_alternatives: int = 0
    is_text: bool = True  # some work precedes the submission to the cluster

    def tokens(self, num_prompt: int, num_output: int) -> int:
        """The price in tokens of a prompt and the output of all choices; the sum is rounded up."""
        prompt = num_prompt * (ALTERNATIVES_PER_TOKEN + self.num_prompt_alternatives)
        output = num_output * (ALTERNATIVES_PER_TOKEN + self.num_alternatives)
        return -(-(prompt + output) // ALTERNATIVES_PER_TOKEN)

    @property
    def max_output_tokens(self) -> int:
        return self.num_choices * self.max_tokens


def prompt_price(prompt: pb.Prompt) -> RequestPrice:
    """The price of a prompt alone, e.g. for tokenising it."""
    kind = prompt.WhichOneof("kind")
    if kind == "token_ids":
        return RequestPrice(num_prompt_tokens=len(prompt.token_ids.ids), is_text=False)
    num_chars = prompt.chat.ByteSize() if kind == "chat" else len(prompt.text)
    return RequestPrice(num_prompt_tokens=estimated_tokens(num_chars))


def request_price(
    message: pb.GenerateRequest, limits: LimitsSection, max_model_len: int, fills: bool
) -> RequestPrice:
    """The price of a request. Values beyond the limits, which will be refused, count as the limits. `fills`:
    without `max_tokens` each choice may use all the remaining room."""
    prompt, sampling = prompt_price(message.prompt), message.sampling
    most = min(limits.max_tokens, max_model_len)
    default = max_model_len - prompt.num_prompt_tokens if fills else _DEFAULTS.max_tokens
    return RequestPrice(
        num_prompt_tokens=prompt.num_prompt_tokens,
        num_choices=_within(sampling.n if sampling.HasField("n") else 1, 1, limits.max_n),
        max_tokens=_within(sampling.max_tokens if sampling.HasField("max_tokens") else default, 1, most),
        num_prompt_alternatives=_within(sampling.prompt_logprobs, 0, limits.max_logprobs),
        num_alternatives=_within(sampling.logprobs, 0, limits.max_logprobs),
        is_text=prompt.is_text,
    )


def estimated_tokens(num_chars: int) -> int:
    return max(1, -(-num_chars // CHARS_PER_TOKEN))


def _within(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


class Charge:
    """The account of one request with its key's bucket: the maximum is charged first, and the unused part
    refunded at the end."""

    def __init__(self, price: RequestPrice, bucket: TokenBucket | None) -> None:
        """`price` has already been taken from `bucket`; without a bucket nothing is counted."""
        self._price = price
        self._bucket = bucket
        self._num_prompt = price.num_prompt_tokens
        self._max_output = price.max_output_tokens
        self._taken = price.tokens(self._num_prompt, self._max_output)
        self._is_prompt_used = False

    @staticmethod
    def free() -> "Charge":
        """Returns an account for clients that are not metered."""
        return Charge(RequestPrice(num_prompt_tokens=0), None)

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Wraps the tokenisation of the prompt. From here on the prompt is charged whatever becomes of the
        request, unless there is no capacity for the work; all refusals that need no tokenisation come
        earlier."""
        self._is_prompt_used = self._price.is_text
        try:
            yield
        except (QueueFull, NoWorkerAvailable):
            self._is_prompt_used = False
            raise

    def settle_prompt(self, num_tokens: int, now_s: float) -> None:
        """Corrects the price to the counted prompt, before any of it is cut off."""
        self._num_prompt = num_tokens
        self._correct(self._price.tokens(self._num_prompt, self._max_output), now_s)

    def settle_room(self, max_output_tokens: int, now_s: float) -> None:
        """Corrects the price to the room for output, which may depend on the prompt."""
        self._max_output = max_output_tokens
        self._correct(self._price.tokens(self._num_prompt, self._max_output), now_s)

    def settle(self, num_output_tokens: int, now_s: float, has_begun: bool = True) -> None:
        """Ends the request: refunds what was not used, including the prompt if nothing was done with it. Call
        once."""
        is_used = has_begun or self._is_prompt_used
        self._correct(self._price.tokens(self._num_prompt if is_used else 0, num_output_tokens), now_s)
        self._bucket = None

    def _correct(self, price: int, now_s: float) -> None:
        if self._bucket is not None:
            self._bucket.give_back(self._taken - price, now_s)
            self._taken = price
