"""Which prompt tokens the next step computes. Pure: sequences and free blocks in, batches out.

add -> waiting --schedule--> running (chunk by chunk) --complete--> handed to the caller, blocks still held
"""

from collections import deque

from ..engine.batch import Batch, ScheduledChunk
from ..engine.kv_manager import KVManager
from ..engine.sequence import Sequence


class PrefillScheduler:
    """First come, first served, within a budget of tokens per step.

    A prompt is admitted when blocks for all of it are free, so that two half-computed prompts never wait for each other.
    The chunk that fills the budget is cut; its rest goes first in the next step.
    """

    def __init__(self, kv: KVManager, max_batch_tokens: int) -> None:
        self._kv = kv
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: deque[Sequence] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed."""
        return sum(seq.num_uncomputed_tokens for queue in (self._running, self._waiting) for seq in queue)

    def add(self, seq: Sequence) -> None:
        self._waiting.append(seq)

    def schedule(self) -> Batch | None:
        """The next step's chunks, or None when nothing can be computed now."""
        budget = self._max_batch_tokens
        chunks: list[ScheduledChunk] = []
        for seq in self._running:
            if budget == 0:
                break
            chunks.append(self._chunk(seq, budget))
            budget -= chunks[-1].num_tokens
        while budget > 0 and self._waiting and self._admit(self._waiting[0]):
            seq = self._waiting.popleft()
            self._running.append(seq)
            chunks.append(self._chunk(seq, budget))
            budget -= chunks[-1].num_tokens
        return Batch(tuple(chunks), self._kv.take_copies()) if chunks else None

    def complete(self, batch: Batch) -> None:
        """Account for a computed batch. Sequences whose prompt is done leave; their blocks stay held."""
        for chunk in batch.chunks:
            self._kv.computed(chunk.sequence, chunk.num_tokens)
            if chunk.sequence.num_uncomputed_tokens == 0:
                self._running.remove(chunk.sequence)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence that waits or runs out, between two steps; the caller releases its blocks."""
        queue = self._waiting if seq in self._waiting else self._running
        queue.remove(seq)

    def _admit(self, seq: Sequence) -> bool:
        self._kv.admit(seq)
        if self._kv.grow(seq, seq.num_tokens):
            return True
        self._kv.reset(seq)
        return False

    def _chunk(self, seq: Sequence, budget: int) -> ScheduledChunk:
        num_tokens = min(budget, seq.num_uncomputed_tokens)
        last = num_tokens == seq.num_uncomputed_tokens
        return ScheduledChunk(seq, num_tokens, seq.spec.choices if last else ())
