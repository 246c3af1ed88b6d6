"""A decode step as captured graphs, one for each of a ladder of batch sizes.

A step of N sequences replays the smallest graph that holds them; surplus rows have no slot and no keys, so
nothing is read or written for them. Data that changes from step to step is packed on the host and copied in
one piece (`staging.py`), block tables only when they change. The host need not know the token ids: a row
takes its own from among the recently drawn ones."""

from dataclasses import dataclass

import torch

from ...kernels import AttentionBatch
from ...kernels.triton.decode_attention import DecodeBatch, decode_workspace
from ...kernels.triton.decode_plan import DecodePlan, DecodeShape, plan_decode
from ...kernels.triton.kernels import TritonKernels
from ...kernels.triton.paged_attention import DecodeWork, num_multiprocessors
from ..batch import Batch
from ..device import Device, Graph
from ..inputs import BlockTables
from ..kv_cache import KVCache
from ..model import Model, ModelInput
from .drawn_tokens import KNOWN, DrawnTokens
from .staging import Array, Field, Staging

_NO_SLOT = -1
# whose contexts seldom have as many pieces as they may: a program for each would mostly be idle
_FEW_ROWS = 8


def ladder(max_batch_size: int) -> tuple[int, ...]:
    """Returns the batch sizes that get a graph: a surplus row costs little, a graph some memory and time at
    start."""
    sizes = []
    size = 1
    while size < max_batch_size:
        sizes.append(size)
        size += (
            1
            if size == 1
            else 2
            if size == 2
            else 4
            if size == 4
            else 8
            if size < 64
            else 16
            if size < 128
            else 32
        )
    return (*sizes, max_batch_size)


@dataclass(frozen=True)
class _Rung:
    """The graph of one batch size, and the tensor of its logits."""

    size: int
    shapes: dict[int | None, DecodeShape]  # by window
    graph: Graph


