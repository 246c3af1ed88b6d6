"""The single validation of requests, for every server: a request that passes can be executed by any worker.

A gateway calls it after tokenising and before the router receives the request. The ranges are those of the
OpenAI and vLLM interfaces where these have one, and otherwise wide enough for any use but inside what float32
can compute."""

from collections.abc import Sequence

from .config import LimitsSection
from .errors import InvalidRequest, context_length_exceeded, refuse
from .request import SamplingParams

MAX_SEED = 2**64 - 1
MAX_TOP_K = 2**31 - 1
MAX_TEMPERATURE = 100.0
REPETITION_PENALTY_RANGE = (0.01, 100.0)
MAX_LOGIT_BIAS = 100.0
MAX_NAME_CHARS = 128
MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_CHARS = 1024
MAX_TOKEN_IDS = 2**32  # of any vocabulary


def check_name(field: str, value: str, max_chars: int = MAX_NAME_CHARS) -> None:
    """A name that a client gives ends up in logs, metrics and other people's terminals: nothing in it may act
    there, such as line ends, escapes, or what reverses the direction of text. Raises InvalidRequest."""
    if len(value) > max_chars:
        raise InvalidRequest(field, value, f"at most {max_chars} characters")
    if not value.isprintable():
        raise InvalidRequest(field, value, "printable characters")


def max_prompt_tokens(limits: LimitsSection, max_model_len: int) -> int:
    """Returns the length of the longest prompt: one token of the model's is left for output."""
    return min(limits.max_prompt_tokens or max_model_len, max_model_len - 1)


def count_problems(
    limits: LimitsSection, *, num_biases: int = 0, num_stops: int = 0, num_stop_token_ids: int = 0
) -> list[InvalidRequest]:
    """Returns what is wrong with the numbers of items, before each of them is looked at."""
    found = []
    if num_biases > limits.max_logit_bias:
        found.append(
            InvalidRequest("logit_bias", f"{num_biases} tokens", f"at most {limits.max_logit_bias} tokens")
        )
    if num_stops > limits.max_stop_strings:
        found.append(
            InvalidRequest("stop", f"{num_stops} strings", f"at most {limits.max_stop_strings} strings")
        )
    if num_stop_token_ids > MAX_STOP_TOKEN_IDS:
        found.append(
            InvalidRequest(
                "stop_token_ids", f"{num_stop_token_ids} tokens", f"at most {MAX_STOP_TOKEN_IDS} tokens"
            )
        )
    return found


def check_prompt_length(num_tokens: int, limits: LimitsSection, max_model_len: int) -> None:
    """Raises InvalidRequest for a prompt that is too long, before its tokens are looked at."""
    max_tokens = max_prompt_tokens(limits, max_model_len)
    if num_tokens <= max_tokens:
        return
    if max_tokens < max_model_len - 1:
        expected = f"at most {max_tokens} tokens (limits.max_prompt_tokens)"
        raise context_length_exceeded("prompt", f"{num_tokens} tokens", expected, max_tokens)
    expected = f"at most {max_tokens} tokens, so that one is left for output"
    raise context_length_exceeded("prompt", f"{num_tokens} tokens", expected, max_model_len)


def request_problems(
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    limits: LimitsSection,
    max_model_len: int,
    vocab_size: int,
) -> list[InvalidRequest]:
    """Returns everything that cannot be served."""
    found = sampling_problems(sampling, limits, vocab_size)
    try:
        _check_prompt(prompt_token_ids, limits, max_model_len, vocab_size)
    except InvalidRequest as error:
        return [error, *found]
    if sampling.max_tokens <= limits.max_tokens:
        _check_room(found, len(prompt_token_ids), sampling, max_model_len)
    _check_prompt_logprobs(found, len(prompt_token_ids), sampling, limits)
    return found


def sampling_problems(
    sampling: SamplingParams, limits: LimitsSection, vocab_size: int = MAX_TOKEN_IDS
) -> list[InvalidRequest]:
    """Returns what is wrong whatever the prompt."""
    found = count_problems(
        limits,
        num_biases=len(sampling.logit_bias),
        num_stops=len(sampling.stop),
        num_stop_token_ids=len(sampling.stop_token_ids),
    )
    _check_lengths(found, sampling, limits)
    _check_ranges(found, sampling)
    if len(sampling.logit_bias) <= limits.max_logit_bias:
        found += _bias_problems(sampling, vocab_size)
    _check_outputs(found, sampling, limits)
    _check_stops(found, sampling, vocab_size)
    return found


def check_sampling_ranges(sampling: SamplingParams) -> None:
    """Checks the parameters of the distribution alone. Raises InvalidRequest."""
    found: list[InvalidRequest] = []
    _check_ranges(found, sampling)
    refuse(found)


