import math
from typing import Any

import pytest
from hypothesis import given, strategies as st

from pdserve.core.config import LimitsSection
from pdserve.core.errors import InvalidRequest, refuse
from pdserve.core.request import SamplingParams
from pdserve.core.validation import MAX_TOP_K, request_problems

LIMITS = LimitsSection(
    max_tokens=100,
    max_n=4,
    max_logprobs=5,
    max_stop_strings=2,
    max_prompt_tokens=300,
    max_logit_bias=3,
    max_prompt_logprobs=600,
)
MAX_MODEL_LEN = 256
VOCAB_SIZE = 1000


def check(prompt: list[int] | None = None, limits: LimitsSection = LIMITS, **fields: Any) -> None:
    sampling = SamplingParams(**fields)
    prompt = [1, 2, 3] if prompt is None else prompt
    refuse(request_problems(prompt, sampling, limits, MAX_MODEL_LEN, VOCAB_SIZE))


def test_default_parameters_are_valid() -> None:
    check()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [0.0, 1e-30, 2.0, 100.0]),
        ("top_p", [1e-9, 0.5, 1.0]),
        ("top_k", [0, 1, VOCAB_SIZE, MAX_TOP_K]),
        ("min_p", [0.0, 1.0]),
        ("repetition_penalty", [0.01, 1.0, 100.0]),
        ("presence_penalty", [-2.0, 2.0]),
        ("frequency_penalty", [-2.0, 2.0]),
        ("seed", [0, 2**64 - 1]),
        ("n", [1, 4]),
        ("max_tokens", [1, 100]),
        ("min_tokens", [0, 16]),
        ("logprobs", [None, 0, 5]),
        ("stop", [(), ("a",), ("a", "\n")]),
        ("stop_token_ids", [(), (0, 999)]),
        ("prompt_logprobs", [None, 0, 5]),
        ("logit_bias", [(), ((0, -100.0), (7, 0.0), (999, 100.0))]),
    ],
)
def test_values_at_the_edge_of_their_range_are_valid(field: str, values: list[Any]) -> None:
    for value in values:
        check(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", -0.1, "0 to 100, where 0 is greedy"),
        ("temperature", math.nan, "0 to 100"),
        ("temperature", math.inf, "0 to 100"),
        ("top_p", 0.0, "more than 0 and at most 1"),
        ("top_p", 1.01, "more than 0 and at most 1"),
        ("top_p", math.nan, "more than 0 and at most 1"),
        ("top_k", -1, "where 0 is off"),
        ("top_k", 2**31, "where 0 is off"),
        ("min_p", -0.01, "0 to 1"),
        ("min_p", 1.01, "0 to 1"),
        ("min_p", math.nan, "0 to 1"),
        ("repetition_penalty", 0.0, "0.01 to 100"),
        ("repetition_penalty", math.inf, "0.01 to 100"),
        ("presence_penalty", -2.1, "-2 to 2"),
        ("presence_penalty", math.nan, "-2 to 2"),
        ("frequency_penalty", 2.1, "-2 to 2"),
        ("frequency_penalty", -math.inf, "-2 to 2"),
        ("seed", -1, "64 bits"),
        ("seed", 2**64, "64 bits"),
        ("n", 0, "1 to 4"),
        ("n", 5, "1 to 4"),
        ("max_tokens", 0, "1 to 100"),
        ("max_tokens", 101, "1 to 100"),
        ("min_tokens", -1, "0 to max_tokens (16)"),
        ("min_tokens", 17, "0 to max_tokens (16)"),
        ("logprobs", -1, "0 to 5"),
        ("logprobs", 6, "0 to 5"),
        ("prompt_logprobs", -1, "0 to 5"),
        ("prompt_logprobs", 6, "0 to 5"),
    ],
)
def test_an_out_of_range_value_is_refused_with_field_and_expectation(
    field: str, value: Any, expected: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(**{field: value})
    assert caught.value.field == field
    assert expected in caught.value.expected
    assert str(caught.value).startswith(f"{field}: {value!r} is not valid")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt: 'no tokens' is not valid, expected at least one token"):
        check([])


def test_a_long_prompt_is_refused_with_its_length_and_the_limit() -> None:
    with pytest.raises(
        InvalidRequest, match="prompt: '256 tokens' is not valid, expected at most 255 tokens"
    ):
        check([1] * 256)
    with pytest.raises(InvalidRequest, match="prompt: '6 tokens' is not valid, expected at most 5 tokens"):
        check([1] * 6, LimitsSection(max_prompt_tokens=5))


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    check([1] * 255, max_tokens=1)
    with pytest.raises(
        InvalidRequest,
        match=r"max_tokens: 2 is not valid, expected at most 1 beside .* maximum context length is 256 tokens",
    ):
        check([1] * 255, max_tokens=2)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**70])