class DecodeGraphs:
    """Captured at construction; the engine's thread calls `run`."""

    def __init__(
        self,
        device: Device,
        model: Model,
        cache: KVCache,
        kernels: TritonKernels,
        drawn: DrawnTokens,
        *,
        max_batch_size: int,
        max_model_len: int,
    ) -> None:
        self._device = device
        self._model = model
        self._cache = cache
        self._kernels = kernels
        self._drawn = drawn
        self._max_model_len = max_model_len
        self._max_batch_size = max_batch_size
        self._windows = tuple(dict.fromkeys(model.config.sliding_windows))
        self._block_size = cache.layout.block_size
        max_blocks = -(-max_model_len // self._block_size)
        self._host_tables = BlockTables(max_blocks)
        there = device.torch_device
        largest = self._shapes(max_batch_size)
        self._staging = Staging(device, [*_row_fields(max_batch_size), *_plan_fields(largest, max_model_len)])
        self._tables = torch.zeros((max_batch_size, max_blocks), dtype=torch.int32, device=there)
        self._query_start_loc = torch.arange(max_batch_size + 1, dtype=torch.int32, device=there)
        self._logits = torch.empty((max_batch_size, model.config.vocab_size), device=there)
        self._workspaces = {
            window: decode_workspace(
                shape, model.config.num_heads, model.config.head_dim, max_model_len, str(there)
            )
            for window, shape in largest.items()
        }
        # The largest first: the memory of its intermediate results is enough for all that follow.
        self._rungs = [self._capture(size) for size in reversed(ladder(max_batch_size))][::-1]

    def takes(self, batch: Batch) -> bool:
        """Returns whether every sequence has one token, and draws from it."""
        chunks = batch.chunks
        return len(chunks) <= self._max_batch_size and all(
            chunk.num_tokens == 1 and chunk.choices for chunk in chunks
        )

    def run(self, batch: Batch) -> torch.Tensor:
        """Queues one step of a batch that it `takes`.

        Returns logits, float32 [len(batch.chunks), V], valid until the next call.
        """
        num_rows = len(batch.chunks)
        rung = next(rung for rung in self._rungs if rung.size >= num_rows)
        self._send_tables([chunk.sequence.block_ids for chunk in batch.chunks])
        arrays = self._staging.fill()
        self._write_rows(arrays, batch)
        self._write_plans(arrays, rung, arrays["context_lens"][:num_rows].tolist())
        self._staging.send()
        rung.graph.replay()
        return self._logits[:num_rows]

    def _write_rows(self, arrays: dict[str, Array], batch: Batch) -> None:
        """The host's block tables are this batch's."""
        sequences = [chunk.sequence for chunk in batch.chunks]
        starts = [chunk.start for chunk in batch.chunks]
        num_rows = len(sequences)
        sources = self._drawn.places_of(sequences)
        if KNOWN in sources:
            arrays["token_ids"][:num_rows] = [
                seq.token_ids[start] if source == KNOWN else 0
                for seq, start, source in zip(sequences, starts, sources, strict=True)
            ]
        arrays["positions"][:num_rows] = starts
        positions = arrays["positions"][:num_rows]
        arrays["context_lens"][:num_rows] = positions + 1
        arrays["sources"][:num_rows], arrays["sources"][num_rows:] = sources, KNOWN
        arrays["slots"][:num_rows] = self._host_tables.slots(positions, self._block_size)
        arrays["slots"][num_rows:] = _NO_SLOT

    def _write_plans(self, arrays: dict[str, Array], rung: _Rung, context_lens: list[int]) -> None:
        query_lens = [1] * len(context_lens)
        for index, shape in enumerate(rung.shapes.values()):
            plan = plan_decode(shape, query_lens, context_lens, self._max_model_len)
            _overwrite(arrays[f"pieces{index}"], plan.pieces)
            _overwrite(arrays[f"partial_start{index}"], plan.partial_start)

    def _send_tables(self, block_lists: list[list[int]]) -> None:
        if self._host_tables.update(block_lists):
            used = self._host_tables.rows(len(block_lists))[:, : max(map(len, block_lists))]
            self._tables[: len(used), : used.shape[1]].copy_(
                self._device.pinned(used.contiguous()), non_blocking=True
            )

    def _shapes(self, size: int) -> dict[int | None, DecodeShape]:
        config = self._model.config
        return {
            window: DecodeShape(
                max_seqs=size,
                max_query_len=1,
                num_kv_heads=config.num_kv_heads,
                block_size=self._block_size,
                num_multiprocessors=num_multiprocessors(self._device.torch_device),
                window=window,
                takes_turns=size <= _FEW_ROWS,
            )
            for window in self._windows
        }

    def _capture(self, size: int) -> _Rung:
        shapes = self._shapes(size)
        there = self._staging.on_device
        batch = AttentionBatch(
            query_start_loc=self._query_start_loc[: size + 1],
            context_lens=there["context_lens"][:size],
            block_tables=self._tables[:size],
            slot_mapping=there["slots"][:size],
        )
        works = {}
        for index, (window, shape) in enumerate(shapes.items()):
            pieces = there[f"pieces{index}"][: 4 * shape.max_pieces(self._max_model_len)].view(-1, 4)
            plan = DecodePlan(shape, pieces, there[f"partial_start{index}"][: size + 1])
            planned = DecodeBatch(batch.query_start_loc, batch.context_lens, batch.block_tables, plan)
            works[window] = DecodeWork(planned, self._workspaces[window])
        self._kernels.attention.adopt(batch, works)

        def step() -> None:
            sources = there["sources"][:size]
            token_ids = self._drawn.take(sources, there["token_ids"][:size])
            hidden = self._model.forward(
                ModelInput(token_ids, there["positions"][:size], batch, None), self._cache
            )
            self._kernels.linear_into(hidden, self._model.head, self._logits[:size])

        self._clear(shapes)
        step()  # compiles the kernels to be captured
        return _Rung(size, shapes, self._device.capture(step))

    def _clear(self, shapes: dict[int | None, DecodeShape]) -> None:
        """Clears all rows: none has a slot or keys."""
        arrays = self._staging.fill()
        for array in arrays.values():
            array[:] = 0
        arrays["slots"][:] = _NO_SLOT
        arrays["sources"][:] = KNOWN
        for index in range(len(shapes)):
            arrays[f"pieces{index}"][:] = -1
        self._staging.send()


def _row_fields(size: int) -> list[Field]:
    return [
        Field("token_ids", torch.int64, size),
        Field("sources", torch.int64, size),
        Field("positions", torch.int64, size),
        Field("slots", torch.int64, size),
        Field("context_lens", torch.int32, size),
    ]


def _plan_fields(shapes: dict[int | None, DecodeShape], max_context_len: int) -> list[Field]:
    fields = []
    for index, shape in enumerate(shapes.values()):
        fields.append(Field(f"pieces{index}", torch.int32, 4 * shape.max_pieces(max_context_len)))
        fields.append(Field(f"partial_start{index}", torch.int32, shape.max_seqs + 1))
    return fields


def _overwrite(array: Array, values: torch.Tensor) -> None:
    flat = values.flatten().numpy()
    array[: len(flat)] = flat
