"""The single validation of requests, for every server: a request that passes can be executed by any worker.

A gateway calls it after tokenising and before the router receives the request. The ranges are those of the
OpenAI and vLLM interfaces where these have one, and otherwise wide enough for any use but inside what float32
can compute."""

from collections.abc import Sequence

from .config import LimitsSection
from .errors import InvalidRequest
from .request import SamplingParams

MAX_SEED = 2**64 - 1
MAX_TOP_K = 2**31 - 1
MAX_TEMPERATURE = 100.0
REPETITION_PENALTY_RANGE = (0.01, 100.0)
MAX_LOGIT_BIAS = 100.0
MAX_NAME_CHARS = 128
MAX_STOP_TOKEN_IDS = 1024


def check_name(field: str, value: str, max_chars: int = MAX_NAME_CHARS) -> None:
    """A name that a client gives ends up in logs, metrics and other people's terminals: nothing in it may act
    there, such as line ends, escapes, or what reverses the direction of text. Raises InvalidRequest."""
    if len(value) > max_chars:
        raise InvalidRequest(field, value, f"at most {max_chars} characters")
    if not value.isprintable():
        raise InvalidRequest(field, value, "printable characters")


def max_prompt_tokens(limits: LimitsSection, max_model_len: int) -> int:
    """One token of the model's length is left for output."""
    return min(limits.max_prompt_tokens or max_model_len, max_model_len - 1)


def check_counts(
    limits: LimitsSection, *, num_biases: int = 0, num_stops: int = 0, num_stop_token_ids: int = 0
) -> None:
    """May be asked before each of them is looked at. Raises InvalidRequest."""
    if num_biases > limits.max_logit_bias:
        raise InvalidRequest("logit_bias", f"{num_biases} tokens", f"at most {limits.max_logit_bias} tokens")
    if num_stops > limits.max_stop_strings:
        raise InvalidRequest("stop", f"{num_stops} strings", f"at most {limits.max_stop_strings} strings")
    if num_stop_token_ids > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            "stop_token_ids", f"{num_stop_token_ids} tokens", f"at most {MAX_STOP_TOKEN_IDS} tokens"
        )


def check_prompt_length(num_tokens: int, limits: LimitsSection, max_model_len: int) -> None:
    """May be asked before there are tokens to look at. Raises InvalidRequest."""
    if limits.max_prompt_tokens is not None and num_tokens > limits.max_prompt_tokens:
        raise InvalidRequest("prompt", f"{num_tokens} tokens", f"at most {limits.max_prompt_tokens} tokens")
    if num_tokens >= max_model_len:
        expected = (
            f"at most {max_model_len - 1} tokens: the model takes {max_model_len}, one of them for output"
        )
        raise InvalidRequest("prompt", f"{num_tokens} tokens", expected)


def validate_request(
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    limits: LimitsSection,
    max_model_len: int,
    vocab_size: int,
) -> None:
    """Raises InvalidRequest for the first thing that cannot be served."""
    check_counts(
        limits,
        num_biases=len(sampling.logit_bias),
        num_stops=len(sampling.stop),
        num_stop_token_ids=len(sampling.stop_token_ids),
    )
    _check_prompt(prompt_token_ids, limits, max_model_len, vocab_size)
    _check_lengths(len(prompt_token_ids), sampling, limits, max_model_len)
    _check_distribution(sampling)
    _check_penalties(sampling)
    _check_bias(sampling, vocab_size)
    _check_outputs(sampling, limits)
    _check_prompt_logprobs(len(prompt_token_ids), sampling, limits)
    _check_stops(sampling, vocab_size)


def _check_range(field: str, value: float, low: float, high: float, note: str = "") -> None:
    if not low <= value <= high:  # NaN is in no range
        raise InvalidRequest(field, value, f"{low:g} to {high:g}{note}")