def _check_prompt(
    token_ids: Sequence[int], limits: LimitsSection, max_model_len: int, vocab_size: int
) -> None:
    if not token_ids:
        raise InvalidRequest("prompt", "no tokens", "at least one token")
    check_prompt_length(len(token_ids), limits, max_model_len)
    check_token_ids("prompt_token_ids", token_ids, vocab_size)


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest for the first of them that the vocabulary does not have; there is at least
    one."""
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        index = list(map(range(vocab_size).__contains__, token_ids)).index(False)
        raise InvalidRequest(f"{field}[{index}]", token_ids[index], f"0 to {vocab_size - 1}")


def _check_lengths(found: list[InvalidRequest], sampling: SamplingParams, limits: LimitsSection) -> None:
    max_tokens, min_tokens = sampling.max_tokens, sampling.min_tokens
    if not 1 <= max_tokens <= limits.max_tokens:
        expected = f"1 to {limits.max_tokens}"
        if not max_tokens:
            expected += "; 0 only to score a prompt (over HTTP with echo, over gRPC with prompt_logprobs)"
        found.append(InvalidRequest("max_tokens", max_tokens, expected))
    elif not 0 <= min_tokens <= max_tokens:
        found.append(InvalidRequest("min_tokens", min_tokens, f"0 to max_tokens ({max_tokens})"))


def _check_room(
    found: list[InvalidRequest], num_prompt_tokens: int, sampling: SamplingParams, max_model_len: int
) -> None:
    room = max_model_len - num_prompt_tokens
    if sampling.max_tokens > room:
        expected = f"at most {room} beside the {num_prompt_tokens} tokens of the prompt"
        found.append(context_length_exceeded("max_tokens", sampling.max_tokens, expected, max_model_len))


def _check_range(
    found: list[InvalidRequest], field: str, value: float, low: float, high: float, note: str = ""
) -> None:
    if not low <= value <= high:  # NaN is in no range
        found.append(InvalidRequest(field, value, f"{low:g} to {high:g}{note}"))


def _check_ranges(found: list[InvalidRequest], sampling: SamplingParams) -> None:
    _check_range(found, "temperature", sampling.temperature, 0, MAX_TEMPERATURE, ", where 0 is greedy")
    if not 0 <= sampling.top_k <= MAX_TOP_K:
        found.append(InvalidRequest("top_k", sampling.top_k, f"0 to {MAX_TOP_K}, where 0 is off"))
    if not 0 < sampling.top_p <= 1:
        found.append(InvalidRequest("top_p", sampling.top_p, "more than 0 and at most 1, where 1 is off"))
    _check_range(found, "min_p", sampling.min_p, 0, 1, ", where 0 is off")
    if not 0 <= sampling.seed <= MAX_SEED:
        found.append(InvalidRequest("seed", sampling.seed, "an unsigned integer of 64 bits"))
    low, high = REPETITION_PENALTY_RANGE
    _check_range(found, "repetition_penalty", sampling.repetition_penalty, low, high, ", where 1 is off")
    _check_range(found, "presence_penalty", sampling.presence_penalty, -2, 2, ", where 0 is off")
    _check_range(found, "frequency_penalty", sampling.frequency_penalty, -2, 2, ", where 0 is off")


def _bias_problems(sampling: SamplingParams, vocab_size: int) -> list[InvalidRequest]:
    """Returns the first one that is wrong: there may be many."""
    found: list[InvalidRequest] = []
    seen: set[int] = set()
    for token_id, bias in sampling.logit_bias:
        if not 0 <= token_id < vocab_size or token_id in seen:
            expected = f"token ids of 0 to {vocab_size - 1}, each once"
            found.append(InvalidRequest("logit_bias", token_id, expected))
        _check_range(
            found, f"logit_bias[{token_id}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, ", where 0 is off"
        )
        if found:
            break
        seen.add(token_id)
    return found


def _check_outputs(found: list[InvalidRequest], sampling: SamplingParams, limits: LimitsSection) -> None:
    if not 1 <= sampling.n <= limits.max_n:
        found.append(InvalidRequest("n", sampling.n, f"1 to {limits.max_n}"))
    for field in ("logprobs", "prompt_logprobs"):
        count = getattr(sampling, field)
        if count is not None and not 0 <= count <= limits.max_logprobs:
            found.append(InvalidRequest(field, count, f"0 to {limits.max_logprobs}"))


def _check_prompt_logprobs(
    found: list[InvalidRequest], num_prompt_tokens: int, sampling: SamplingParams, limits: LimitsSection
) -> None:
    count, limit = sampling.prompt_logprobs, limits.max_prompt_logprobs
    if count is not None and num_prompt_tokens * (count + 1) > limit:
        expected = (
            f"at most {limit} log probabilities: the prompt has {num_prompt_tokens} tokens, with {count + 1}"
            " for each"
        )
        found.append(InvalidRequest("prompt_logprobs", count, expected))


def _check_stops(found: list[InvalidRequest], sampling: SamplingParams, vocab_size: int) -> None:
    for index, text in enumerate(sampling.stop):
        if not text:
            found.append(InvalidRequest(f"stop[{index}]", text, "a text that is not empty"))
            break
        if len(text) > MAX_STOP_CHARS:
            expected = f"at most {MAX_STOP_CHARS} characters"
            found.append(InvalidRequest(f"stop[{index}]", text, expected))
            break
    if sampling.stop_token_ids:
        try:
            check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
        except InvalidRequest as error:
            found.append(error)
