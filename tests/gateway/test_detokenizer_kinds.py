"""For every kind of tokenizer, prompt and deltas together are the text of the whole, at every split."""

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.gateway.text.detokenizer import Detokenizer
from pdserve.gateway.text.tokenizer import Tokenizer
from tests.gateway.support import byte_level, metaspace, metaspace_with_bytes, sentencepiece_like, word_piece
from tests.gateway.test_detokenizer import Counting, stream

KINDS = {
    "byte-level": byte_level,
    "byte fallback, stripped": sentencepiece_like,
    "byte fallback": metaspace_with_bytes,
    "metaspace": metaspace,
    "word pieces": word_piece,
}
words = st.sampled_from(
    [
        "the",
        " dog",
        " and",
        "  ",
        "\n",
        ".",
        ",",
        "'s",
        " n't",
        "def",
        "é",
        "你好",
        "🦊",
        "👩\u200d🚀",
        "g\u0308",
    ]
)
texts = st.one_of(
    st.lists(words, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12),
)


def decoded(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_prompt_and_deltas_form_the_whole_text_at_every_split(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    token_ids = list(tokenizer.encode(text))
    whole = decoded(tokenizer, token_ids)
    for split in range(len(token_ids) + 1):
        before = decoded(tokenizer, token_ids[:split])
        if whole.startswith(before):  # else the prompt ends within a character
            assert before + "".join(stream(tokenizer, token_ids[:split], token_ids[split:])) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_token_does_not_grow_with_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    unit = list(tokenizer.encode("the dog, and 你好.", add_special_tokens=False))
    counting = Counting(tokenizer)
    detokenizer = Detokenizer(counting)
    for token_id in unit * (1000 // len(unit)):
        detokenizer.push(token_id)
    assert counting.num_decoded < 80 * 1000
