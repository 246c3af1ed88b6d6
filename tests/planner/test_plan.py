import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from pdserve.cli.plan import plan_json, plan_text
from pdserve.core.config import ClusterConfig
from pdserve.core.errors import CapacityError, CheckpointError, ConfigError
from pdserve.core.messages import Role
from pdserve.engine.checkpoint import Checkpoint
from pdserve.engine.gpu import Node
from pdserve.planner.packing import Demand, Packing
from pdserve.planner.plan import AUTO_KV_MAX_BYTES, RUNTIME_BYTES, Plan, make_plan, plan

from .support import GIB, checkpoint, messages


def node(cores: int = 2, available_gib: float = 64, name: str = "here") -> Node:
    return Node(name, tuple(range(cores)), 2 * int(available_gib * GIB), int(available_gib * GIB))


def planned(*nodes: Node, model: Checkpoint | None = None, config: dict[str, Any] | None = None) -> Plan:
    return make_plan(ClusterConfig.model_validate(config or {}), model or checkpoint(), nodes or (node(),))


def test_the_arithmetic_of_a_known_model() -> None:
    result = planned()
    assert result.num_parameters == 8_030_261_248
    assert result.weights_bytes == 16_060_522_496
    assert result.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert (result.dtype, result.block_size, result.max_model_len) == ("bfloat16", 16, 8192)
    prefill, decode = result.pools
    assert (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
    assert decode.kv_cache_bytes == AUTO_KV_MAX_BYTES
    assert decode.num_blocks == AUTO_KV_MAX_BYTES // (16 * result.kv_bytes_per_token) == 2048
    assert decode.num_max_len_sequences == 4
    assert decode.num_typical_sequences == 16
    assert decode.instance_bytes > result.weights_bytes + AUTO_KV_MAX_BYTES + RUNTIME_BYTES
    assert result.findings == ()
    result.check()


def test_a_wider_dtype_doubles_weights_and_kv() -> None:
    half, full = planned(), planned(node(available_gib=200), config={"model": {"dtype": "float32"}})
    assert full.weights_bytes == 2 * half.weights_bytes
    assert full.kv_bytes_per_token == 2 * half.kv_bytes_per_token


def test_automatic_kv_shares_the_remaining_memory() -> None:
    one, two = (
        planned(node(4, 40), config={"pools": {"decode": {"instances": n}, "prefill": {"instances": 0}}})
        for n in (1, 2)
    )
    assert one.pools[1].kv_cache_bytes == AUTO_KV_MAX_BYTES > two.pools[1].kv_cache_bytes
    assert two.findings == ()
    assert 2 * two.pools[1].instance_bytes <= 40 * GIB


def test_automatic_kv_holds_one_longest_sequence_even_where_memory_is_short() -> None:
    result = planned(node(2, 8))
    assert [pool.num_max_len_sequences for pool in result.pools] == [1, 1]
    with pytest.raises(CapacityError, match="memory: 1 prefill instance and 1 decode instance need"):
        result.check()


def test_an_instance_takes_memory_for_its_links_up_to_their_bound() -> None:
    def prefill_bytes(num_decode: int) -> int:
        decode = {"instances": num_decode, "kv_cache_bytes": GIB}
        (pool, _) = planned(config={"pools": {"prefill": {"kv_cache_bytes": GIB}, "decode": decode}}).pools
        return pool.instance_bytes

    assert prefill_bytes(4) == prefill_bytes(1)
    assert prefill_bytes(64) - prefill_bytes(4) == 60 * (16 << 20)
    assert prefill_bytes(1000) == prefill_bytes(64)


def test_automatic_kv_of_a_small_model_is_bounded_by_its_use() -> None:
    small = checkpoint(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16
    )
    result = planned(
        model=small, config={"model": {"max_model_len": 256}, "pools": {"decode": {"max_batch_size": 8}}}
    )
    assert result.pools[1].num_max_len_sequences == 8


def test_each_machine_fills_within_its_own_memory() -> None:
    pools = {"prefill": {"instances": 1}, "decode": {"instances": 1}}
    result = planned(node(1, 64, "a"), node(1, 22, "b"), config={"pools": pools})
    assert result.findings == ()
    assert all(pool.instance_bytes <= 22 * GIB for pool in result.pools)
    assert messages(planned(node(1, 64, "a"), node(1, 12, "b"), config={"pools": pools}))[0].endswith(
        "but 12 GiB are available on b; lower instances, model.max_model_len, max_batch_tokens or"
        " kv_cache_bytes"
    )


def test_kv_is_sized_by_the_first_machine_while_others_may_join() -> None:
    def coming(*nodes: Node) -> int:
        config = ClusterConfig.model_validate(
            {"pools": {"decode": {"instances": 6}, "prefill": {"instances": 0}}}
        )
        return make_plan(config, checkpoint(), nodes, more_may_come=True).pools[1].kv_cache_bytes

    def together(there: Node, instances: int) -> int:
        config = {"pools": {"decode": {"instances": instances}, "prefill": {"instances": 0}}}
        return planned(there, config=config).pools[1].kv_cache_bytes

    first, small, large = node(2, 40, "a"), node(1, 12, "b"), node(8, 150, "c")
    assert coming(first) == coming(first, small) == coming(first, large, small) == together(first, 2)
    assert coming(node(0, 40, "head"), large) == together(large, 6)


def test_later_machines_may_add_capacity_but_not_fix_mistakes() -> None:
    planned(config={"pools": {"decode": {"instances": 2}}}).check(more_may_come=True)
    with pytest.raises(ConfigError, match=r"model\.max_model_len"):
        planned(config={"model": {"max_model_len": 10**6}}).check(more_may_come=True)


def test_too_few_cores_are_counted_out() -> None:
    result = planned(config={"pools": {"decode": {"instances": 2}}})
    assert messages(result) == [
        "pools: 1 prefill instance and 2 decode instances need 3 cores, but there are 2 on this machine,"
        " where 1 decode instance found no room; lower instances, or set cpus_per_instance to a fraction so"
        " that instances share a core"
    ]
    with pytest.raises(CapacityError, match="need 3 cores, but there are 2"):
        result.check()


def test_fractions_let_instances_share_cores() -> None:
    half = {"instances": 2, "cpus_per_instance": 0.5}
    assert planned(node(2, 100), config={"pools": {"prefill": half, "decode": half}}).findings == ()
    tenth = {"instances": 10, "cpus_per_instance": 0.1}
    assert (
        planned(node(1, 500), config={"pools": {"prefill": {"instances": 0}, "decode": tenth}}).findings == ()
    )


def test_an_instance_does_not_span_machines() -> None:
    pools = {"prefill": {"instances": 0}, "decode": {"devices_per_instance": 3}}
    assert messages(planned(node(2, name="a"), node(2, name="b"), config={"pools": pools})) == [
        "pools.decode.devices_per_instance: 3 cores for one instance, but there are 2 on the largest machine"
    ]
    shared = {"prefill": {"instances": 0}, "decode": {"devices_per_instance": 3, "cpus_per_instance": 0.5}}
    assert "devices_per_instance: 3 cores" in messages(planned(config={"pools": shared}))[0]


def test_a_model_is_not_stretched_beyond_its_positions() -> None:
    result = planned(config={"model": {"max_model_len": 10000}})
    assert messages(result) == [
        "model.max_model_len: got 10000, expected at most 8192, as the model was made for"
    ]
    with pytest.raises(ConfigError, match="expected at most 8192"):
        result.check()


def test_a_cache_below_one_longest_sequence_is_refused_with_the_minimum() -> None:
    config = {"pools": {"decode": {"kv_cache_bytes": "512MiB"}}}
    assert messages(planned(config=config)) == [
        "pools.decode.kv_cache_bytes: 512 MiB holds 4096 tokens, expected at least 1073741824 bytes (1 GiB)"
        " for one sequence of model.max_model_len (8192); raise it, or lower model.max_model_len"
    ]
    assert planned(config=config | {"model": {"max_model_len": 4096}}).findings == ()


def test_all_findings_are_reported_together() -> None:
    config = {
        "model": {"max_model_len": 10000},
        "pools": {"decode": {"instances": 3, "kv_cache_bytes": "1MiB"}},
    }
    with pytest.raises(ConfigError) as caught:
        planned(node(2, 4), config=config).check()
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "model.max_model_len",
        "pools.decode.kv_cache_bytes",
        "pools",
        "memory",
    ]


