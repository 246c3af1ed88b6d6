"""Chooses the prompt tokens that the next step computes. Pure: sequences and free blocks in, batches out.

add -> waiting --schedule--> running (chunk by chunk) --complete--> handed to the caller, blocks still held
"""

from collections.abc import Iterable

from ..core.sharing import FLOOR
from ..engine.batch import Batch, ScheduledChunk
from ..engine.kv_manager import KVManager
from ..engine.sequence import Sequence


class PrefillScheduler:
    """First come, first served, within a budget of tokens per step; but a long prompt leaves half of it to
    shorter ones.

    The oldest prompt gets the budget. While some prompts are shorter than the remainder of the oldest one,
    they share the other half, the shortest first: so no prompt waits more than twice as long as it would
    without those that overtake it, and a short prompt never waits for a long one. A chunk that fills the
    budget is cut; its rest continues in the next step.

    Prompts of lower priority (a higher number) get what those of higher priority leave, except in one step of
    `FLOOR`, which goes by age alone.

    A prompt is admitted when blocks for all of it are free, so that two half-computed prompts never wait for
    each other; none is admitted before the oldest, so that short prompts do not take its blocks for ever.

    The last token of a prompt waits for the mask of its output's first token, if the output has to follow a
    grammar."""

    def __init__(self, kv: KVManager, max_batch_tokens: int) -> None:
        self._kv = kv
        self._max_batch_tokens = max_batch_tokens
        self._sequences: list[Sequence] = []  # oldest first
        self._running: set[Sequence] = set()  # those with blocks
        self._num_steps = 0

    @property
    def has_sequences(self) -> bool:
        return bool(self._sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Returns the number of prompt tokens accepted and not yet computed."""
        return sum(seq.num_uncomputed_tokens for seq in self._sequences)

    def add(self, seq: Sequence) -> None:
        self._sequences.append(seq)

    def schedule(self) -> Batch | None:
        """Returns the next step's chunks, or None when nothing can be computed now."""
        if not self._sequences:
            return None
        self._num_steps += 1
        ordered = self._in_order()
        oldest, *others = ordered
        shares: dict[Sequence, int] = {}
        if self._is_admitted(oldest):
            shorter = [
                seq
                for seq in others
                if seq.num_uncomputed_tokens < oldest.num_uncomputed_tokens
                and seq.priority <= oldest.priority
            ]
            shorter.sort(key=lambda seq: seq.num_uncomputed_tokens)
            self._share(
                [oldest], -(-self._max_batch_tokens // 2) if shorter else self._max_batch_tokens, shares
            )
            self._share([*shorter, *ordered], self._max_batch_tokens, shares)
        else:
            self._share([seq for seq in others if seq in self._running], self._max_batch_tokens, shares)
        chunks = tuple(self._chunk(seq, num_tokens) for seq, num_tokens in shares.items())
        return Batch(chunks, self._kv.take_copies()) if chunks else None

    def _in_order(self) -> list[Sequence]:
        """Returns the sequences by priority, then by age; now and then by age alone."""
        first = self._sequences[0].priority
        if self._num_steps % FLOOR == 0 or all(seq.priority == first for seq in self._sequences):
            return self._sequences
        return sorted(self._sequences, key=lambda seq: seq.priority)

    def complete(self, batch: Batch) -> None:
        """Accounts for a computed batch. Sequences whose prompt is done leave; their blocks stay held."""
        for chunk in batch.chunks:
            self._kv.computed(chunk.sequence, chunk.num_tokens)
            if chunk.sequence.num_uncomputed_tokens == 0:
                self.remove(chunk.sequence)

    def remove(self, seq: Sequence) -> None:
        """Removes a waiting or running sequence, between two steps; the caller releases its blocks."""
        self._sequences.remove(seq)
        self._running.discard(seq)

    def _share(self, sequences: Iterable[Sequence], limit: int, shares: dict[Sequence, int]) -> None:
        """Gives tokens to one sequence after the other, up to `limit` in total. None is admitted behind one
        that finds no blocks."""
        left = limit - sum(shares.values())
        has_blocks = True
        for seq in sequences:
            if left == 0:
                return
            has_blocks = has_blocks and self._is_admitted(seq)
            if seq not in self._running:
                continue
            given = shares.get(seq, 0)
            more = min(left, seq.num_computable_tokens - given)
            if more > 0:
                shares[seq] = given + more
                left -= more

    def _is_admitted(self, seq: Sequence) -> bool:
        """Whether the sequence has its blocks; allocates them when they are free."""
        if seq in self._running:
            return True
        self._kv.admit(seq, use_cache=not seq.wants_prompt_logprobs)
        if self._kv.grow(seq, seq.num_tokens):
            self._running.add(seq)
            return True
        self._kv.reset(seq)
        return False

    def _chunk(self, seq: Sequence, num_tokens: int) -> ScheduledChunk:
        last = num_tokens == seq.num_uncomputed_tokens
        return ScheduledChunk(seq, num_tokens, seq.spec.choices if last else ())
