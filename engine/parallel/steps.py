"""A step's inputs as one message from rank 0 to the others. Flat arrays travel as their bytes; of block
tables, the columns in use."""

from typing import NamedTuple

import msgspec
import torch

from ...kernels import AttentionBatch
from ..batch import Batch
from ..inputs import sampled_rows
from ..model import ModelInput
from ..prompt_logprobs import pieces, prompt_rows

# kinds of messages; all others are a caller's own
STEP = 0
STOP = 1
FIRST_FREE_KIND = 16


class Step(NamedTuple):
    """The work of a rank that neither schedules nor samples."""

    copies: tuple[tuple[int, int], ...]  # of blocks, made first
    inputs: ModelInput
    prompt_rows: tuple[range, ...]  # whose logits are computed for log probabilities of the prompt


class _Packed(msgspec.Struct, array_like=True):
    token_ids: bytearray  # int64
    positions: bytearray  # int64
    slots: bytearray  # int64
    starts: bytearray  # int32
    context_lens: bytearray  # int32
    tables: bytearray  # int32
    sampled: bytearray | None  # int64
    needs_all_rows: bool
    copies: tuple[tuple[int, int], ...]
    prompt_rows: tuple[tuple[int, int], ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Packed)


def encode_step(batch: Batch, inputs: ModelInput) -> bytes:
    attention, sampled = inputs.attention, inputs.sampled
    num_columns = max(len(chunk.sequence.block_ids) for chunk in batch.chunks)
    rows = [rows for _, rows in prompt_rows(batch.chunks)] if inputs.needs_all_rows else []
    return _encoder.encode(
        _Packed(
            _bytes(inputs.token_ids),
            _bytes(inputs.positions),
            _bytes(attention.slot_mapping),
            _bytes(attention.query_start_loc),
            _bytes(attention.context_lens),
            _bytes(attention.block_tables[:, :num_columns]),
            None if sampled is None else _bytes(sampled.rows),
            inputs.needs_all_rows,
            batch.copies,
            tuple((piece.start, piece.stop) for span in rows for piece in pieces(span)),
        )
    )


def decode_step(payload: bytearray) -> Step:
    packed = _decoder.decode(payload)
    context_lens = _tensor(packed.context_lens, torch.int32)
    attention = AttentionBatch(
        query_start_loc=_tensor(packed.starts, torch.int32),
        context_lens=context_lens,
        block_tables=_tensor(packed.tables, torch.int32).view(len(context_lens), -1),
        slot_mapping=_tensor(packed.slots, torch.int64),
    )
    inputs = ModelInput(
        _tensor(packed.token_ids, torch.int64),
        _tensor(packed.positions, torch.int64),
        attention,
        None if packed.sampled is None else sampled_rows(attention, _tensor(packed.sampled, torch.int64)),
        packed.needs_all_rows,
    )
    return Step(packed.copies, inputs, tuple(range(*piece) for piece in packed.prompt_rows))


def _bytes(tensor: torch.Tensor) -> bytearray:
    return bytearray(tensor.contiguous().numpy().data)


def _tensor(data: bytearray, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