NODES = st.lists(
    st.builds(node, cores=st.integers(1, 8), available_gib=st.floats(0.1, 200)), min_size=1, max_size=4
)
DEMANDS = st.lists(
    st.builds(
        Demand,
        role=st.sampled_from([Role.PREFILL, Role.DECODE]),
        num_cpus=st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0]),
        num_cores=st.just(1),
        fixed_bytes=st.integers(0, 20 * GIB),
        kv_bytes=st.none() | st.integers(1, GIB),
    ),
    max_size=10,
)


@given(nodes=NODES, demands=DEMANDS)
def test_instances_that_are_said_to_fit_do_fit(nodes: list[Node], demands: list[Demand]) -> None:
    packing = Packing(demands, nodes)
    needed, present = sum(demand.num_cpus for demand in demands), sum(len(node.cores) for node in nodes)
    if not list(packing.core_findings()):
        assert needed <= present
    elif all(demand.num_cpus <= 1 for demand in demands):
        assert needed > present - len(nodes)  # less than a core is left over on each machine


@given(nodes=NODES, demands=DEMANDS)
def test_automatic_kv_never_overfills_a_machine(nodes: list[Node], demands: list[Demand]) -> None:
    demands = [dataclasses.replace(demand, kv_bytes=None) for demand in demands]
    packing = Packing(demands, nodes)
    auto = packing.auto_kv_bytes(0.8)
    if auto is not None and auto > 0:
        assert list(packing.memory_findings({Role.PREFILL: auto, Role.DECODE: auto})) == []


