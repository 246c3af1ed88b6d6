"""A client's request, made once by a gateway and immutable from then on, and the part of it that a dispatch
sends to workers.

A router keeps very many of these values, and none is ever in a cycle: the garbage collector passes them
over."""

import enum
from typing import Any

import msgspec

from . import token_ids


class FinishReason(enum.Enum):
    """Why a choice ended; every choice has exactly one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    INVALID = "invalid"  # no worker could carry it out, which showed only on the way
    ERROR = "error"
    FATAL = "fatal"  # workers' processes died of it: it is not to be sent again


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """How tokens are drawn. Defaults are those of the OpenAI and vLLM interfaces; `core.validation` checks
    the ranges."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token_id, what is added to its logit), each token once
    seed: int = 0  # unsigned 64 bits; a gateway draws one when the client gave none
    n: int = 1
    stop: tuple[str, ...] = ()  # looked for in the text, by the gateway
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives to report beside each token; None: no logprobs at all
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first; None: none
    # token sequences that no output has
    bad_words: tuple[tuple[int, ...], ...] = ()
    # that the output follows, in llguidance's text form; a gateway has checked it; "": none
    grammar: str = ""


class DefaultSampling(msgspec.Struct, frozen=True, kw_only=True):
    """The values that a served model has for a request that leaves these fields unset; None: those of
    `SamplingParams`."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def stated(self) -> dict[str, Any]:
        """The values that are not None, by the names that they have in `SamplingParams`."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One validated request: prompt tokens and how to continue them."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""  # requests share cached prefixes only within one salt
    deadline_s: float | None = None  # on the router's monotonic clock
    client: str = ""  # whom it counts for when clients take turns
    turn: str = ""  # its user or connection, which takes turns with the client's others
    weight: float = 1.0  # of its client: the share of the tokens that it gets beside others
    priority: int = 0  # the lower is served earlier
    user: str = ""  # as its client named it, for operators; changes nothing of what is done
    traceparent: str = ""  # the client's span, as in W3C Trace Context; changes nothing of what is done
    only_scores: bool = False  # its client gets the prompt's log probabilities, and not the token behind them
    has_tools: bool = False  # its output may have tool calls in it, which the gateway separates from the text


class TransferId(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One dispatch of a request (or of one of its choices) to workers. `attempt` counts the dispatches of all
    requests, so a late message of an earlier one never fits a later one, also when a client uses its id
    again."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"

    @property
    def log_fields(self) -> dict[str, object]:
        """`extra` of a log record about it."""
        return {"request_id": self.request_id, "attempt": self.attempt}


class SequenceSpec(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The work that one dispatch assigns to a worker: continue `prompt + output_token_ids` for each of
    `choices`.

    A fresh request lists all its choices and no output. After a failure each unfinished choice is dispatched
    by itself, with the tokens its client already has in `output_token_ids`."""

    transfer: TransferId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    choices: tuple[int, ...] = (0,)
    output_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    client: str = ""  # whom it counts for where clients take turns
    priority: int = 0  # the lower is computed earlier

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens whose KV must exist before the next token can be sampled."""
        return self.prompt_token_ids + self.output_token_ids

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """They belong to the first token of choice 0, and travel with it; the whole prompt has to be computed
        for them."""
        return self.sampling.prompt_logprobs is not None and 0 in self.choices and not self.output_token_ids


class HeldSpec(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A `SequenceSpec` as its worker reports it to another router. That needs the prompt only to recognise
    the request: a client that comes back brings the prompt along."""

    transfer: TransferId
    num_prompt_tokens: int
    prompt_digest: bytes
    sampling: SamplingParams
    choices: tuple[int, ...] = (0,)
    packed_output: bytes = b""  # `output_token_ids`
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    client: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        token_ids.check("packed_output", self.packed_output)

    @classmethod
    def of(cls, spec: SequenceSpec) -> "HeldSpec":
        return cls(
            transfer=spec.transfer,
            num_prompt_tokens=len(spec.prompt_token_ids),
            prompt_digest=token_ids.digest(spec.prompt_token_ids),
            choices=spec.choices,
            packed_output=token_ids.packed(spec.output_token_ids),
            client=spec.client,
            **{name: getattr(spec, name) for name in HELD_FIELDS},
        )

    @property
    def num_output_tokens(self) -> int:
        return len(self.packed_output) // token_ids.ITEM_BYTES

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        return tuple(token_ids.unpacked(self.packed_output))

    @property
    def identity(self) -> tuple[object, ...]:
        """All that it has of the client's request: equal to `identity_of` that."""
        return (self.transfer.request_id, self.num_prompt_tokens, self.prompt_digest, *_held_fields(self))

    def request(self) -> Request:
        """Restores the client's request, without its prompt."""
        fields = zip(HELD_FIELDS, _held_fields(self), strict=True)
        return Request(request_id=self.transfer.request_id, prompt_token_ids=(), **dict(fields))


# the fields of a Request that workers have too
SHARED_FIELDS = tuple(
    name
    for name in Request.__struct_fields__
    if name in SequenceSpec.__struct_fields__ and name != "client"  # which its client states again
)
# of those, the ones that workers report to another router
HELD_FIELDS = tuple(name for name in SHARED_FIELDS if name in HeldSpec.__struct_fields__)


def identity_of(request: Request) -> tuple[object, ...]:
    """Returns a value that is equal for requests that are equal in all that workers report of them."""
    prompt = request.prompt_token_ids
    return (request.request_id, len(prompt), token_ids.digest(prompt), *_held_fields(request))


def _held_fields(of: Request | HeldSpec) -> list[Any]:
    return [getattr(of, name) for name in HELD_FIELDS]


def shared_fields(of: Request) -> dict[str, Any]:
    """Returns the values of `SHARED_FIELDS`."""
    return {name: getattr(of, name) for name in SHARED_FIELDS}
