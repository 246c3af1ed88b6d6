"""Translates a JSON body to the same messages that gRPC clients send."""

from collections.abc import Sequence
from typing import Any

from ...core.config import LimitsSection
from ...core.errors import MISSING, InvalidRequest
from ...core.validation import count_problems
from ...proto import pdserve_pb2 as pb
from ..auth.keys import PRIORITIES
from .chat import chat_prompt, set_choice
from .chat_schema import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from .constraint import constraint_message
from .schema import CompletionRequest, GenerationBody

# fields that have the same name and meaning in SamplingParams
_SAME = ("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
         "frequency_penalty", "n", "stop", "stop_token_ids", "ignore_eos", "bad_words")  # fmt: skip


MAX_TEMPERATURE = 2.0  # as at OpenAI; over gRPC more


def completion_messages(
    body: CompletionRequest, request_id: str, limits: LimitsSection, found: list[InvalidRequest]
) -> list[pb.GenerateRequest]:
    """Returns one message for each prompt, of which there is at least one; adds what is wrong to `found`, and
    leaves it out. Raises InvalidRequest for too many."""
    if len(body.prompt) > limits.max_prompts:
        raise InvalidRequest("prompt", f"{len(body.prompt)} prompts", f"at most {limits.max_prompts} prompts")
    if not body.prompt:
        found.append(InvalidRequest("prompt", body.prompt, "at least one prompt"))
    if body.suffix:
        found.append(InvalidRequest("suffix", body.suffix, "nothing: the model continues its prompt only"))
    if body.best_of not in (None, body.n or 1):
        found.append(InvalidRequest("best_of", body.best_of, "n: all choices are returned"))
    sampling = _sampling(body, limits, body.logprobs, found)
    if body.echo and (
        body.logprobs is not None or (sampling.max_tokens == 0 and sampling.HasField("max_tokens"))
    ):
        _set(sampling, "prompt_logprobs", body.logprobs or 0, found)
    names = [request_id]
    if len(body.prompt) > 1:
        names = [f"{request_id}-{i}" if request_id else "" for i in range(len(body.prompt))]
    return [
        _message(body, _prompt(body, prompt, found), sampling, name)
        for prompt, name in zip(body.prompt, names, strict=False)
    ]


def chat_message(
    body: ChatCompletionRequest, request_id: str, limits: LimitsSection, found: list[InvalidRequest]
) -> pb.GenerateRequest:
    """Adds what is wrong to `found`, and leaves it out."""
    if body.top_logprobs and not body.logprobs:
        found.append(InvalidRequest("top_logprobs", body.top_logprobs, "nothing without logprobs"))
    sampling = _sampling(body, limits, body.top_logprobs or 0 if body.logprobs else None, found)
    prompt = chat_prompt(body, found)
    set_choice(prompt.chat, body)
    _truncate(body, prompt, found)
    return _message(body, prompt, sampling, request_id)


def tokenize_message(body: TokenizeRequest, found: list[InvalidRequest]) -> pb.TokenizeRequest:
    """Adds what is wrong to `found`."""
    has_messages = "messages" in body.model_fields_set
    if (body.prompt is not None) is has_messages:
        found.append(InvalidRequest("prompt", body.prompt or MISSING, "either prompt or messages"))
    if has_messages:
        prompt = chat_prompt(body, found)
    else:
        prompt = pb.Prompt(text=body.prompt or "", add_special_tokens=body.add_special_tokens)
        found += [
            InvalidRequest(
                name, f"{len(value)} {name}" if isinstance(value, list) else value, "none without messages"
            )
            for name in ("tools", "documents", "chat_template_kwargs", "continue_final_message")
            if (value := getattr(body, name))
        ]
    return pb.TokenizeRequest(model=body.model, prompt=prompt)


def detokenize_message(body: DetokenizeRequest, found: list[InvalidRequest]) -> pb.DetokenizeRequest:
    """Adds what is wrong to `found`."""
    return pb.DetokenizeRequest(model=body.model, token_ids=_token_ids("token_ids", body.tokens, found))


