"""The sampler for logits on a device draws the same tokens as the host's, and reports the same."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pdserve.engine.batch import SampledToken, ScheduledChunk
from pdserve.engine.device import CudaDevice, Device, HostDevice
from pdserve.engine.on_gpu.sampler import DeviceSampler
from pdserve.engine.penalties import Penalties
from pdserve.engine.sampler import Sampler
from pdserve.kernels.reference import TorchKernels
from tests.engine.chunks import VOCAB_SIZE, follow, make_chunk, random_logits
from tests.fake_gpu import fake_gpu

MULTI_TILE = 4099  # tokens: more than one tile of the kernel that draws


@pytest.fixture(scope="module")
def device() -> Device:
    return CudaDevice() if torch.cuda.is_available() else HostDevice()


def sample(
    device: Device, logits: torch.Tensor, chunks: list[ScheduledChunk], rows: list[int] | None = None
) -> list[list[SampledToken]]:
    sampler = DeviceSampler(device, logits.shape[1])
    there = logits.to(device.torch_device, copy=True)
    tokens = sampler.sample(there, sampler.prepare(chunks, rows))
    reported = tokens.report()
    assert tokens.token_ids.device.type == device.torch_device.type
    assert tokens.token_ids.tolist() == [token.token_id for of_chunk in reported for token in of_chunk]
    return reported


def assert_as_on_the_host(
    device: Device, logits: torch.Tensor, chunks: list[ScheduledChunk]
) -> list[list[SampledToken]]:
    sampled = sample(device, logits, chunks)
    expected = Sampler(TorchKernels()).sample(logits.clone(), chunks)
    assert [len(tokens) for tokens in sampled] == [len(tokens) for tokens in expected]
    for token, wanted in zip(chain(*sampled), chain(*expected), strict=True):
        assert token.token_id == wanted.token_id
        assert token.logprob == pytest.approx(wanted.logprob, abs=1e-5, nan_ok=True)
        assert [token_id for token_id, _ in token.top_logprobs] == [
            token_id for token_id, _ in wanted.top_logprobs
        ]
        given, expected_top = (
            [value for _, value in tops] for tops in (token.top_logprobs, wanted.top_logprobs)
        )
        assert given == pytest.approx(expected_top, abs=1e-5)
    return sampled


token_ids = st.integers(0, VOCAB_SIZE - 1)
parameters = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**64 - 1), "temperature": st.sampled_from([0.0, 0.0, 0.4, 1.0, 3.0])},
    optional={
        "top_k": st.sampled_from([1, 5, 40, 10**6]),
        "top_p": st.sampled_from([0.0, 0.3, 0.9, 0.999]),
        "min_p": st.sampled_from([0.01, 0.2, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.3]),
        "presence_penalty": st.sampled_from([-1.1, 0.7]),
        "frequency_penalty": st.sampled_from([-0.3, 0.9]),
        "logit_bias": st.dictionaries(token_ids, st.floats(-100, 100), max_size=6).map(
            lambda bias: tuple(bias.items())
        ),
        "logprobs": st.sampled_from([0, 1, 6, 20]),
        "n": st.integers(2, 4),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE + 10_000), max_size=3).map(tuple),
        "grammar": st.just("g"),
    },
)
row = st.tuples(parameters, st.lists(token_ids, max_size=5), st.sets(token_ids, min_size=1, max_size=9))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(row, min_size=1, max_size=5),
    st.sampled_from([VOCAB_SIZE, 64, 2051]),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_tokens_and_logprobs_equal_those_of_the_hosts_sampler(
    device: Device, rows: list[Any], vocab_size: int, seed: int, has_equal_logits: bool
) -> None:
    chunks = []
    for sampling, output, allowed in rows:
        chunk = make_chunk([1, 2, 3, 2], output=tuple(output), **sampling)
        chunks.append(follow(chunk, *allowed, vocab_size=vocab_size) if "grammar" in sampling else chunk)
    logits = random_logits(seed, len(chunks), vocab_size)
    assert_as_on_the_host(device, logits.round() if has_equal_logits else logits, chunks)


def test_rows_of_more_than_one_tile_are_sampled_as_on_the_host(device: Device) -> None:
    logits = random_logits(1, 3, MULTI_TILE)
    bound = make_chunk(grammar="g", temperature=0.8, min_tokens=9, seed=3)
    chunks = [
        make_chunk(top_p=0.95, top_k=3000, repetition_penalty=1.2, logprobs=3, n=3),
        follow(bound, 5, *range(0, MULTI_TILE, 7), vocab_size=MULTI_TILE),
        make_chunk(temperature=0.0, logit_bias=((MULTI_TILE - 1, 60.0),)),
    ]
    assert assert_as_on_the_host(device, logits, chunks)[2][0].token_id == MULTI_TILE - 1


@pytest.mark.parametrize("vocab_size", [8, 50, 64, MULTI_TILE])
def test_edited_logits_equal_the_hosts_bit_for_bit(device: Device, vocab_size: int) -> None:
    logits = random_logits(2, 5, vocab_size)
    logits[0, 1] = -0.0
    penalties: dict[str, Any] = {
        "repetition_penalty": 1.37,
        "presence_penalty": 0.61,
        "frequency_penalty": 0.27,
    }
    chunks = [
        make_chunk(output=(1, 1, 7), logit_bias=((1, 0.3), (4, -2.7)), min_tokens=9, logprobs=0, **penalties),
        make_chunk(min_tokens=1, stop_token_ids=(7, vocab_size)),
        make_chunk(output=(3, 6), bad_words=((1,), (3, 6, 2), (vocab_size,)), min_tokens=9),
        follow(
            make_chunk(output=(3, 3, 6), grammar="g", min_tokens=9, **penalties),
            2,
            5,
            7,
            vocab_size=vocab_size,
        ),
        make_chunk(),
    ]
    there = logits.to(device.torch_device, copy=True)
    sampler = DeviceSampler(device, vocab_size)
    sampler.sample(there, sampler.prepare(chunks))
    on_host = Penalties()
    for row, chunk in zip(logits.numpy(), chunks, strict=True):
        on_host.apply(chunk.sequence, row)
    assert torch.equal(there.cpu(), logits)


def test_plain_greedy_rows_copy_nothing_to_the_device(device: Device) -> None:
    logits = random_logits(3, 2)
    logits[0, [7, 9]] = 50.0
    chunks = [make_chunk(temperature=0.0), make_chunk(temperature=1e-9)]
    assert not DeviceSampler(device, VOCAB_SIZE).prepare(chunks).there
    assert assert_as_on_the_host(device, logits, chunks)[0] == [SampledToken(7)]


def test_a_step_that_samples_nothing_has_no_tokens(device: Device) -> None:
    assert sample(device, random_logits(0, 0), []) == []
    assert sample(device, random_logits(0, 2), [], rows=[]) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_sampled_are_left_out(device: Device, temperature: float) -> None:
    logits = random_logits(4, 4)
    options: list[dict[str, Any]] = [{"frequency_penalty": 2.0}, {"logprobs": 2}]
    chunks = [make_chunk(output=(9,), temperature=temperature, seed=6, **given) for given in options]
    for rows in ([0, 1], [1, 3], [3, 0]):
        assert sample(device, logits, chunks, rows) == sample(device, logits[rows], chunks)


@pytest.mark.parametrize("overflow", [float("inf"), float("nan")])
def test_a_row_that_overflowed_does_not_stop_the_others(device: Device, overflow: float) -> None:
    logits = random_logits(12, num_rows=2)
    logits[0, 17] = overflow
    chunks = [make_chunk(top_p=0.9, min_p=0.1, top_k=9, logprobs=0), make_chunk(seed=3, logprobs=2)]
    broken, _ = assert_as_on_the_host(device, logits, chunks)
    assert broken[0].logprob is not None
    assert broken[0].token_id == 17 and np.isnan(broken[0].logprob)


def test_penalties_follow_the_sequence_from_step_to_step(device: Device) -> None:
    sampler = DeviceSampler(device, 100)
    chunk = make_chunk(list(range(1, 40)) * 3, temperature=0.0, frequency_penalty=1.0)
    drawn = []
    for _ in range(100):
        logits = torch.zeros(1, 100, device=device.torch_device)
        drawn.append(sampler.sample(logits, sampler.prepare([chunk])).report()[0][0].token_id)
        chunk.sequence.append(drawn[-1])
    assert drawn == list(range(100))  # each token is taken once before any is taken twice


def test_tokens_of_earlier_steps_are_not_overwritten(device: Device) -> None:
    sampler = DeviceSampler(device, VOCAB_SIZE)
    chunk = make_chunk(n=4, seed=1, logprobs=3)
    logits = torch.cat([random_logits(seed) for seed in range(6)])
    prepared = [sampler.prepare([chunk]) for _ in logits]  # the host is ahead of the device
    there = logits.to(device.torch_device, copy=True)
    under_way = [sampler.sample(row[None], of_row) for row, of_row in zip(there, prepared, strict=True)]
    for row, tokens in zip(logits, under_way, strict=True):
        assert tokens.report() == sample(device, row[None], [chunk])


@pytest.mark.parametrize("options", [{"presence_penalty": 0.5}, {"grammar": "g"}])
def test_a_row_that_depends_on_a_pending_token_is_refused(device: Device, options: dict[str, Any]) -> None:
    plain, dependent = make_chunk(output=(0,), min_tokens=3), make_chunk(output=(0,), **options)
    for chunk in (plain, dependent):
        chunk.sequence.num_pending_tokens = 1
    sampler = DeviceSampler(device, VOCAB_SIZE)
    sampler.prepare([plain])
    with pytest.raises(AssertionError, match="not known"):
        sampler.prepare([dependent])


@pytest.mark.parametrize("is_inference", [False, True])
def test_nothing_waits_for_a_gpu_before_tokens_are_read(is_inference: bool) -> None:
    penalties: dict[str, Any] = {
        "repetition_penalty": 1.37,
        "presence_penalty": 0.61,
        "frequency_penalty": 0.27,
    }
    everything = [
        make_chunk(
            output=(1, 1, 7), logit_bias=((1, 0.3), (4, -2.7)), min_tokens=9, logprobs=5, n=3, **penalties
        ),
        make_chunk(temperature=0.0, logprobs=0),
        follow(make_chunk(output=(3, 6), grammar="g", min_tokens=9, **penalties), 2, 5, 7),
        make_chunk(min_tokens=1, stop_token_ids=(7,)),
    ]
    greedy = [make_chunk(temperature=0.0) for _ in range(3)]
    with torch.inference_mode(is_inference), fake_gpu() as gpu:
        sampler = DeviceSampler(gpu, VOCAB_SIZE)
        for chunks, num_tokens, launched in (
            (everything, 6, ["_forbid_block", "_draw_token"]),
            (greedy, 3, []),
            ([], 0, []),
        ):
            gpu.launched.clear()
            logits = torch.empty(5, VOCAB_SIZE, device=gpu.torch_device)
            for rows in (None, list(range(len(chunks)))):
                tokens = sampler.sample(logits, sampler.prepare(chunks, rows))
                assert tokens.token_ids.device == gpu.torch_device and tokens.token_ids.shape == (num_tokens,)
            assert gpu.launched == 2 * launched
