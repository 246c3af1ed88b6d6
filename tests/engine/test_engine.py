"""Loading an engine: options, refusals, progress; and the guarantees of a step to a transfer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdserve.core.errors import CapacityError, ConfigError
from pdserve.core.messages import KVLayout
from pdserve.engine.batch import Batch, ScheduledChunk
from pdserve.engine.engine import Engine, EngineOptions
from tests.checkpoints import VARIANTS, reference_model, small_checkpoint
from tests.engine.driver import make_sequence, random_prompt, run_to_end


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    return lambda name: small_checkpoint(directory, name)


def test_there_are_enough_variants_and_each_differs() -> None:
    assert len(VARIANTS) >= 30
    assert len({repr(variant) for variant in VARIANTS.values()}) == len(VARIANTS)


def test_the_layout_states_everything_that_peers_must_agree_on(checkpoint: Callable[[str], Path]) -> None:
    first, second = (
        Engine.open(checkpoint(name), EngineOptions(num_blocks=4)) for name in ("llama-bf16", "llama-gqa")
    )
    assert (first.layout.num_layers, first.layout.num_kv_heads, first.layout.head_dim) == (2, 2, 16)
    assert first.layout.dtype == "bfloat16" and second.layout.dtype == "float32"
    assert isinstance(first.layout, KVLayout) and first.layout.mismatch(second.layout) is not None
    again = Engine.open(checkpoint("llama-bf16"), EngineOptions(num_blocks=9, block_size=32))
    assert first.layout.mismatch(again.layout) is None
    assert again.kv.max_model_len == 4096 and (again.kv.pool.num_blocks, again.kv.pool.block_size) == (9, 32)


def test_progress_rises_to_one(checkpoint: Callable[[str], Path]) -> None:
    fractions: list[float] = []
    Engine.open(checkpoint("llama-four-layers"), EngineOptions(num_blocks=4), fractions.append)
    assert (
        fractions == sorted(fractions) and fractions[0] < 0.2 and fractions[-1] == 1.0 and len(fractions) >= 4
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            EngineOptions(num_blocks=4, max_model_len=5000),
            ConfigError,
            "max_model_len: 5000 is more than .* 4096",
        ),
        (EngineOptions(num_blocks=4, block_size=12), ConfigError, "block_size: 12"),
        (EngineOptions(num_blocks=1 << 40), CapacityError, "no memory for a KV cache of"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: EngineOptions, error: type[Exception], message: str, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(error, match=message):
        Engine.open(checkpoint("llama-gqa"), options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama-bf16", "qwen3"])
def test_half_precision_stays_close_to_the_reference(
    name: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint(name)
    engine = Engine.open(path, EngineOptions(dtype=dtype, num_blocks=64))  # type: ignore[arg-type]
    prompt = random_prompt(384, 100, seed=1)
    token = run_to_end(engine, [make_sequence(engine, prompt, max_tokens=1, logprobs=5)])[0][0]
    with torch.no_grad():
        expected = reference_model(path)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    tolerance = 0.4 if dtype == "bfloat16" else 0.05
    for token_id, logprob in token.top_logprobs:
        assert logprob == pytest.approx(float(expected[token_id]), abs=tolerance)


def test_prefixes_cached_in_pages_of_128_are_reused_and_change_no_token(
    checkpoint: Callable[[str], Path],
) -> None:
    engine = Engine.open(checkpoint("qwen3"), EngineOptions(num_blocks=16, block_size=128))
    first = random_prompt(384, 300, seed=9)
    prompts = [first, first[:256], first[:257], first[:128] + random_prompt(384, 100, seed=10), first]

    def outputs(use_cache: bool) -> tuple[list[list[int]], list[int]]:
        sequences = [make_sequence(engine, prompt, max_tokens=4) for prompt in prompts]
        drawn = [run_to_end(engine, [seq], use_cache=use_cache)[0] for seq in sequences]
        return [[token.token_id for token in tokens] for tokens in drawn], [
            seq.num_cached_tokens for seq in sequences
        ]

    computed, num_cached = outputs(use_cache=False)
    assert num_cached == [0] * len(prompts)
    engine = Engine.open(checkpoint("qwen3"), EngineOptions(num_blocks=16, block_size=128))
    reused, num_cached = outputs(use_cache=True)
    assert num_cached == [0, 128, 256, 128, 256]  # at least the last token is computed again
    assert reused == computed


@pytest.mark.parametrize("sampled", [True, False])
def test_kv_of_a_layer_is_final_when_its_hook_runs(sampled: bool, checkpoint: Callable[[str], Path]) -> None:
    engine = Engine.open(checkpoint("qwen3-sliding-mixed"), EngineOptions(num_blocks=16))
    seq = make_sequence(engine, random_prompt(384, 40, seed=2))
    engine.kv.admit(seq)
    assert engine.kv.grow(seq, 40)
    seen: list[bytes] = []

    def read(layer: int) -> bytes:
        buffer = bytearray(40 * engine.layout.bytes_per_token // engine.layout.num_layers)
        engine.cache.gather(layer, layer + 1, seq.block_ids, 0, 40, memoryview(buffer))
        return bytes(buffer)

    chunk = ScheduledChunk(seq, 40, (0,) if sampled else ())
    tokens = engine.runner.launch(Batch((chunk,)), lambda layer: seen.append(read(layer))).collect()
    assert len(seen) == engine.config.num_layers and len(set(seen)) == len(seen)
    assert seen == [read(layer) for layer in range(engine.config.num_layers)]
    assert len(tokens[0]) == len(chunk.choices)
    assert seq.num_computed_tokens == 0 and seq.num_tokens == 40  # a runner changes no sequence


@pytest.mark.parametrize("decode_block_size", [8, 16, 32])
def test_a_decode_engine_continues_from_transferred_kv(
    decode_block_size: int, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint("qwen2-sliding-all")
    prefill = Engine.open(path, EngineOptions(num_blocks=64))
    decode = Engine.open(path, EngineOptions(num_blocks=64, block_size=decode_block_size))
    prompt = random_prompt(384, 45, seed=4)
    expected = run_to_end(
        prefill, [make_sequence(prefill, prompt, max_tokens=12, logprobs=None)], use_cache=False
    )[0]
    source, target = (
        make_sequence(engine, prompt, max_tokens=12, logprobs=None) for engine in (prefill, decode)
    )
    for engine, seq in ((prefill, source), (decode, target)):
        engine.kv.admit(seq)
        assert engine.kv.grow(seq, 45)
    first = prefill.runner.launch(
        Batch((ScheduledChunk(source, source.num_uncomputed_tokens, (0,)),))
    ).collect()[0][0]
    wire = bytearray(45 * prefill.layout.bytes_per_token)
    num_layers = prefill.layout.num_layers
    prefill.cache.gather(0, num_layers, source.block_ids, 0, 45, memoryview(wire))
    decode.cache.scatter(0, num_layers, target.block_ids, 0, 45, memoryview(wire))
    decode.kv.received(target, 45)
    target.append(first.token_id)
    decoded = [first]
    while len(decoded) < 12:
        assert decode.kv.grow(target, target.num_tokens)
        decoded += decode.runner.launch(Batch((ScheduledChunk(target, 1, (0,)),))).collect()[0]
        decode.kv.computed(target, 1)
        target.append(decoded[-1].token_id)
    assert decoded == expected


@pytest.mark.parametrize("is_late", [True, False])
def test_a_late_mask_delays_no_other_sequences_token(
    is_late: bool, checkpoint: Callable[[str], Path]
) -> None:
    """Not even when the prompt's log probabilities come with that token."""
    engine = Engine.open(checkpoint("llama-gqa"), EngineOptions(num_blocks=64))
    free = make_sequence(engine, random_prompt(384, 20, seed=5), prompt_logprobs=0)
    bound = make_sequence(engine, random_prompt(384, 9, seed=6), grammar="g")
    alone = run_to_end(
        engine, [make_sequence(engine, free.token_ids, prompt_logprobs=0, max_tokens=1)], use_cache=False
    )[0]
    for seq in (free, bound):
        engine.kv.admit(seq, use_cache=False)
        assert engine.kv.grow(seq, seq.num_tokens)

    def arrive() -> None:
        if not is_late:
            bound.token_mask = (1 << 7).to_bytes(48, "little")  # only token 7

    batch = Batch(tuple(ScheduledChunk(seq, seq.num_tokens, (0,)) for seq in (bound, free)))
    of_bound, of_free = engine.runner.launch(batch, before_sampling=arrive).collect()
    assert [token.token_id for token in of_bound] == ([] if is_late else [7])
    assert [token.token_id for token in of_free] == [alone[0].token_id]
    assert len(of_free[0].prompt_logprobs) == 19