def _token_ids(field: str, ids: Sequence[int], found: list[InvalidRequest]) -> Sequence[int]:
    """Adds a number that is a token id in no vocabulary to `found`, and returns none then."""
    if ids and not (min(ids) >= 0 and max(ids) < 2**32):
        index = list(map(range(2**32).__contains__, ids)).index(False)
        found.append(InvalidRequest(f"{field}[{index}]", ids[index], "a token id"))
        return ()
    return ids


def _message(
    body: GenerationBody, prompt: pb.Prompt, sampling: pb.SamplingParams, request_id: str
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=body.model,
        prompt=prompt,
        sampling=sampling,
        request_id=request_id,
        cache_salt=body.cache_salt,
        client_id=body.user,
        priority=body.priority if body.priority in PRIORITIES else None,
    )


def _prompt(body: CompletionRequest, given: str | list[int], found: list[InvalidRequest]) -> pb.Prompt:
    if isinstance(given, str):
        prompt = pb.Prompt(text=given, add_special_tokens=body.add_special_tokens)
    else:
        prompt = pb.Prompt(token_ids=pb.TokenIds(ids=_token_ids("prompt_token_ids", given, found)))
    _truncate(body, prompt, found)
    return prompt


def _truncate(body: GenerationBody, prompt: pb.Prompt, found: list[InvalidRequest]) -> None:
    if body.truncate_prompt_tokens is None:
        return
    try:
        prompt.truncate_tokens = body.truncate_prompt_tokens
    except ValueError:
        got = body.truncate_prompt_tokens
        found.append(InvalidRequest("truncate_prompt_tokens", got, "an integer of 32 bits"))


def _sampling(
    body: GenerationBody, limits: LimitsSection, logprobs: int | None, found: list[InvalidRequest]
) -> pb.SamplingParams:
    """Adds what is wrong to `found`, and leaves it out of the message."""
    sampling = pb.SamplingParams()
    over = count_problems(
        limits,
        num_biases=len(body.logit_bias or ()),
        num_stops=len(body.stop),
        num_stop_token_ids=len(body.stop_token_ids),
    )
    found += over
    too_many = {problem.field for problem in over}  # not looked at one by one
    _refuse_unserved(body, found)
    values = {
        name: value
        for name in _SAME
        if (value := getattr(body, name)) not in (None, ()) and name not in too_many
    }
    if values.get("top_k") == -1:
        values["top_k"] = 0
    if logprobs is not None:
        values["logprobs"] = logprobs
    if body.seed is not None:
        values["seed"] = body.seed % 2**64 if -(2**63) <= body.seed < 2**64 else body.seed
    if (max_tokens := _max_tokens(body)) is not None:
        values["max_tokens"] = max_tokens
    for name, value in values.items():
        _set(sampling, name, value, found)
    biases = {} if body.logit_bias is None or "logit_bias" in too_many else body.logit_bias
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):  # JSON keys are always strings
            found.append(InvalidRequest("logit_bias", token, "token ids for keys"))
            break
        sampling.logit_bias[int(token)] = bias
    try:
        if (constraint := constraint_message(body)) is not None:
            sampling.constraint.CopyFrom(constraint)
    except InvalidRequest as error:
        found.append(error)
    return sampling


def _set(sampling: pb.SamplingParams, name: str, value: Any, found: list[InvalidRequest]) -> None:
    try:
        if isinstance(value, list):
            ids = name == "stop_token_ids"
            getattr(sampling, name).extend(_token_ids(name, value, found) if ids else value)
        else:
            setattr(sampling, name, value)
    except ValueError:
        expected = "an integer of 64 bits" if name == "seed" else "an integer of 32 bits"
        found.append(InvalidRequest(name, value, expected))


def _max_tokens(body: GenerationBody) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def _refuse_unserved(body: GenerationBody, found: list[InvalidRequest]) -> None:
    if body.stream_options is not None and not body.stream:
        got = body.stream_options.model_dump(exclude_unset=True)
        found.append(InvalidRequest("stream_options", got, "nothing without stream"))
    if body.temperature is not None and not body.temperature <= MAX_TEMPERATURE:
        expected = f"0 to {MAX_TEMPERATURE:g}, where 0 is greedy"
        found.append(InvalidRequest("temperature", body.temperature, expected))
    if body.priority is not None and body.priority not in PRIORITIES:
        found.append(InvalidRequest("priority", body.priority, f"{PRIORITIES[0]} to {PRIORITIES[-1]}"))
