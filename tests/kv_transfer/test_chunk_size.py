"""Chunk sizes, by link and by transfer."""

import pytest
from hypothesis import given, strategies as st

from pdserve.core.messages import KVLayout
from pdserve.core.request import TransferId
from pdserve.kv_transfer.choice import LINKS
from pdserve.kv_transfer.chunk_size import CHUNK_BYTES, WANTED_CHUNKS, chunk_bytes
from pdserve.kv_transfer.config import TransferConfig
from pdserve.kv_transfer.counters import TransferCounters
from pdserve.kv_transfer.events import LinkUp, OpenTransfer, PartComputed, SendChunk
from pdserve.kv_transfer.protocol import Accept
from pdserve.kv_transfer.sender import TransferSender
from pdserve.kv_transfer.span import Span

MIB = 1 << 20
CELL_BYTES = 4096  # of one layer of one token, as in an 8B model


def test_every_link_has_its_sizes() -> None:
    assert set(CHUNK_BYTES) == set(LINKS)
    assert all(0 < sizes.smallest <= sizes.largest for sizes in CHUNK_BYTES.values())


@pytest.mark.parametrize(
    ("link", "transfer_bytes", "expected_bytes"),
    [
        ("shm", 1024 * MIB, 2 * MIB),
        ("gloo", 1024 * MIB, 4 * MIB),
        ("cuda_ipc", 1024 * MIB, 16 * MIB),
        ("nccl", 1024 * MIB, 16 * MIB),
        ("shm", 8 * MIB, MIB),  # eighths
        ("cuda_ipc", 64 * MIB, 8 * MIB),
        ("shm", MIB, MIB // 4),  # no smaller ones
        ("cuda_ipc", 8 * MIB, 4 * MIB),
    ],
)
def test_chunks_are_eighths_within_their_links_bounds(
    link: str, transfer_bytes: int, expected_bytes: int
) -> None:
    slot_bytes = TransferConfig().chunk_bytes_of(link)
    assert chunk_bytes(link, slot_bytes, transfer_bytes // CELL_BYTES, CELL_BYTES) == expected_bytes


@given(st.sampled_from(LINKS), st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.integers(0, 64 * MIB))
def test_a_chunk_holds_a_cell_and_fits_the_slot(
    link: str, num_cells: int, bytes_per_cell: int, more_bytes: int
) -> None:
    slot_bytes = bytes_per_cell + more_bytes
    size = chunk_bytes(link, slot_bytes, num_cells, bytes_per_cell)
    assert bytes_per_cell <= size <= slot_bytes
    assert size >= min(slot_bytes, num_cells * bytes_per_cell // WANTED_CHUNKS)


@pytest.mark.parametrize(("link", "layers_a_chunk"), [("gloo", 1), ("cuda_ipc", 2)])
def test_a_sender_cuts_to_the_links_chunk_size(link: str, layers_a_chunk: int) -> None:
    """The same prompt, 2 MiB a layer."""
    layout = KVLayout(
        num_layers=4, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=64, model_fingerprint="m"
    )
    sender = TransferSender(layout, TransferConfig(), TransferCounters(), "d")
    transfer, num_tokens = TransferId("request", 0), 512
    sender.handle(OpenTransfer(transfer, tuple(range(8)), num_tokens), 0.0)
    sender.handle(LinkUp(1, link, 4, TransferConfig().chunk_bytes_of(link)), 0.0)
    sender.handle(Accept(1, transfer, 0, 4), 0.0)
    sent = [
        command.span.num_layers
        for layer in range(4)
        for command in sender.handle(PartComputed(transfer, Span(layer, layer + 1, 0, num_tokens)), 0.0)
        if isinstance(command, SendChunk)
    ]
    assert sent == [layers_a_chunk] * (4 // layers_a_chunk)
