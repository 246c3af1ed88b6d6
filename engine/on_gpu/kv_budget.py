"""Determines how many KV blocks fit a GPU: measured after the weights are loaded, by a step of the largest
kind."""

from ...core.errors import CapacityError
from ...core.messages import KVLayout
from ...kernels import Kernels
from ..device import Device
from ..kv_cache import KVCache
from ..model import Model
from .warm_up import prompt_step

_GRAPH_BYTES = 8 << 20  # the driver's part of one captured graph, a generous estimate
_LINK_BYTES = 512 << 20  # for transfers: a ring of 64 MiB for each peer, and NCCL's own memory
# at most at a time: the step's and the graphs', and seven float32 ones that log probabilities take
_LOGITS_COPIES = 8


def num_blocks_that_fit(
    device: Device,
    model: Model,
    layout: KVLayout,
    kernels: Kernels,
    *,
    memory_fraction: float,
    max_model_len: int,
    max_batch_size: int,
    max_batch_tokens: int,
    num_graphs: int,
) -> int:
    """Returns the number of blocks within `memory_fraction` of the device's memory, all else of this process
    included.

    Raises CapacityError where not even one sequence of `max_model_len` fits.
    """
    peak = device.peak_bytes(
        lambda: _largest_step(device, model, layout, kernels, max_model_len, max_batch_tokens)
    )
    logits_bytes = 4 * max_batch_size * model.config.vocab_size
    memory = device.memory()
    graph_bytes = peak * max_batch_size // max_batch_tokens + num_graphs * _GRAPH_BYTES
    reserved = peak + _LOGITS_COPIES * logits_bytes + graph_bytes + _LINK_BYTES
    room = min(int(memory.total * memory_fraction) - memory.used, memory.free) - reserved
    num_blocks = room // (layout.block_size * layout.bytes_per_token)
    needed = -(-max_model_len // layout.block_size)
    if num_blocks < needed:
        raise CapacityError(
            f"kv_cache_bytes: the GPU has room for {max(num_blocks, 0)} blocks of {layout.block_size} tokens"
            f" beside {memory.used:,} bytes of weights and libraries and {reserved:,} bytes of intermediate"
            f" results, within {memory_fraction:g} of its {memory.total:,} bytes; expected at least {needed},"
            f" for one sequence of model.max_model_len ({max_model_len}); lower it or max_batch_tokens, or"
            " raise gpus_per_instance"
        )
    return num_blocks


def _largest_step(
    device: Device,
    model: Model,
    layout: KVLayout,
    kernels: Kernels,
    max_model_len: int,
    max_batch_tokens: int,
) -> None:
    """Runs a step with the maximum number of prompt tokens."""
    lengths = [max_model_len] * (max_batch_tokens // max_model_len)
    if max_batch_tokens % max_model_len:
        lengths.append(max_batch_tokens % max_model_len)
    prompt_step(device, model, KVCache(layout, 1, kernels, device), lengths, max_model_len)
