"""The shares of all ranks make up the model, each part once; what cannot be divided is refused by name."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from pdserve.core.errors import ConfigError
from pdserve.engine.model_config import ModelConfig, parse_model_config
from pdserve.engine.parallel.shard import NUMS_OF_RANKS, Shard
from pdserve.engine.tensor_names import expected_tensors

MODEL = parse_model_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1003,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
    }
)
nums_of_ranks = st.sampled_from(NUMS_OF_RANKS)


def shards(num_ranks: int) -> list[Shard]:
    return [Shard(rank, num_ranks) for rank in range(num_ranks)]


@given(nums_of_ranks, st.integers(1, 64))
def test_query_heads_and_mlp_are_disjoint_and_complete(num_ranks: int, each: int) -> None:
    count = num_ranks * each
    for held in (Shard.query_heads, Shard.mlp):
        assert [head for shard in shards(num_ranks) for head in held(shard, count)] == list(range(count))


@given(nums_of_ranks, st.integers(8, 300_000))
def test_a_vocabulary_is_divided_almost_evenly(num_ranks: int, vocab_size: int) -> None:
    parts = [shard.vocabulary(vocab_size) for shard in shards(num_ranks)]
    assert parts[0].start == 0
    assert parts[-1].stop == vocab_size
    assert all(one.stop == other.start for one, other in itertools.pairwise(parts))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(nums_of_ranks, nums_of_ranks, st.integers(1, 8))
def test_each_query_head_meets_its_kv_head_on_its_rank(num_ranks: int, num_kv: int, group: int) -> None:
    num_heads = num_kv * group
    if num_heads % num_ranks:
        return
    for shard in shards(num_ranks):
        queries, held = shard.query_heads(num_heads), shard.kv_heads(num_kv)
        local_group = len(queries) // len(held)
        assert [head // group for head in queries] == [held[i // local_group] for i in range(len(queries))]


@pytest.mark.parametrize(("num_kv", "num_ranks", "copies"), [(2, 2, 1), (2, 4, 2), (1, 8, 8), (4, 2, 1)])
def test_kv_heads_fewer_than_ranks_are_replicated(num_kv: int, num_ranks: int, copies: int) -> None:
    holders = Counter(head for shard in shards(num_ranks) for head in shard.kv_heads(num_kv))
    assert holders == dict.fromkeys(range(num_kv), copies)


@pytest.mark.parametrize("num_ranks", NUMS_OF_RANKS)
@pytest.mark.parametrize("name", expected_tensors(MODEL))
def test_parts_of_a_tensor_have_the_shape_that_the_rank_computes_with(name: str, num_ranks: int) -> None:
    whole = expected_tensors(MODEL)[name]
    covered: Counter[int] = Counter()
    for shard in shards(num_ranks):
        part = shard.part(name, MODEL)
        shape = list(whole)
        if part is not None and part.span:
            shape[part.dim] = len(part.span)
            covered.update(part.span)
        assert tuple(shape) == expected_tensors(shard.of(MODEL))[name]
    copies = num_ranks // 2 if num_ranks > 2 and name.rsplit(".")[-2] in ("k_proj", "v_proj") else 1
    assert set(covered.values()) <= {copies}
    assert sorted(covered) in ([], *(list(range(size)) for size in whole))


def test_a_bias_that_follows_a_sum_is_added_once() -> None:
    for name in ("model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.down_proj.bias"):
        parts = [shard.part(name, MODEL) for shard in shards(4)]
        assert parts[0] is None
        assert all(part is not None and not part.span for part in parts[1:])


def test_one_rank_holds_the_whole_model() -> None:
    assert Shard(0, 1).of(MODEL) == MODEL


@pytest.mark.parametrize(
    ("config", "num_ranks", "message"),
    [
        (MODEL, 3, "tensor_parallel: got 3, expected 1, 2, 4 or 8"),
        (MODEL, 16, "tensor_parallel: got 16, expected 1, 2, 4 or 8"),
        (replace(MODEL, num_heads=12, num_kv_heads=4), 8, "num_attention_heads 12, expected a multiple of 8"),
        (replace(MODEL, num_heads=6, num_kv_heads=3), 2, "num_key_value_heads 3, expected a multiple of 2"),
        (
            replace(MODEL, num_heads=24, num_kv_heads=3),
            4,
            "num_key_value_heads 3, expected a divisor or a multiple of 4",
        ),
        (replace(MODEL, intermediate_size=100), 8, "intermediate_size 100, expected a multiple of 8"),
        (replace(MODEL, vocab_size=7), 8, "vocab_size 7, expected at least one each"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(config: ModelConfig, num_ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Shard(0, num_ranks).of(config)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_its_instance_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank: got {rank}, expected 0 to 1"):
        Shard(rank, 2)
