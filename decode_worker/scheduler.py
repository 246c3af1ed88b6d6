"""Continuous batching: decides which sequences run in the next step, which wait for blocks and which give
them up. Pure.

add -----> waiting --schedule--> running --complete--> finished (released)
reserve -> waiting --schedule--> receiving --received--> running
              ^------------------- preempted --------------'
"""

from collections import Counter, deque
from dataclasses import dataclass

import msgspec

from ..core.request import FinishReason, TransferId
from ..core.sharing import FLOOR, LITTLE
from ..engine.batch import Batch, SampledToken, ScheduledChunk
from ..engine.kv_manager import MAX_BLOCKS_A_TOKEN, KVManager
from ..engine.sequence import Sequence

MAX_PASSES = 256  # admissions that may pass the first that waits


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step to run, if any, and the sequences whose blocks are now reserved and which wait for KV."""

    batch: Batch | None
    granted: tuple[Sequence, ...]


class Emission(msgspec.Struct, frozen=True):
    """A token that a sequence gained in a step; `reason` is set when the sequence ended with it."""

    sequence: Sequence
    choice: int
    index: int
    token: SampledToken
    reason: FinishReason | None


class DecodeScheduler:
    """Admits and retires sequences at every step. A running sequence that finds no block preempts one of the
    lowest priority: the youngest sequence of the client that has most. So does one of a client that has
    little here, among those whose priority is not higher. The preempted one recomputes later.

    Of the waiting sequences the highest priority is served first, except for one in `FLOOR` of the lowest,
    which then keeps its blocks like the highest; within a priority the client that has fewest blocks then,
    its preempted ones before its others, unless `MAX_PASSES` have passed the first. They are admitted while
    the batch has room and a block per running sequence stays free, so that admission does not cause the next
    preemption. Prompt tokens share the step with decodes, at most `max_batch_tokens` tokens together."""

    def __init__(self, kv: KVManager, *, max_batch_size: int, max_batch_tokens: int) -> None:
        self._kv = kv
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max(max_batch_tokens, max_batch_size)
        self._waiting: deque[Sequence] = deque()
        self._reservations: set[TransferId] = set()  # of the waiting: those whose KV will be sent
        self._receiving: dict[TransferId, Sequence] = {}
        self._running: list[Sequence] = []  # oldest first
        # they take part in a step that was launched before their end was known
        self._ended_ahead: set[Sequence] = set()
        self._num_since_floor = 0  # sequences admitted while one of lower priority waited
        self._num_passes = 0  # sequences admitted while the first waited
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._receiving)

    @property
    def num_queued_tokens(self) -> int:
        """Returns the number of prompt tokens that this worker has accepted and not yet computed."""
        waiting = (seq for seq in self._waiting if seq.transfer not in self._reservations)
        return sum(seq.num_uncomputed_tokens for queue in (waiting, self._running) for seq in queue)

    @property
    def num_context_tokens(self) -> int:
        return sum(seq.num_tokens for seq in self._running)

    def add(self, seq: Sequence) -> None:
        """Adds a sequence whose prompt is computed here."""
        self._enqueue(seq)

    def reserve(self, seq: Sequence) -> None:
        """Adds a sequence whose KV will arrive."""
        self._reservations.add(seq.transfer)
        self._enqueue(seq)

    def _enqueue(self, seq: Sequence) -> None:
        """Lets the sequence wait behind all of its priority."""
        waiting = self._waiting
        if not waiting or waiting[-1].priority <= seq.priority:
            waiting.append(seq)
        else:
            waiting.insert(sum(other.priority <= seq.priority for other in waiting), seq)

    def _enqueue_first(self, seq: Sequence) -> None:
        """Lets the sequence wait ahead of all of its priority."""
        waiting = self._waiting
        if not waiting or waiting[0].priority >= seq.priority:
            waiting.appendleft(seq)
        else:
            waiting.insert(sum(other.priority < seq.priority for other in waiting), seq)

    def received(self, transfer: TransferId, first_tokens: tuple[tuple[int, int], ...]) -> list[Sequence]:
        """All KV of a granted reservation is in its blocks: decodes from the given (choice, token) pairs on,
        if any. Returns the sequences that start to decode."""
        seq = self._receiving.pop(transfer)
        self._kv.received(seq, seq.num_tokens)
        if not first_tokens:
            self._kv.release(seq)
            return []
        siblings = [seq]
        for choice, _ in first_tokens[1:]:
            siblings.append(seq.fork(choice))
            self._kv.fork(seq, siblings[-1])
        seq.choice = first_tokens[0][0]
        for sibling, (_, token_id) in zip(siblings, first_tokens, strict=True):
            sibling.append(token_id)
        self._running.extend(siblings)
        return siblings

    @property
    def may_run_ahead(self) -> bool:
        """Whether a step can be scheduled while the previous one is under way: no sequence needs to know the
        token being drawn or has to give up blocks, and no request with many choices exceeds the batch."""
        kv, running = self._kv, self._running
        if len(running) > self._max_batch_size or any(seq.needs_known_tokens for seq in running):
            return False
        if self._waiting and self._newcomer() is not None:
            return False
        num_free = kv.pool.num_free_blocks
        if num_free >= MAX_BLOCKS_A_TOKEN * len(running):
            return True
        return sum(kv.num_blocks_to_grow(seq, seq.num_launched_tokens + 1) for seq in running) <= num_free

    def launched(self, batch: Batch) -> None:
        """The batch is under way: until it is completed, `schedule` builds on the tokens that it will
        produce."""
        for chunk in batch.chunks:
            seq = chunk.sequence
            if seq not in self._ended_ahead:
                seq.num_in_flight_tokens = chunk.num_tokens
                seq.num_pending_tokens = 1 if chunk.choices else 0

    def schedule(self) -> StepPlan:
        """Finds blocks for clients that have none, for all running sequences, then for those that wait."""
        granted: list[Sequence] = []
        self._raise_one()
        self._admit_newcomers(granted)
        chunks, budget = self._schedule_running()
        while (seq := self._next_waiting()) is not None and self._has_room_for(seq):
            reserved = seq.transfer in self._reservations
            if (not reserved and budget <= 0) or not self._admit(seq, num_spare=len(self._running)):
                break
            self._enter(seq, granted)
            passes = bool(self._waiting) and self._waiting[-1].priority > seq.priority
            self._num_since_floor = self._num_since_floor + 1 if passes else 0
            if not reserved and (num_tokens := min(budget, seq.num_computable_tokens)) > 0:
                chunks.append(self._chunk(seq, num_tokens))
                budget -= num_tokens
        batch = Batch(tuple(chunks), self._kv.take_copies()) if chunks else None
        return StepPlan(batch, tuple(granted))

    def _raise_one(self) -> None:
        """Gives the first of the lowest priority the highest one, when enough others have been admitted while
        it waited."""
        if self._num_since_floor + 1 < FLOOR or len(self._waiting) < 2:
            return
        lowest, highest = self._waiting[-1].priority, self._waiting[0].priority
        if lowest > highest:
            raised = next(seq for seq in self._waiting if seq.priority == lowest)
            self._waiting.remove(raised)
            raised.priority = highest
            self._waiting.appendleft(raised)
            self._num_since_floor = 0

    def complete(
        self, batch: Batch, sampled: list[list[SampledToken]], ahead: Batch | None = None
    ) -> list[Emission]:
        """Accounts for a computed batch: appends the sampled tokens, forks fresh choices, retires the
        sequences that ended.

        `ahead` was launched meanwhile. A sequence that ended has an unneeded row in it; it keeps its blocks
        until that row is computed, so that the row's writes hit no other sequence's blocks."""
        going_on = {chunk.sequence for chunk in ahead.chunks} if ahead else set()
        emissions: list[Emission] = []
        for chunk, tokens in zip(batch.chunks, sampled, strict=True):
            seq, choices = chunk.sequence, chunk.choices
            if seq in self._ended_ahead:
                self._ended_ahead.remove(seq)
                self._kv.release(seq)
                continue
            seq.num_in_flight_tokens = seq.num_pending_tokens = 0
            is_late = bool(choices) and not tokens  # its last token has to be computed again
            self._kv.computed(seq, chunk.num_tokens - is_late)
            if is_late:
                seq.is_mask_late = True
            elif len(choices) == 1:
                emissions.append(self._emit(seq, choices[0], tokens[0], going_on))
            elif choices:
                emissions += self._emit_forks(chunk, tokens, going_on)
        ended = {id(emission.sequence) for emission in emissions if emission.reason is not None}
        if ended:
            self._running = [seq for seq in self._running if id(seq) not in ended]
        return emissions

    def remove(self, transfer: TransferId) -> None:
        """Drops all waiting and running sequences of a dispatch, between two steps."""
        for seq in (*self._waiting, *self._running):
            if seq.transfer == transfer:
                self._kv.release(seq)
        self._reservations.discard(transfer)
        self._waiting = deque(seq for seq in self._waiting if seq.transfer != transfer)
        self._running = [seq for seq in self._running if seq.transfer != transfer]

    def remove_choice(self, transfer: TransferId, choice: int) -> Sequence | None:
        """Drops one choice of a dispatch, between two steps, and frees its blocks. Returns its sequence; None
        if it has none of its own: it has yet to be forked, or is not here."""
        for seq in (*self._waiting, *self._running):
            if seq.transfer != transfer:
                continue
            if seq.is_fresh and len(seq.spec.choices) > 1:
                if choice in seq.spec.choices:
                    seq.drop_choice(choice)
                return None
            if seq.choice == choice:
                self._kv.release(seq)
                (self._running if seq in self._running else self._waiting).remove(seq)
                self._reservations.discard(transfer)
                return seq
        return None

    def ended_in(self, batch: Batch) -> list[Sequence]:
        """Returns the sequences that have ended, but for a wasted row in this batch, which is under way."""
        ended = self._ended_ahead
        return [chunk.sequence for chunk in batch.chunks if chunk.sequence in ended] if ended else []

    def is_receiving(self, transfer: TransferId) -> bool:
        return transfer in self._receiving

    def receive_failed(self, transfer: TransferId) -> None:
        """The transfer has failed and writes no more: frees its blocks."""
        self._kv.release(self._receiving.pop(transfer))

    def has_sequences(self, transfer: TransferId) -> bool:
        """Whether any choice of the dispatch still runs or waits here, or holds blocks for a wasted row."""
        queues = (self._running, self._waiting, self._ended_ahead)
        return any(seq.transfer == transfer for queue in queues for seq in queue)

    def _schedule_running(self) -> tuple[list[ScheduledChunk], int]:
        """Returns a chunk for each running sequence that has or finds blocks, and the tokens left over.

        Each is certain to get one token, so that a long prompt never holds up decoding sequences; prompts
        share the rest. Sequences whose mask is late sit out."""
        chunks: list[ScheduledChunk] = []
        spare = max(self._max_batch_tokens - len(self._running), 0)
        order = self._by_claim()
        while order:
            seq = order[0]
            num_tokens = seq.num_computable_tokens
            if num_tokens > 1:
                num_tokens = min(1 + spare, num_tokens)
            if num_tokens == 0:
                order.popleft()
            elif self._grow(seq, seq.num_launched_tokens + num_tokens, order):
                chunks.append(self._chunk(seq, num_tokens))
                spare -= num_tokens - 1
                order.popleft()
        return chunks, spare

    def _by_claim(self) -> deque[Sequence]:
        """Returns the running sequences, beginning with those that keep their blocks longest: of high
        priority, of clients with few sequences, and the oldest."""
        if len({(seq.priority, seq.spec.client) for seq in self._running}) <= 1:
            return deque(self._running)
        num_running = Counter(seq.spec.client for seq in self._running)
        return deque(sorted(self._running, key=lambda seq: (seq.priority, num_running[seq.spec.client])))

    def _grow(self, seq: Sequence, num_tokens: int, order: deque[Sequence]) -> bool:
        """Finds blocks, preempting from the end of `order`, which begins with `seq`; returns False when `seq`
        itself had to be preempted."""
        while not self._kv.grow(seq, num_tokens):
            victim = order.pop()
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        assert not victim.num_in_flight_tokens, f"{victim} has a step under way"
        self._running.remove(victim)
        self._kv.reset(victim)
        self._enqueue_first(victim)
        self.num_preemptions += 1

    def _admit_newcomers(self, granted: list[Sequence]) -> None:
        """Admits sequences of clients that have little here, at the expense of the client that has most:
        running sequences grow into every block that becomes free."""
        if any(seq.num_in_flight_tokens for seq in self._running):
            return
        while (seq := self._newcomer()) is not None:
            while not (self._has_room_for(seq) and self._admit(seq, num_spare=0)):
                victim = self._victim_for(seq)
                if victim is None:
                    return
                self._preempt(victim)
            self._enter(seq, granted)

    def _newcomer(self) -> Sequence | None:
        """Returns the next sequence to admit if its client has little here, and another can make room."""
        seq = self._next_waiting()
        if seq is None or self._victim_for(seq) is None:
            return None
        return seq

    def _victim_for(self, seq: Sequence) -> Sequence | None:
        """Returns the youngest sequence of the client that has most blocks, if that leaves it more than the
        client of `seq` has then, which has nothing now, or little even then."""
        lower = [other for other in self._running if other.priority >= seq.priority]
        num_blocks = Counter[str]()
        for other in lower:
            num_blocks[other.spec.client] += len(other.block_ids)
        client = max(num_blocks, key=lambda client: (num_blocks[client], client), default=None)
        if client is None or client == seq.spec.client:
            return None
        num_held = self._num_blocks()[seq.spec.client]
        num_then = num_held + self._kv.num_blocks_for(seq.num_tokens)
        if num_held and num_then * LITTLE > num_blocks[client]:
            return None
        victim = next(other for other in reversed(lower) if other.spec.client == client)
        return victim if num_blocks[client] - len(victim.block_ids) > num_then else None

    def _enter(self, seq: Sequence, granted: list[Sequence]) -> None:
        """Lets a waiting sequence, which has its blocks now, run or receive."""
        self._num_passes = 0 if seq is self._waiting[0] else self._num_passes + 1
        self._waiting.remove(seq)
        if seq.transfer in self._reservations:
            self._reservations.remove(seq.transfer)
            self._receiving[seq.transfer] = seq
            granted.append(seq)
        else:
            self._running.append(seq)

    def _next_waiting(self) -> Sequence | None:
        """Returns the first sequence of the client that has fewest blocks with it, of the highest priority;
        None when none waits. So what a client had to give up does not stand before those that need little."""
        if len(self._waiting) < 2 or self._num_passes >= MAX_PASSES:
            return self._waiting[0] if self._waiting else None
        firsts: dict[str, Sequence] = {}
        for seq in self._waiting:
            if seq.priority > self._waiting[0].priority:
                break
            firsts.setdefault(seq.spec.client, seq)
        num_blocks = self._num_blocks()
        return min(
            firsts.values(),
            key=lambda seq: num_blocks[seq.spec.client] + self._kv.num_blocks_for(seq.num_tokens),
        )

    def _num_blocks(self) -> Counter[str]:
        """Returns the number of blocks that sequences hold, by client."""
        num_blocks = Counter[str]()
        for seq in (*self._running, *self._receiving.values()):
            num_blocks[seq.spec.client] += len(seq.block_ids)
        return num_blocks

    def _has_room_for(self, seq: Sequence) -> bool:
        num_sequences = sum(len(other.spec.choices) if other.is_fresh else 1 for other in self._running)
        num_sequences += sum(len(other.spec.choices) for other in self._receiving.values())
        return num_sequences == 0 or num_sequences + len(seq.spec.choices) <= self._max_batch_size

    def _admit(self, seq: Sequence, num_spare: int) -> bool:
        """Finds blocks for all tokens of `seq`, leaving `num_spare`."""
        is_computed_elsewhere = seq.transfer in self._reservations
        self._kv.admit(seq, use_cache=is_computed_elsewhere or not seq.wants_prompt_logprobs)
        if self._kv.grow(seq, seq.num_tokens) and self._kv.pool.num_free_blocks >= num_spare:
            return True
        self._kv.reset(seq)
        return False

    def _chunk(self, seq: Sequence, num_tokens: int) -> ScheduledChunk:
        if seq.num_launched_tokens + num_tokens < len(seq.token_ids):
            return ScheduledChunk(seq, num_tokens, ())
        return ScheduledChunk(seq, num_tokens, seq.spec.choices if seq.is_fresh else (seq.choice,))

    def _emit_forks(
        self, chunk: ScheduledChunk, tokens: list[SampledToken], going_on: set[Sequence]
    ) -> list[Emission]:
        parent = chunk.sequence
        siblings = [parent, *(parent.fork(choice) for choice in chunk.choices[1:])]
        for sibling in siblings[1:]:
            self._kv.fork(parent, sibling)
        self._running.extend(siblings[1:])
        return [
            self._emit(sibling, choice, token, going_on)
            for sibling, choice, token in zip(siblings, chunk.choices, tokens, strict=True)
        ]

    def _emit(self, seq: Sequence, choice: int, token: SampledToken, going_on: set[Sequence]) -> Emission:
        seq.choice = choice
        index = seq.num_output_tokens
        reason = seq.append(token.token_id)
        if reason is not None and seq in going_on:
            self._ended_ahead.add(seq)
        elif reason is not None:
            self._kv.release(seq)
        return Emission(seq, choice, index, token, reason)
