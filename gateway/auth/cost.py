"""The price of a request, in what its key may use per minute, and the account of one that is being carried
out. Pure.

A price is fixed before any of the work, from what the message says: a text is taken to have a token in four
characters, about as English has them; in other scripts it may have more. Once its tokens are counted the
account is corrected, and at the end what was not produced is given back. So a bucket has lost exactly what
was used, when nothing is under way.

A token that is reported with k alternatives counts 1 + k/10: each alternative is sorted out, kept and sent.
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
class Price:
    """The most that a request can cost, by what is known before it is tokenised."""

    num_prompt_tokens: int  # estimated, unless they are given
    num_choices: int = 1
    max_tokens: int = 0  # of each choice
    num_prompt_alternatives: int = 0
    num_alternatives: int = 0
    is_text: bool = True  # there is work before the cluster hears of it

    def tokens(self, num_prompt: int, num_output: int) -> int:
        """The price in tokens of a prompt and of the output of all choices, rounded up in sum."""
        prompt = num_prompt * (ALTERNATIVES_PER_TOKEN + self.num_prompt_alternatives)
        output = num_output * (ALTERNATIVES_PER_TOKEN + self.num_alternatives)
        return -(-(prompt + output) // ALTERNATIVES_PER_TOKEN)

    @property
    def max_output_tokens(self) -> int:
        return self.num_choices * self.max_tokens


def prompt_price(prompt: pb.Prompt) -> Price:
    """The price of a prompt alone, as for tokenising it."""
    kind = prompt.WhichOneof("kind")
    if kind == "token_ids":
        return Price(num_prompt_tokens=len(prompt.token_ids.ids), is_text=False)
    num_chars = prompt.chat.ByteSize() if kind == "chat" else len(prompt.text)
    return Price(num_prompt_tokens=estimated_tokens(num_chars))


def request_price(
    message: pb.GenerateRequest, limits: LimitsSection, max_model_len: int, fills: bool
) -> Price:
    """The price of a request. What goes beyond the limits will be refused, and counts as far as they go.
    `fills`: without `max_tokens` each choice may use all the room that there is."""
    prompt, sampling = prompt_price(message.prompt), message.sampling
    most = min(limits.max_tokens, max_model_len)
    default = max_model_len - prompt.num_prompt_tokens if fills else _DEFAULTS.max_tokens
    return Price(
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
    """The account of one request with its key's bucket: at first all that it may use is taken, in the end
    what it did use."""

    def __init__(self, price: Price, bucket: TokenBucket | None) -> None:
        """`price` has been taken of `bucket` already; without a bucket nothing is counted."""
        self._price = price
        self._bucket = bucket
        self._num_prompt = price.num_prompt_tokens
        self._max_output = price.max_output_tokens
        self._taken = price.tokens(self._num_prompt, self._max_output)
        self._is_prompt_used = False

    @staticmethod
    def free() -> "Charge":
        """For clients that nothing is counted for."""
        return Charge(Price(num_prompt_tokens=0), None)

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Around turning the prompt into tokens. It is paid for from here on, whatever becomes of the
        request, unless there is no place for the work; what can be refused without it has been refused
        before."""
        self._is_prompt_used = self._price.is_text
        try:
            yield
        except (QueueFull, NoWorkerAvailable):
            self._is_prompt_used = False
            raise

    def settle_prompt(self, num_tokens: int, now_s: float, max_output_tokens: int | None = None) -> None:
        """The prompt has been counted, and with it the room for output where that depended on it."""
        self._num_prompt = num_tokens
        if max_output_tokens is not None:
            self._max_output = max_output_tokens
        self._correct(self._price.tokens(self._num_prompt, self._max_output), now_s)

    def settle(self, num_output_tokens: int, now_s: float, has_begun: bool = True) -> None:
        """The request is over: give back what was not used, which is the prompt too if nothing was done with
        it. Once."""
        is_used = has_begun or self._is_prompt_used
        self._correct(self._price.tokens(self._num_prompt if is_used else 0, num_output_tokens), now_s)
        self._bucket = None

    def _correct(self, price: int, now_s: float) -> None:
        if self._bucket is not None:
            self._bucket.give_back(self._taken - price, now_s)
            self._taken = price
