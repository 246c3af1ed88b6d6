"""A table of request prices, and the remaining level of a bucket after one."""

from contextlib import suppress
from math import ceil
from typing import Any

import pytest
from hypothesis import given, strategies as st

from pdserve.core.config import LimitsSection
from pdserve.core.errors import InvalidRequest, QueueFull
from pdserve.gateway.auth.cost import Charge, RequestPrice, prompt_price, request_price
from pdserve.gateway.auth.rate_limit import TokenBucket
from pdserve.proto import pdserve_pb2 as pb

LIMITS = LimitsSection(max_tokens=200, max_n=4, max_logprobs=20)
MODEL_LEN = 256
TEXT = pb.Prompt(text="x" * 40)  # taken for 10 tokens


def full_price(prompt: pb.Prompt = TEXT, fills: bool = False, **sampling: Any) -> int:
    message = pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingParams(**sampling))
    price = request_price(message, LIMITS, MODEL_LEN, fills)
    return price.tokens(price.num_prompt_tokens, price.max_output_tokens)


@pytest.mark.parametrize(
    ("sampling", "price"),
    [
        ({}, 10 + 16),
        ({"max_tokens": 5}, 10 + 5),
        ({"max_tokens": 5, "n": 3}, 10 + 15),
        ({"max_tokens": 5, "logprobs": 0}, 10 + 5),
        ({"max_tokens": 5, "logprobs": 5}, 10 + 8),  # 7.5: rounded up in sum
        ({"max_tokens": 5, "n": 2, "logprobs": 20}, 10 + 30),
        ({"max_tokens": 5, "prompt_logprobs": 5}, 15 + 5),
        ({"max_tokens": 1, "prompt_logprobs": 1, "logprobs": 1}, 13),  # 11 + 1.1
        ({"fills": True}, 10 + 200),
        ({"fills": True, "max_tokens": 7}, 10 + 7),
        (
            {"max_tokens": 10**9, "n": 10**9, "logprobs": 10**9},
            10 + 4 * 200 * 3,
        ),  # refused later: no more than the limits
        ({"max_tokens": -1, "n": -1, "logprobs": -1, "prompt_logprobs": -1}, 10 + 1),
    ],
)
def test_a_price_covers_everything_a_request_asks_for(sampling: dict[str, Any], price: int) -> None:
    assert full_price(**sampling) == price


def test_a_prompt_is_priced_by_tokens_or_else_by_characters() -> None:
    chat = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x" * 400)]))
    tools = pb.Prompt(chat=pb.Chat(tools=[pb.Tool(name="f", parameters="x" * 400)]))
    assert prompt_price(pb.Prompt(token_ids=pb.TokenIds(ids=range(7)))).num_prompt_tokens == 7
    assert prompt_price(pb.Prompt(text="")).num_prompt_tokens == 1
    assert prompt_price(pb.Prompt(text="abcde")).num_prompt_tokens == 2
    assert prompt_price(pb.Prompt(text="x" * (1 << 20))).num_prompt_tokens == 1 << 18
    assert 100 < prompt_price(chat).num_prompt_tokens < 110
    assert 100 < prompt_price(tools).num_prompt_tokens < 110


def test_a_chat_without_a_limit_is_priced_by_its_remaining_room() -> None:
    assert full_price(pb.Prompt(text="x" * 800), fills=True) == 200 + 56
    assert full_price(pb.Prompt(text="x" * 8000), fills=True) == 2000 + 1


KINDS = {
    "text": {"is_text": True},
    "chat": {"is_text": True},
    "token_ids": {"is_text": False},
}


REFUSALS = {
    "refused when it was tokenised": InvalidRequest("prompt", "", ""),
    "left while it was tokenised": KeyboardInterrupt(),
    "there was no place to tokenise it": QueueFull(1, 1.0),
}


def level_after(kind: str, fate: str, num_prompt: int = 30, num_output: int = 4) -> float:
    """Returns the level of a bucket of 1,000 after a request of that kind has ended."""
    bucket = TokenBucket(1000, 0.0)
    estimate = num_prompt if kind == "token_ids" else 20
    price = RequestPrice(num_prompt_tokens=estimate, max_tokens=50, num_alternatives=10, **KINDS[kind])
    assert bucket.take(price.tokens(estimate, 50), 0.0) == 0.0
    charge = Charge(price, bucket)
    if fate != "unread":
        with suppress(InvalidRequest, QueueFull, KeyboardInterrupt), charge.tokenizing():
            if fate in REFUSALS:
                raise REFUSALS[fate]
    if fate in ("refused by the cluster", "served"):
        charge.settle_prompt(num_prompt, 0.0)
        charge.settle_room(50, 0.0)
    charge.settle(num_output if fate == "served" else 0, 0.0, has_begun=fate == "served")
    return 1000 - bucket.take(1001, 0.0) * 1000 / 60  # seconds until it is full, as tokens


@pytest.mark.parametrize(
    ("kind", "fate", "cost"),
    [
        ("text", "unread", 0),
        ("text", "refused when it was tokenised", 20),
        ("text", "there was no place to tokenise it", 0),
        ("text", "left while it was tokenised", 20),
        ("text", "refused by the cluster", 30),
        ("token_ids", "refused by the cluster", 0),
        ("text", "served", 30 + 8),
        ("chat", "served", 30 + 8),
        ("token_ids", "served", 30 + 8),
    ],
)
def test_completed_work_stays_charged_and_the_rest_is_refunded(kind: str, fate: str, cost: int) -> None:
    assert level_after(kind, fate) == pytest.approx(1000 - cost)


@given(
    estimate=st.integers(1, 10_000),
    num_prompt=st.integers(0, 10_000),
    max_tokens=st.integers(0, 1000),
    num_choices=st.integers(1, 16),
    alternatives=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    share=st.floats(0, 1),
)
def test_in_the_end_a_bucket_has_lost_exactly_what_was_used(
    estimate: int,
    num_prompt: int,
    max_tokens: int,
    num_choices: int,
    alternatives: tuple[int, int],
    share: float,
) -> None:
    per_minute = 10**6
    bucket = TokenBucket(per_minute, 0.0)
    price = RequestPrice(
        num_prompt_tokens=estimate,
        num_choices=num_choices,
        max_tokens=max_tokens,
        num_prompt_alternatives=alternatives[0],
        num_alternatives=alternatives[1],
    )
    assert bucket.take(price.tokens(estimate, price.max_output_tokens), 0.0) == 0.0
    charge = Charge(price, bucket)
    with charge.tokenizing():
        pass
    charge.settle_prompt(num_prompt, 0.0)
    num_output = int(share * price.max_output_tokens)
    charge.settle(num_output, 0.0)
    tenths = num_prompt * (10 + alternatives[0]) + num_output * (10 + alternatives[1])
    used = ceil(tenths / 10)
    # the missing share of a minute's worth
    assert bucket.take(per_minute, 0.0) * per_minute / 60 == pytest.approx(used)
