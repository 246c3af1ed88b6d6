"""Text emitted token by token equals the whole decoded at once, and never contains half a character."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.gateway.text.detokenizer import Detokenizer
from pdserve.gateway.text.tokenizer import Tokenizer
from tests.gateway.support import byte_level, sentencepiece_like

KINDS = {"byte-level": byte_level, "sentencepiece-like": sentencepiece_like}
kinds = pytest.mark.parametrize("kind", KINDS)
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
texts = st.text(st.one_of(st.sampled_from(" the dog\n"), letters), max_size=40)


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(token_id) for token_id in output] + [detokenizer.flush()]


@kinds
@given(text=texts, cut=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_prompt_and_deltas_together_are_the_text(kind: str, text: str, cut: float) -> None:
    tokenizer = KINDS[kind]()
    token_ids = list(tokenizer.encode(text))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    split = round(cut * len(token_ids))
    while not whole.startswith(before := tokenizer.decode(token_ids[:split], skip_special_tokens=True)):
        split -= 1  # back to the beginning of a character
    deltas = stream(tokenizer, token_ids[:split], token_ids[split:])
    assert before + "".join(deltas) == whole
    assert not any("\ufffd" in delta for delta in deltas)


@given(token_ids=st.lists(st.integers(0, 450), max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_byte_level_tokens_give_the_text_of_the_whole(token_ids: list[int]) -> None:
    tokenizer = byte_level()
    assert "".join(stream(tokenizer, [], token_ids)) == tokenizer.decode(token_ids, skip_special_tokens=True)


@given(token_ids=st.lists(st.integers(3 + 0x80, 330), max_size=80))
@settings(max_examples=100, deadline=None)
def test_invalid_bytes_do_not_disturb_the_surrounding_text(token_ids: list[int]) -> None:
    tokenizer = sentencepiece_like()
    out = "".join(stream(tokenizer, [], token_ids))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert [char for char in out if char.isascii() and char.isalpha()] == [
        char for char in whole if char.isascii() and char.isalpha()
    ]


@kinds
def test_a_character_is_emitted_with_its_last_byte(kind: str) -> None:
    tokenizer = KINDS[kind]()
    output = list(tokenizer.encode("🦊", add_special_tokens=False))
    assert len(output) > 2, "the vocabulary must not have this character"
    deltas = stream(tokenizer, list(tokenizer.encode("the dog")), output)
    assert "".join(deltas[:-2]).strip() == ""
    assert deltas[-2] == "🦊"
    assert deltas[-1] == ""


@kinds
def test_long_runs_of_split_characters_are_emitted_one_by_one(kind: str) -> None:
    tokenizer = KINDS[kind]()
    output = list(tokenizer.encode("🦊" * 100, add_special_tokens=False))
    deltas = stream(tokenizer, [], output)
    assert "".join(deltas).strip() == "🦊" * 100
    assert max(map(len, deltas)) == 1


@kinds
def test_an_incomplete_character_at_the_end_is_flushed(kind: str) -> None:
    tokenizer = KINDS[kind]()
    output = list(tokenizer.encode("the dog 🦊", add_special_tokens=False))[:-1]
    deltas = stream(tokenizer, [], output)
    assert "".join(deltas[:-1]).strip() == "the dog"
    assert deltas[-1].strip("\ufffd") == ""
    assert deltas[-1] != ""


def test_a_prompt_cut_within_a_character_is_completed_and_not_repeated() -> None:
    tokenizer = byte_level()
    token_ids = list(tokenizer.encode("the dog 🦊 sleeps"))
    for split in range(1, len(token_ids)):
        before = tokenizer.decode(token_ids[:split]).rstrip("\ufffd")
        assert (
            before + "".join(stream(tokenizer, token_ids[:split], token_ids[split:])) == "the dog 🦊 sleeps"
        )


def test_the_space_between_prompt_and_output_is_kept() -> None:
    tokenizer = sentencepiece_like()
    token_ids = list(tokenizer.encode("the dog and the dog"))
    split = len(tokenizer.encode("the dog"))
    assert "".join(stream(tokenizer, token_ids[:split], token_ids[split:])) == " and the dog"


@kinds
def test_special_and_unknown_tokens_have_no_text_and_eat_no_space(kind: str) -> None:
    tokenizer = KINDS[kind]()
    first, second = (list(tokenizer.encode(text, add_special_tokens=False)) for text in ("the", "the dog"))
    output = [*first, 1, 100_000, *second[len(first) :]]
    assert "".join(stream(tokenizer, [], output)) == "the dog"


class Counting:
    """A tokenizer that counts how many tokens it had to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def has_text(self, token_id: int) -> bool:
        return self._tokenizer.has_text(token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        self.num_decoded += len(token_ids)
        return self._tokenizer.decode(token_ids)


@kinds
@pytest.mark.parametrize("text", ["the dog and ", "🦊", "\x80"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    unit = list(tokenizer.encode(text, add_special_tokens=False))
    if text == "\x80":
        unit = unit[-1:]  # a byte that is not UTF-8
    counting = Counting(tokenizer)
    detokenizer = Detokenizer(counting)
    for token_id in unit * (1000 // len(unit)):
        detokenizer.push(token_id)
    assert counting.num_decoded < 80 * 1000
