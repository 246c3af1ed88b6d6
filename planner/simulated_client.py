"""A client that knows what it must get: contiguous tokens, each the right one, and exactly one ending."""

from collections.abc import Callable

from ..core.errors import QueueFull
from ..core.request import FinishReason
from ..router.events import EmitChoiceEnd, EmitEnd, EmitTokens
from .kv_model import expected_tokens
from .scenario import MAX_MODEL_LEN, PlannedRequest
from .simulated_head import SimulatedHead
from .virtual_time import VirtualTime

RECONNECT_S = 0.05
BY_ITSELF = (FinishReason.STOP, FinishReason.LENGTH)


class SimulatedClient:
    """Submits its request, again after a while when it is refused, and checks what comes back."""

    def __init__(
        self,
        time: VirtualTime,
        head: Callable[[], SimulatedHead],
        ids: dict[str, "SimulatedClient"],
        plan: PlannedRequest,
        violation: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        """`head` is the present one; `ids` are those in use, and by whom."""
        self.is_ended = False
        self.was_resumed = False
        self._is_reconnecting = False
        self._ids = ids
        self._time, self._get_head, self._plan, self._violation, self._note = time, head, plan, violation, note
        sampling = plan.request.sampling
        self._id = plan.request.request_id
        eos = plan.request.eos_token_ids[0] if plan.request.eos_token_ids else None
        self._expected = [
            expected_tokens(plan.request.prompt_token_ids, sampling.seed, choice, sampling.max_tokens, eos)
            for choice in range(sampling.n)
        ]
        self._received: list[list[int]] = [[] for _ in range(sampling.n)]
        self._positions = [0] * sampling.n  # in the present stream, which repeats what an earlier one has brought
        self._reasons: list[FinishReason | None] = [None] * sampling.n
        self._stopped = False
        time.call_at(plan.at_s, self._submit)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._received))

    def _submit(self) -> None:
        if self.is_ended:  # cancelled while there was no router
            return
        deadline_s = self._plan.request.deadline_s
        if deadline_s is not None and self._time.now_s >= deadline_s:
            self._leave()
            return
        head = self._get_head()
        if not head.process.is_alive or self._ids.setdefault(self._id, self) is not self:
            self._time.call_later(0.05, self._submit)
            return
        error = head.submit(self._plan.request, self)
        if error is not None and not self._is_reconnecting:
            del self._ids[self._id]
        if error is None:
            if self._plan.cancel_after_s is not None and not self._is_reconnecting:
                self._time.call_later(self._plan.cancel_after_s, self._cancel)
        elif isinstance(error, QueueFull):
            self._time.call_later(error.retry_after_s, self._submit)
        else:
            self._time.call_later(0.5, self._submit)
        self._note(f"{self._id}: " + ("submitted" if error is None else f"refused: {error}"))

    def _cancel(self) -> None:
        if self.is_ended:
            return
        self._note(f"{self._id}: cancelled by its client")
        head = self._get_head()
        if head.clients.get(self._id) is self and head.process.is_alive:
            head.cancel(self._id)
        else:
            self._leave()

    def _leave(self) -> None:
        self.is_ended = True
        if self._ids.get(self._id) is self:
            del self._ids[self._id]

    def on_lost(self) -> None:
        """The router died: come back for the rest."""
        self._note(f"{self._id}: lost its connection")
        self._is_reconnecting = True
        self._positions = [0] * len(self._positions)
        self._reasons = [None] * len(self._reasons)
        self._stopped = False
        self._time.call_later(RECONNECT_S, self._submit)

    def on_event(self, event: EmitTokens | EmitChoiceEnd | EmitEnd) -> None:
        if self.is_ended:
            self._violation(f"{self._id}: {type(event).__name__} after its end")
        match event:
            case EmitTokens():
                self._on_tokens(event)
            case EmitChoiceEnd():
                self._on_choice_end(event)
            case EmitEnd():
                self._on_end(event)

    def _on_tokens(self, event: EmitTokens) -> None:
        choice = event.choice
        received, expected = self._received[choice], self._expected[choice]
        if self._reasons[event.choice] is not None:
            self._violation(f"{self._id}/{event.choice}: a token after its end")
        for token in event.tokens:
            index = self._positions[choice]
            self._positions[choice] += 1
            if token.index != index:
                self._violation(f"{self._id}/{event.choice}: token {token.index} came, {index} was due")
            elif index >= len(expected) or token.token_id != expected[index]:
                self._violation(
                    f"{self._id}/{event.choice}: token {index} is {token.token_id}, {expected[index : index + 1]} is right"
                )
            if index == len(received):
                received.append(token.token_id)
        if choice == 0 and not self._stopped and self._positions[0] >= (self._plan.stop_after_tokens or MAX_MODEL_LEN):
            self._stopped = True
            self._time.call_later(0.0, self._stop)

    def _stop(self) -> None:
        """The gateway has found the stop string of choice 0."""
        head = self._get_head()
        if head.clients.get(self._id) is self and head.process.is_alive:
            head.cancel(self._id, 0)

    def _on_choice_end(self, event: EmitChoiceEnd) -> None:
        if self._reasons[event.choice] is not None:
            self._violation(f"{self._id}/{event.choice}: a second ending")
        self._reasons[event.choice] = event.finish_reason
        by_itself = event.finish_reason in BY_ITSELF and not (event.choice == 0 and self._stopped)
        if by_itself and self._received[event.choice] != self._expected[event.choice]:
            num, of = len(self._received[event.choice]), len(self._expected[event.choice])
            self._violation(f"{self._id}/{event.choice}: ended ({event.finish_reason.value}) after {num} of {of} tokens")

    def _on_end(self, event: EmitEnd) -> None:
        self._leave()
        self.was_resumed = len(event.timeline.dispatches) > 1
        if None in self._reasons:
            self._violation(f"{self._id}: ended before its choices")
        if event.finish_reason is FinishReason.ERROR:
            self._violation(f"{self._id}: lost: {event.error}")
        self._note(f"{self._id}: ended, {event.finish_reason or 'complete'}")
