"""Sampling parameters: from a client's message to those that workers follow."""

from collections.abc import Sequence

from ..core.config import LimitsSection
from ..core.errors import InvalidRequest, joined
from ..core.request import DefaultSampling, SamplingParams
from ..core.validation import sampling_problems
from ..proto import pdserve_pb2 as pb

NO_DEFAULTS = DefaultSampling()
_APART = ("constraint", "bad_words")  # they need other processes


def only_scores(message: pb.SamplingParams) -> bool:
    """Returns whether the log probabilities of the prompt are all that a request is for."""
    return message.HasField("max_tokens") and not message.max_tokens and message.HasField("prompt_logprobs")


def sampling_params(
    message: pb.SamplingParams, default_seed: int, defaults: DefaultSampling = NO_DEFAULTS
) -> SamplingParams:
    """Returns the parameters as set, except a constraint and bad words, with the model's `defaults` for the
    rest. `core.validation` checks ranges."""
    values = defaults.stated | {
        descriptor.name: value for descriptor, value in message.ListFields() if descriptor.name not in _APART
    }
    for name in ("stop", "stop_token_ids"):
        values[name] = tuple(values.get(name, ()))
    values["logit_bias"] = tuple(sorted(message.logit_bias.items()))
    values.setdefault("seed", default_seed)
    if only_scores(message):
        values["max_tokens"] = 1  # the prompt's log probabilities come with it; `answer` leaves it out
    return SamplingParams(**values)


def with_sampling(
    found: Sequence[InvalidRequest], message: pb.SamplingParams, limits: LimitsSection
) -> InvalidRequest:
    """Returns the refusal of what was found, together with what is wrong in `message`."""
    return joined([*found, *sampling_problems(sampling_params(message, 0), limits)])