def _check_prompt(
    token_ids: Sequence[int], limits: LimitsSection, max_model_len: int, vocab_size: int
) -> None:
    if not token_ids:
        raise InvalidRequest("prompt", "", "at least one token")
    check_prompt_length(len(token_ids), limits, max_model_len)
    check_token_ids("prompt_token_ids", token_ids, vocab_size)


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest for the first of them that the vocabulary does not have; there is at least
    one."""
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        index = list(map(range(vocab_size).__contains__, token_ids)).index(False)
        raise InvalidRequest(f"{field}[{index}]", token_ids[index], f"0 to {vocab_size - 1}")


def _check_lengths(
    num_prompt_tokens: int, sampling: SamplingParams, limits: LimitsSection, max_model_len: int
) -> None:
    max_tokens, room = sampling.max_tokens, max_model_len - num_prompt_tokens
    if not 1 <= max_tokens <= limits.max_tokens:
        raise InvalidRequest("max_tokens", max_tokens, f"1 to {limits.max_tokens}")
    if max_tokens > room:
        expected = (
            f"at most {room}: the model takes {max_model_len} tokens and the prompt has {num_prompt_tokens}"
        )
        raise InvalidRequest("max_tokens", max_tokens, expected)
    if not 0 <= sampling.min_tokens <= max_tokens:
        raise InvalidRequest("min_tokens", sampling.min_tokens, f"0 to max_tokens ({max_tokens})")


def _check_distribution(sampling: SamplingParams) -> None:
    _check_range("temperature", sampling.temperature, 0, MAX_TEMPERATURE, ", where 0 is greedy")
    if not 0 <= sampling.top_k <= MAX_TOP_K:
        raise InvalidRequest("top_k", sampling.top_k, f"0 to {MAX_TOP_K}, where 0 is off")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest("top_p", sampling.top_p, "more than 0 and at most 1, where 1 is off")
    _check_range("min_p", sampling.min_p, 0, 1, ", where 0 is off")
    if not 0 <= sampling.seed <= MAX_SEED:
        raise InvalidRequest("seed", sampling.seed, "an unsigned integer of 64 bits")


def _check_penalties(sampling: SamplingParams) -> None:
    low, high = REPETITION_PENALTY_RANGE
    _check_range("repetition_penalty", sampling.repetition_penalty, low, high, ", where 1 is off")
    _check_range("presence_penalty", sampling.presence_penalty, -2, 2, ", where 0 is off")
    _check_range("frequency_penalty", sampling.frequency_penalty, -2, 2, ", where 0 is off")


def _check_bias(sampling: SamplingParams, vocab_size: int) -> None:
    seen: set[int] = set()
    for token_id, bias in sampling.logit_bias:
        if not 0 <= token_id < vocab_size or token_id in seen:
            raise InvalidRequest("logit_bias", token_id, f"token ids of 0 to {vocab_size - 1}, each once")
        _check_range(f"logit_bias[{token_id}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, ", where 0 is off")
        seen.add(token_id)


def _check_outputs(sampling: SamplingParams, limits: LimitsSection) -> None:
    if not 1 <= sampling.n <= limits.max_n:
        raise InvalidRequest("n", sampling.n, f"1 to {limits.max_n}")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= limits.max_logprobs:
        raise InvalidRequest("logprobs", sampling.logprobs, f"0 to {limits.max_logprobs}")


def _check_prompt_logprobs(num_prompt_tokens: int, sampling: SamplingParams, limits: LimitsSection) -> None:
    count, limit = sampling.prompt_logprobs, limits.max_prompt_logprobs
    if count is None:
        return
    if not 0 <= count <= limits.max_logprobs:
        raise InvalidRequest("prompt_logprobs", count, f"0 to {limits.max_logprobs}")
    if num_prompt_tokens * (count + 1) > limit:
        expected = (
            f"at most {limit} log probabilities: the prompt has {num_prompt_tokens} tokens, with {count + 1}"
            " for each"
        )
        raise InvalidRequest("prompt_logprobs", count, expected)


def _check_stops(sampling: SamplingParams, vocab_size: int) -> None:
    for index, text in enumerate(sampling.stop):
        if not text:
            raise InvalidRequest(f"stop[{index}]", text, "a text that is not empty")
    if sampling.stop_token_ids:
        check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
