"""One transfer as its sender sees it: the parts that may leave, those under way, and the cost."""

from ..core.automaton import Automaton
from ..core.messages import KVLayout, TransferStats
from ..core.request import TransferId
from .chunk_size import chunk_bytes
from .events import OpenTransfer
from .planner import ChunkPlanner, ReadyPart
from .span import Span
from .states import OUTBOUND_TRANSITIONS, OutboundState


class OutboundTransfer:
    """P's view of one transfer. Before ACCEPT it only keeps the ready spans: D decides from which token on it
    needs them."""

    def __init__(self, event: OpenTransfer, layout: KVLayout, now_s: float) -> None:
        self.id: TransferId = event.transfer
        self.machine = Automaton(
            OUTBOUND_TRANSITIONS, OutboundState.WAITING, name=f"outbound {event.transfer}"
        )
        self.num_tokens = event.num_tokens
        self.block_ids: list[int] = list(event.block_ids)
        self.payload: bytes | None = None  # set: the worker has computed everything
        self.waiting_since_s = now_s  # for ACCEPT, or for COMMITTED
        self.num_in_flight = 0
        self.credits = 0
        self._layout = layout
        self._early: list[ReadyPart] = []
        self._planner: ChunkPlanner | None = None
        self._num_bytes = 0
        self._num_chunks = 0
        self._acked_bytes = 0
        self._hidden_bytes: int | None = None
        self._first_chunk_s: float | None = None
        self._prefill_done_s: float | None = None

    @property
    def state(self) -> OutboundState:
        return self.machine.state

    def accept(self, token_start: int, num_credits: int, link: str, slot_bytes: int) -> None:
        """D wants tokens from `token_start` on. Raises ValueError when it asks for tokens that do not
        exist."""
        if not 0 <= token_start <= self.num_tokens or num_credits < 1:
            raise ValueError(
                f"accepted from token {token_start} of {self.num_tokens} with {num_credits} credits"
            )
        layout = self._layout
        whole = Span(0, layout.num_layers, token_start, self.num_tokens)
        bytes_per_cell = layout.wire_bytes_per_cell
        max_bytes = chunk_bytes(link, slot_bytes, whole.num_cells, bytes_per_cell)
        self._planner = ChunkPlanner(whole, bytes_per_cell, max_bytes)
        self.credits = num_credits
        for ready in self._early:
            self._planner.add(*ready)
        self._early.clear()

    def computed(self, span: Span, mark: int = 0) -> None:
        """Raises ValueError for spans that were reported before, lie outside, or have no blocks."""
        if span.token_end > len(self.block_ids) * self._layout.block_size:
            raise ValueError(f"{span} was computed, but there are {len(self.block_ids)} blocks only")
        if self._planner is None:
            self._early.append(ReadyPart(span, mark))
        else:
            self._planner.add(span, mark)

    def next_chunk(self) -> ReadyPart | None:
        if self._planner is None or self.num_in_flight >= self.credits:
            return None
        return self._planner.take(flush=self.payload is not None)

    @property
    def is_announced(self) -> bool:
        """Whether all chunks have left and the worker has committed."""
        return self.payload is not None and self._planner is not None and self._planner.is_empty

    @property
    def num_missing(self) -> int:
        assert self._planner is not None
        return self._planner.num_missing

    def chunk_sent(self, num_bytes: int, now_s: float) -> None:
        self.num_in_flight += 1
        self._num_chunks += 1
        self._num_bytes += num_bytes
        if self._first_chunk_s is None:
            self._first_chunk_s = now_s

    def chunk_acked(self, num_bytes: int) -> None:
        self.num_in_flight -= 1
        self._acked_bytes += num_bytes

    def prefill_done(self, now_s: float) -> None:
        if self._prefill_done_s is None:
            self._prefill_done_s = now_s
            self._hidden_bytes = self._acked_bytes

    def stats(self, now_s: float) -> TransferStats:
        started_s = now_s if self._first_chunk_s is None else self._first_chunk_s
        done_s = now_s if self._prefill_done_s is None else self._prefill_done_s
        return TransferStats(
            num_bytes=self._num_bytes,
            num_chunks=self._num_chunks,
            duration_s=now_s - started_s,
            exposed_s=now_s - done_s,
            hidden_bytes=self._hidden_bytes or 0,
        )