def test_the_default_configuration_is_planned_for_this_machine() -> None:
    result = plan(ClusterConfig(), [node(2, 4)])
    result.check()
    assert result.model == "embedded"
    assert all(pool.num_max_len_sequences >= 1 for pool in result.pools)
    assert {pool.role for pool in plan(ClusterConfig()).pools} == {Role.PREFILL, Role.DECODE}


def test_a_missing_checkpoint_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        plan(ClusterConfig.model_validate({"model": {"path": str(tmp_path / "nothing")}}))


def test_planning_does_not_import_torch() -> None:
    code = "import sys, pdserve.planner.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_plan_has_the_defaults_of_the_checkpoint(tmp_path: Path) -> None:
    own = plan(ClusterConfig())
    assert own.default_sampling.stated == {"temperature": 0.7, "top_p": 0.95}
    none = plan(ClusterConfig.model_validate({"model": {"generation_config": "none"}}))
    assert none.default_sampling.stated == {}
    assert "sampling  temperature 0.7, top_p 0.95 where a request leaves it unset" in plan_text(own)
    assert "sampling  the defaults of OpenAI's interface where" in plan_text(none)
    assert json.loads(plan_json(own))["default_sampling"] == {"temperature": 0.7, "top_p": 0.95}


def ranks(num_ranks: int, **pool: Any) -> dict[str, Any]:
    one = {"tensor_parallel": num_ranks, **pool}
    return {"pools": {"prefill": {"instances": 0}, "decode": one}}


def test_ranks_share_the_weights_of_an_instance() -> None:
    one, four = (planned(node(8), config=ranks(n)).pools[1] for n in (1, 4))
    assert one.rank_weights_bytes == 16_060_522_496
    assert one.rank_weights_bytes < 4 * four.rank_weights_bytes < 1.001 * one.rank_weights_bytes
    assert (four.num_ranks, four.num_kv_copies, four.num_cpus) == (4, 1, 4)
    assert four.num_blocks == one.num_blocks
    assert four.instance_bytes < one.instance_bytes + 4 * RUNTIME_BYTES + (1 << 28)


def test_kv_heads_that_are_held_twice_count_twice() -> None:
    few_heads = checkpoint(num_key_value_heads=4)
    four, eight = (planned(node(8), model=few_heads, config=ranks(n)) for n in (4, 8))
    assert eight.pools[1].num_kv_copies == 2
    assert 2 * eight.pools[1].num_blocks == four.pools[1].num_blocks
    assert eight.pools[1].kv_cache_bytes == four.pools[1].kv_cache_bytes
    assert "each KV head on 2" in plan_text(eight)


@pytest.mark.parametrize(
    ("model", "num_ranks", "reason"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
            4,
            "num_attention_heads 6, expected a multiple of 4",
        ),
        ({"intermediate_size": 14340}, 8, "intermediate_size 14340, expected a multiple of 8"),
        (
            {"num_attention_heads": 24, "num_key_value_heads": 6},
            4,
            "num_key_value_heads 6, expected a multiple of 4",
        ),
        ({"vocab_size": 7}, 8, "vocab_size 7, expected at least one each"),
    ],
)
def test_a_model_that_ranks_cannot_share_is_refused(
    model: dict[str, int], num_ranks: int, reason: str
) -> None:
    result = planned(node(8), model=checkpoint(**model), config=ranks(num_ranks))
    assert messages(result) == [f"pools.decode.tensor_parallel: {num_ranks} ranks cannot share {reason}"]
    with pytest.raises(ConfigError):
        result.check()


def test_more_ranks_than_a_machine_has_cores_are_refused() -> None:
    (message,) = messages(planned(node(2), config=ranks(4)))
    assert message.startswith("pools.decode.devices_per_instance: 4 cores for one instance, but there are 2")