def test_a_token_outside_the_vocabulary_is_named_by_its_place(token_id: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check([1, 2, token_id, token_id])
    assert caught.value.field == "prompt_token_ids[2]"
    with pytest.raises(InvalidRequest) as caught:
        check(stop_token_ids=(5, token_id))
    assert caught.value.field == "stop_token_ids[1]"


def test_stop_strings_are_limited_in_number_and_never_empty() -> None:
    with pytest.raises(InvalidRequest, match="stop: '3 strings' is not valid, expected at most 2 strings"):
        check(stop=("a", "b", "c"))
    with pytest.raises(InvalidRequest) as caught:
        check(stop=("a", ""))
    assert caught.value.field == "stop[1]"


def test_as_many_biases_as_openai_takes_are_within_the_default_limit() -> None:
    assert LimitsSection().max_logit_bias >= 300


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (((7, 100.5),), "logit_bias[7]: 100.5 is not valid, expected -100 to 100, where 0 is off"),
        (((5, 1.0), (7, -101.0)), "logit_bias[7]: -101.0 is not valid, expected -100 to 100, where 0 is off"),
        (((7, math.nan),), "logit_bias[7]: nan is not valid, expected -100 to 100, where 0 is off"),
        (((7, -math.inf),), "logit_bias[7]: -inf is not valid, expected -100 to 100, where 0 is off"),
        (((1000, 1.0),), "logit_bias: 1000 is not valid, expected token ids of 0 to 999, each once"),
        (((-1, 1.0),), "logit_bias: -1 is not valid, expected token ids of 0 to 999, each once"),
        (((7, 1.0), (7, 1.0)), "logit_bias: 7 is not valid, expected token ids of 0 to 999, each once"),
        (tuple((i, 1.0) for i in range(4)), "logit_bias: '4 tokens' is not valid, expected at most 3 tokens"),
    ],
)
def test_a_bad_bias_is_refused_with_its_token_and_value(
    bias: tuple[tuple[int, float], ...], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(logit_bias=bias)
    assert str(caught.value) == message


def test_log_probabilities_of_a_prompt_are_limited_in_all() -> None:
    check([1] * 100, prompt_logprobs=5)
    with pytest.raises(InvalidRequest) as caught:
        check([1] * 101, prompt_logprobs=5)
    assert caught.value.field == "prompt_logprobs"
    assert (
        caught.value.expected == "at most 600 log probabilities: the prompt has 101 tokens, with 6 for each"
    )


ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
ANY_INT = st.integers(-(2**66), 2**66)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(-2, 300),
    min_tokens=st.integers(-2, 300),
    temperature=ANY_FLOAT,
    top_k=ANY_INT,
    top_p=ANY_FLOAT,
    min_p=ANY_FLOAT,
    repetition_penalty=ANY_FLOAT,
    presence_penalty=ANY_FLOAT,
    frequency_penalty=ANY_FLOAT,
    seed=ANY_INT,
    n=st.integers(-1, 6),
    logprobs=st.none() | ANY_INT,
    prompt_logprobs=st.none() | ANY_INT,
    stop=st.lists(st.text(max_size=2), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(-2, 1002), max_size=3).map(tuple),
    logit_bias=st.lists(st.tuples(st.integers(-2, 1002), ANY_FLOAT), max_size=4).map(tuple),
)


@given(prompt=st.lists(st.integers(-1, 1000), max_size=8), sampling=SAMPLING)
def test_any_request_is_served_or_refused_by_a_field(prompt: list[int], sampling: SamplingParams) -> None:
    refused = ""
    try:
        refuse(request_problems(prompt, sampling, LIMITS, MAX_MODEL_LEN, VOCAB_SIZE))
    except InvalidRequest as error:
        refused = error.field.partition("[")[0]
    assert not refused or refused in {*SamplingParams.__struct_fields__, "prompt", "prompt_token_ids"}


@given(
    field=st.sampled_from(["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"]),
    value=ANY_FLOAT,
)
def test_an_accepted_number_stays_finite_in_float32(field: str, value: float) -> None:
    fields: dict[str, Any] = {field: value}
    try:
        check(**fields)
    except InvalidRequest:
        return
    assert abs(value) <= 100


def test_a_refusal_that_quotes_input_stays_short_and_printable() -> None:
    error = InvalidRequest("prompt.chat", "x", "role \x1b[2J\n\u202e is not known" + "x" * 10**6)
    assert str(error).isprintable() and len(str(error)) < 1000
    assert error.expected.startswith(r"role \x1b[2J\n\u202e is not known")
