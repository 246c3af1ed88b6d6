"""An engine on 2, 4 or 8 ranks against `transformers`, and against the engine on one."""

import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from gguf import GGMLQuantizationType

from pdserve.core.errors import ConfigError
from pdserve.engine.checkpoint import open_checkpoint
from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.parallel.group import Deadlines, RankLost
from pdserve.engine.parallel.shard import Shard
from pdserve.engine.parallel.steps import FIRST_FREE_KIND
from pdserve.engine.parallel.stream import Message
from pdserve.engine.sequence import Sequence
from pdserve.engine.tensor_names import expected_tensors
from pdserve.engine.tensor_reader import TensorReader
from tests.checkpoints import VARIANTS, reference_model, small_checkpoint
from tests.deadlines import WAIT_S
from tests.engine.driver import make_sequence, random_prompt, run_to_end
from tests.engine.greedy import assert_equal, generate_greedily
from tests.engine.parallel.rank_pool import ENDED, RankPool
from tests.gguf_files import write_gguf

OPTIONS = EngineOptions(dtype="float32", num_blocks=128)
INDIVISIBLE = {"llama-one-head", "llama-odd-head-count"}
KIND = FIRST_FREE_KIND
GIVEN_UP = "another rank has given up, or was ended"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def prompts(engine: Engine, *lengths: int) -> list[tuple[int, ...]]:
    return [tuple(random_prompt(engine.config.vocab_size, length, length)) for length in lengths]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in INDIVISIBLE])
def test_every_variant_equals_transformers(name: str, directory: Path, pool: RankPool) -> None:
    path = small_checkpoint(directory, name)
    model, references = reference_model(path), None
    for num_ranks in (2, 4):
        with pool.engine(path, num_ranks, OPTIONS) as (engine, _):
            texts = prompts(engine, 45, 17)
            references = references or [generate_greedily(model, text, 4) for text in texts]
            sequences = [make_sequence(engine, text, max_tokens=4) for text in texts]
            for output, reference in zip(
                run_to_end(engine, sequences, max_chunk=32), references, strict=True
            ):
                assert_equal(output, reference)
        assert set(pool.ends.values()) == {ENDED}


