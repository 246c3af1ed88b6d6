"""Translates a JSON body to the same messages that gRPC clients send."""

from collections.abc import Sequence
from typing import Any

from ...core.config import LimitsSection
from ...core.errors import InvalidRequest
from ...core.validation import check_counts, check_name
from ...proto import pdserve_pb2 as pb
from .chat import chat_prompt, set_choice
from .chat_schema import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from .constraint import constraint_message
from .schema import CompletionRequest, GenerationBody

# fields that have the same name and meaning in SamplingParams
_SAME = ("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
         "frequency_penalty", "n", "stop", "stop_token_ids", "ignore_eos")  # fmt: skip


def completion_messages(
    body: CompletionRequest, request_id: str, limits: LimitsSection
) -> list[pb.GenerateRequest]:
    """Returns one message for each prompt, of which there is at least one. Raises InvalidRequest."""
    if len(body.prompt) > limits.max_prompts:
        raise InvalidRequest("prompt", f"{len(body.prompt)} prompts", f"at most {limits.max_prompts} prompts")
    if body.suffix:
        raise InvalidRequest("suffix", body.suffix, "nothing: the model continues its prompt only")
    if body.best_of not in (None, body.n or 1):
        raise InvalidRequest("best_of", body.best_of, "n: all choices are returned")
    sampling = _sampling(body, limits, body.logprobs)
    if body.echo and body.logprobs is not None:
        _set(sampling, "prompt_logprobs", body.logprobs)
    names = (
        [request_id]
        if len(body.prompt) == 1 or not request_id
        else [f"{request_id}-{i}" for i in range(len(body.prompt))]
    )
    names *= len(body.prompt) // len(names)
    return [
        _message(body, _prompt(prompt, body.add_special_tokens), sampling, name)
        for prompt, name in zip(body.prompt, names, strict=True)
    ]


def chat_message(body: ChatCompletionRequest, request_id: str, limits: LimitsSection) -> pb.GenerateRequest:
    """Raises InvalidRequest."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs", body.top_logprobs, "nothing without logprobs")
    sampling = _sampling(body, limits, body.top_logprobs or 0 if body.logprobs else None)
    prompt = chat_prompt(body.messages, body.tools, body.add_generation_prompt)
    set_choice(prompt.chat, body)
    return _message(body, prompt, sampling, request_id)


def tokenize_message(body: TokenizeRequest) -> pb.TokenizeRequest:
    """Raises InvalidRequest."""
    has_messages = "messages" in body.model_fields_set
    if (body.prompt is not None) is has_messages:
        raise InvalidRequest("prompt", "", "either prompt or messages")
    if has_messages:
        return pb.TokenizeRequest(
            model=body.model, prompt=chat_prompt(body.messages, body.tools, body.add_generation_prompt)
        )
    if body.tools:
        raise InvalidRequest("tools", f"{len(body.tools)} tool(s)", "none without messages")
    return pb.TokenizeRequest(model=body.model, prompt=_prompt(body.prompt or "", body.add_special_tokens))


def detokenize_message(body: DetokenizeRequest) -> pb.DetokenizeRequest:
    """Raises InvalidRequest."""
    return pb.DetokenizeRequest(model=body.model, token_ids=token_ids("token_ids", body.tokens))


def token_ids(field: str, ids: Sequence[int]) -> Sequence[int]:
    """Raises InvalidRequest for a number that is a token id in no vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < 2**32):
        index = list(map(range(2**32).__contains__, ids)).index(False)
        raise InvalidRequest(f"{field}[{index}]", ids[index], "a token id")
    return ids


def _message(
    body: GenerationBody, prompt: pb.Prompt, sampling: pb.SamplingParams, request_id: str
) -> pb.GenerateRequest:
    check_name("user", body.user)  # here, where the field has the name that its client used
    return pb.GenerateRequest(
        model=body.model,
        prompt=prompt,
        sampling=sampling,
        request_id=request_id,
        cache_salt=body.cache_salt,
        client_id=body.user,
        priority=None if body.priority is None else _int32("priority", body.priority),
    )


def _int32(field: str, value: int) -> int:
    """Raises InvalidRequest for a number that the message cannot hold."""
    if not -(2**31) <= value < 2**31:
        raise InvalidRequest(field, value, "a number of 32 bits")
    return value


def _prompt(prompt: str | list[int], add_special_tokens: bool) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt, add_special_tokens=add_special_tokens)
    return pb.Prompt(token_ids=pb.TokenIds(ids=token_ids("prompt_token_ids", prompt)))


def _sampling(body: GenerationBody, limits: LimitsSection, logprobs: int | None) -> pb.SamplingParams:
    _refuse_unserved(body)
    check_counts(
        limits,
        num_biases=len(body.logit_bias or ()),
        num_stops=len(body.stop),
        num_stop_token_ids=len(body.stop_token_ids),
    )
    values = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if values.get("top_k") == -1:
        values["top_k"] = 0
    if logprobs is not None:
        values["logprobs"] = logprobs
    if body.seed is not None:
        values["seed"] = _seed(body.seed)
    if (max_tokens := _max_tokens(body)) is not None:
        values["max_tokens"] = max_tokens
    token_ids("stop_token_ids", values.get("stop_token_ids", ()))
    sampling = pb.SamplingParams()
    for name, value in values.items():
        _set(sampling, name, value)
    for token, bias in (body.logit_bias or {}).items():
        sampling.logit_bias[_biased(token)] = bias
    if (constraint := constraint_message(body)) is not None:
        sampling.constraint.CopyFrom(constraint)
    return sampling


def _biased(token: str) -> int:
    """JSON keys are always strings."""
    if not (token.isascii() and token.isdigit() and len(token) < 10):
        raise InvalidRequest("logit_bias", token, "token ids for keys")
    return int(token)


def _set(sampling: pb.SamplingParams, name: str, value: Any) -> None:
    if isinstance(value, list):
        getattr(sampling, name).extend(value)
        return
    try:
        setattr(sampling, name, value)
    except ValueError:
        raise InvalidRequest(name, value, "an integer of 32 bits") from None


def _seed(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise InvalidRequest("seed", seed, "an integer of 64 bits")
    return seed % 2**64


def _max_tokens(body: GenerationBody) -> int | None:
    if body.max_tokens is None or body.max_completion_tokens is None:
        return body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if body.max_tokens != body.max_completion_tokens:
        raise InvalidRequest(
            "max_completion_tokens", body.max_completion_tokens, f"max_tokens ({body.max_tokens})"
        )
    return body.max_tokens


def _refuse_unserved(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "", "nothing without stream")
