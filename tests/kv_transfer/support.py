"""A paged KV store in numpy that knows which blocks may be written, a listener to wait on, and pairs of
endpoints."""

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pdserve.core.failures import FailureKind
from pdserve.core.messages import KVLayout, TransferAddress, TransferStats
from pdserve.core.request import TransferId
from pdserve.kv_transfer import Membership, TransferConfig, TransferEndpoint
from pdserve.kv_transfer.interfaces import Gpu

WAIT_S = 60.0  # far more than anything here takes
# None of these deadlines expires by accident, however busy the machine: a test about a deadline sets it.
CALM = TransferConfig(
    chunk_bytes=4096,
    connect_timeout_s=30.0,
    heartbeat_s=0.05,
    dead_after_s=30.0,
    chunk_timeout_s=30.0,
    lease_s=30.0,
)
MORTAL = replace(CALM, dead_after_s=3.0)  # where a peer falls silent; no living one does, for so long


def layout(
    block_size: int = 8, dtype: str = "float32", num_layers: int = 3, num_kv_heads: int = 2
) -> KVLayout:
    return KVLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=4,
        dtype=dtype,
        block_size=block_size,
        model_fingerprint="m",
    )


class ArrayStore:
    """Tokens of a transfer in blocks of a numpy array [layers, 2, heads, blocks * block_size, head_dim * item
    bytes]."""

    def __init__(self, kv_layout: KVLayout, num_blocks: int, seed: int | None = None) -> None:
        self.layout = kv_layout
        item = 4 if kv_layout.dtype == "float32" else 2
        shape = (
            kv_layout.num_layers,
            2,
            kv_layout.num_kv_heads,
            num_blocks * kv_layout.block_size,
            kv_layout.head_dim * item,
        )
        self.cache: npt.NDArray[np.uint8] = np.zeros(shape, np.uint8)
        if seed is not None:
            self.cache[:] = np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8)
        self.writable: set[int] = set(range(num_blocks))
        self.num_scattered = 0
        self.on_scatter: Callable[[], None] = lambda: None
        self.gather_error: Exception | None = None

    def _slots(self, block_ids: Sequence[int], token_start: int, token_end: int) -> npt.NDArray[np.int64]:
        tokens = np.arange(token_start, token_end)
        size = self.layout.block_size
        slots: npt.NDArray[np.int64] = np.asarray(block_ids)[tokens // size] * size + tokens % size
        return slots

    def read(self, block_ids: Sequence[int], token_start: int, token_end: int) -> npt.NDArray[np.uint8]:
        picked: npt.NDArray[np.uint8] = self.cache[:, :, :, self._slots(block_ids, token_start, token_end)]
        return picked

    def _part(self, layer_start: int, layer_end: int, heads: range | None) -> npt.NDArray[np.uint8]:
        heads = range(self.layout.num_kv_heads) if heads is None else heads
        return self.cache[layer_start:layer_end, :, heads.start : heads.stop]

    def mark(self) -> int:
        return 0

    def gather(
        self,
        layer_start: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_start: int,
        token_end: int,
        out: memoryview,
        after: int = 0,
        heads: range | None = None,
    ) -> int:
        if self.gather_error is not None:
            raise self.gather_error
        slots = self._slots(block_ids, token_start, token_end)
        out[:] = self._part(layer_start, layer_end, heads)[:, :, :, slots].tobytes()
        return self.checksum(out)

    def checksum(self, data: memoryview) -> int:
        return zlib.crc32(data)

    def scatter(
        self,
        layer_start: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_start: int,
        token_end: int,
        data: memoryview,
        after: int = 0,
        heads: range | None = None,
    ) -> None:
        size = self.layout.block_size
        written = set(block_ids[token_start // size : (token_end - 1) // size + 1])
        assert written <= self.writable, (
            f"blocks {written - self.writable} were written after their transfer ended"
        )
        slots = self._slots(block_ids, token_start, token_end)
        part = self._part(layer_start, layer_end, heads)
        shape = (part.shape[0], 2, part.shape[2], len(slots), part.shape[4])
        part[:, :, :, slots] = np.frombuffer(data, np.uint8).reshape(shape)
        self.num_scattered += 1
        self.on_scatter()


class Recorder:
    """Records every end of a transfer, in order; `wait` blocks until the requested one is there."""

    def __init__(self, store: ArrayStore) -> None:
        self.store = store
        self.blocks: dict[TransferId, Sequence[int]] = {}  # not to be written once their transfer has failed
        self.endings: dict[tuple[str, TransferId], list[object]] = {}
        self._changed = threading.Condition()

    def _end(self, side: str, transfer: TransferId, ending: object) -> None:
        with self._changed:
            self.endings.setdefault((side, transfer), []).append(ending)
            if side == "receive":
                self.store.writable -= set(self.blocks.get(transfer, ()))
            self._changed.notify_all()

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self._end("receive", transfer, payload)

    def on_receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._end("receive", transfer, error)

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self._end("send", transfer, stats)

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._end("send", transfer, error)

    def wait(self, side: str, transfer: TransferId) -> object:
        with self._changed:
            assert self._changed.wait_for(lambda: (side, transfer) in self.endings, WAIT_S), (
                f"no ending of {transfer}"
            )
            endings = self.endings[(side, transfer)]
        assert len(endings) == 1, f"{transfer} ended {len(endings)} times: {endings}"
        return endings[0]

    def received(self, transfer: TransferId) -> bytes:
        ending = self.wait("receive", transfer)
        assert isinstance(ending, bytes), ending
        return ending

    def receive_error(self, transfer: TransferId) -> str:
        ending = self.wait("receive", transfer)
        assert isinstance(ending, str), ending
        return ending

    def sent(self, transfer: TransferId) -> TransferStats:
        ending = self.wait("send", transfer)
        assert isinstance(ending, TransferStats), ending
        return ending

    def send_error(self, transfer: TransferId) -> str:
        ending = self.wait("send", transfer)
        assert isinstance(ending, str), ending
        return ending


class Worker:
    """An endpoint with its store and listener."""

    def __init__(
        self,
        name: str,
        kv_layout: KVLayout,
        *,
        num_blocks: int = 64,
        seed: int | None = None,
        transport: str = "auto",
        token: str = "secret",
        config: TransferConfig = CALM,
        incarnation: int = 1,
        store: Any = None,
        gpu: Gpu | None = None,
        socket_root: Path = Path("/tmp"),
    ) -> None:
        self.key = (name, incarnation)
        self.store = ArrayStore(kv_layout, num_blocks, seed) if store is None else store
        self.ends = Recorder(self.store)
        self.endpoint = TransferEndpoint(
            self.store,
            self.ends,
            Membership(name, incarnation, token, "127.0.0.1", socket_root),
            transport=transport,
            config=config,
            gpu=gpu,
        )
        self.address: TransferAddress = self.endpoint.start()

    def expect(
        self,
        transfer: TransferId,
        source: tuple[str, int],
        block_ids: Sequence[int],
        num_tokens: int,
        cached: int = 0,
    ) -> None:
        self.ends.blocks[transfer] = block_ids
        self.endpoint.expect(transfer, source, block_ids, num_tokens, cached)

    def push(
        self,
        transfer: TransferId,
        target: TransferAddress,
        block_ids: Sequence[int],
        num_tokens: int,
        payload: bytes = b"",
    ) -> None:
        """Runs a whole prefill at once: everything computed, committed."""
        self.endpoint.send(transfer, target, block_ids, num_tokens)
        self.endpoint.computed(transfer, 0, self.store.layout.num_layers, 0, num_tokens)
        self.endpoint.prefill_done(transfer)
        self.endpoint.commit(transfer, payload)


@contextmanager
def pair(
    sender_layout: KVLayout | None = None,
    receiver_layout: KVLayout | None = None,
    transport: str = "auto",
    config: TransferConfig = CALM,
) -> Iterator[tuple[Worker, Worker]]:
    """Yields P with random KV and D with zeros; both are closed at the end."""
    sender = Worker("p", sender_layout or layout(), seed=1, transport=transport, config=config)
    receiver = Worker("d", receiver_layout or layout(), transport=transport, config=config)
    try:
        yield sender, receiver
    finally:
        sender.endpoint.close()
        receiver.endpoint.close()