def test_eight_ranks_that_share_two_kv_heads_equal_transformers(directory: Path, pool: RankPool) -> None:
    path = small_checkpoint(directory, "llama-wide")
    with pool.engine(path, 8, OPTIONS) as (engine, _):
        assert engine.layout.num_kv_heads == 1
        (text,) = prompts(engine, 40)
        output = run_to_end(engine, [make_sequence(engine, text, max_tokens=4)])[0]
    assert_equal(output, generate_greedily(reference_model(path), text, 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_depends_neither_on_the_batch_nor_on_the_run(
    dtype: Literal["float32", "bfloat16"], directory: Path, pool: RankPool
) -> None:
    """Down to the bits of log probabilities; sampled, forked with copy-on-write, penalised, and with the
    prompt's log probabilities."""
    path = small_checkpoint(directory, "qwen2")
    options = replace(OPTIONS, dtype=dtype)
    sampling: list[dict[str, Any]] = [
        {},
        {"temperature": 1.1, "seed": 3, "n": 3},
        {"temperature": 0.9, "seed": 4, "top_p": 0.8, "repetition_penalty": 1.3},
        {"prompt_logprobs": 1},
    ]
    runs = []
    for _ in range(2):
        with pool.engine(path, 2, options) as (engine, _):

            def sequences() -> list[Sequence]:
                texts = prompts(engine, 70, 20, 33, 150)
                return [
                    make_sequence(engine, text, max_tokens=5, **extra)
                    for text, extra in zip(texts, sampling, strict=True)
                ]

            alone = [run_to_end(engine, [seq], use_cache=False)[0] for seq in sequences()]
            runs += [alone, run_to_end(engine, sequences(), max_chunk=37), run_to_end(engine, sequences())]
    assert all(run == runs[0] for run in runs)
    assert len(runs[0][3][0].prompt_logprobs) == 149
    if dtype == "float32":
        single = Engine.open(path, options)
        for mine, expected in zip(runs[0], run_to_end(single, sequences()), strict=True):
            assert [token.token_id for token in mine] == [token.token_id for token in expected]
            assert [token.logprob for token in mine] == pytest.approx(
                [token.logprob for token in expected], abs=1e-4
            )


def test_a_gguf_file_is_shared_by_ranks(directory: Path, pool: RankPool) -> None:
    reference = reference_model(small_checkpoint(directory, "llama-gqa"))
    path = write_gguf(directory / "model.gguf", reference)
    with pool.engine(path, 2, OPTIONS) as (engine, _):
        (text,) = prompts(engine, 30)
        output = run_to_end(engine, [make_sequence(engine, text, max_tokens=4)])[0]
    assert_equal(output, generate_greedily(reference, text, 4))


@pytest.mark.parametrize("source", ["llama-all-biases-tied", "llama-sharded-fp16", "q4_0"])
def test_the_parts_of_all_ranks_make_up_each_tensor(source: str, directory: Path) -> None:
    if source == "q4_0":  # blocks of 32: a part of down_proj's 96 columns ends within one
        model = reference_model(small_checkpoint(directory, "llama-mha"))
        path = write_gguf(directory / "q4_0.gguf", model, GGMLQuantizationType.Q4_0)
    else:
        path = small_checkpoint(directory, source)
    checkpoint = open_checkpoint(path)
    config, whole = checkpoint.config, TensorReader(checkpoint, torch.float32)
    shards = Shard(0, 2).all() if source == "llama-sharded-fp16" else Shard(0, 4).all()
    fractions: list[float] = []
    readers = [
        TensorReader(checkpoint, torch.float32, None, fractions.append, shard=shard) for shard in shards
    ]
    for name, shape in expected_tensors(config).items():
        tensor = whole(name, shape)
        for shard, reader in zip(shards, readers, strict=True):
            part = shard.part(name, config)
            local = reader(name, expected_tensors(shard.of(config))[name])
            if part is None:
                assert torch.equal(local, tensor)
            elif part.span:
                assert torch.equal(local, tensor.narrow(part.dim, part.span.start, len(part.span)))
            else:
                assert not local.any()
    assert max(fractions) == 1.0


@pytest.mark.parametrize(
    ("name", "field"), [("llama-one-head", "num_attention_heads 1"), ("llama-odd-head-count", "heads 3")]
)
def test_a_model_that_does_not_divide_is_refused_by_every_rank(
    name: str, field: str, directory: Path, pool: RankPool
) -> None:
    path = small_checkpoint(directory, name)
    with (
        pytest.raises(ConfigError, match=f"2 ranks cannot share .*{field}"),
        pool.engine(path, 2, OPTIONS),
    ):
        pytest.fail("it was loaded")
    assert field in pool.ends[1] or "given up" in pool.ends[1]  # whichever is first ends the group


def test_ranks_that_see_different_checkpoints_are_refused(directory: Path, pool: RankPool) -> None:
    path = small_checkpoint(directory, "llama-gqa")
    other = small_checkpoint(directory / "other", "llama-gqa", seed=1)
    message = "checkpoint: rank 1 has '.*', expected rank 0's '"
    with (
        pytest.raises(ConfigError, match=message),
        pool.engine(path, 2, OPTIONS, other_paths={1: other}),
    ):
        pytest.fail("it was loaded")
    assert re.search(message, pool.ends[1])


def test_messages_of_the_caller_stay_in_the_order_of_steps(directory: Path, pool: RankPool) -> None:
    path = small_checkpoint(directory, "llama-four-layers")
    with pool.engine(path, 4, OPTIONS) as (engine, group):
        assert group.leader is not None
        for number in range(3):
            group.send(KIND, b"before")
            text = prompts(engine, 20)[0]
            run_to_end(engine, [make_sequence(engine, text, max_tokens=1 + number)], use_cache=False)
            group.send(KIND + 1, b"behind")
            replies: dict[int, list[Message]] = {1: [], 2: [], 3: []}
            while sum(map(len, replies.values())) < 6:
                for rank, message in group.leader.replies(WAIT_S):
                    replies[rank].append(message)
            layers = bytes(range(4)) * (1 + number)
            expected = [Message(KIND, bytearray(b"before")), Message(KIND + 1, bytearray(b"behind" + layers))]
            assert list(replies.values()) == [expected] * 3


def generate_without(
    rank: int, number: signal.Signals, engine: Engine, pool: RankPool, num_tokens: int = 8
) -> None:
    """Generates when a rank has got a signal; lets one that was stopped go on afterwards."""
    sequences = [make_sequence(engine, text, max_tokens=num_tokens) for text in prompts(engine, 30, 40)]
    pool.signal(rank, number)
    try:
        run_to_end(engine, sequences)
    finally:
        if number is signal.SIGSTOP:
            pool.signal(rank, signal.SIGCONT)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_that_dies_ends_the_step_of_rank_0(rank: int, directory: Path, pool: RankPool) -> None:
    path = small_checkpoint(directory, "llama-gqa")
    with pytest.raises(RankLost) as lost, pool.engine(path, 4, OPTIONS) as (engine, _):
        generate_without(rank, signal.SIGKILL, engine, pool)
    assert pool.ends.pop(rank) == "dead"
    reasons = [f"RankLost: {lost.value}", *pool.ends.values()]
    assert f"RankLost: rank {rank} has died" in reasons
    assert set(reasons) <= {f"RankLost: rank {rank} has died", f"RankLost: {GIVEN_UP}"}


def test_a_rank_that_freezes_ends_the_step_of_rank_0(directory: Path, pool: RankPool) -> None:
    path = small_checkpoint(directory, "llama-gqa")
    deadlines = Deadlines(step_s=0.2, start_s=WAIT_S)
    with (
        pytest.raises(RankLost, match="rank 1 did not come in time"),
        pool.engine(path, 2, OPTIONS, deadlines=deadlines) as (engine, _),
    ):
        generate_without(1, signal.SIGSTOP, engine, pool)
    assert pool.ends == {1: f"RankLost: {GIVEN_UP}"}
