"""A client that knows what it must get: contiguous tokens, each the right one, and exactly one ending."""

from collections.abc import Callable

from ..core.errors import QueueFull
from ..core.request import FinishReason
from ..router.events import EmitChoiceEnd, EmitEnd, EmitTokens
from .kv_model import expected_tokens
from .scenario import PlannedRequest
from .simulated_head import SimulatedHead
from .virtual_time import VirtualTime

BY_ITSELF = (FinishReason.STOP, FinishReason.LENGTH)


class SimulatedClient:
    """Submits its request, again after a while when it is refused, and checks what comes back."""

    def __init__(
        self,
        time: VirtualTime,
        head: SimulatedHead,
        plan: PlannedRequest,
        violation: Callable[[str], None],
        note: Callable[[str], None],
        count: Callable[[str], None],
    ) -> None:
        self.is_ended = False
        self.was_resumed = False
        self._time, self._head, self._plan = time, head, plan
        self._violation, self._note, self._count = violation, note, count
        sampling = plan.request.sampling
        self.request_id = plan.request.request_id
        eos = plan.request.eos_token_ids[0] if plan.request.eos_token_ids else None
        self._expected = [
            expected_tokens(plan.request.prompt_token_ids, sampling.seed, choice, sampling.max_tokens, eos)
            for choice in range(sampling.n)
        ]
        self._received: list[list[int]] = [[] for _ in range(sampling.n)]
        self._reasons: list[FinishReason | None] = [None] * sampling.n
        self._stopped = False
        time.call_at(plan.at_s, self._submit)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._received))

    def _submit(self) -> None:
        deadline_s = self._plan.request.deadline_s
        if deadline_s is not None and self._time.now_s >= deadline_s:
            self.is_ended = True
            return
        if self.request_id in self._head.clients:  # an id that another client uses now
            self._time.call_later(0.05, self._submit)
            return
        error = self._head.submit(self._plan.request, self)
        if error is None:
            if self._plan.cancel_after_s is not None:
                self._time.call_later(self._plan.cancel_after_s, self._cancel)
        elif isinstance(error, QueueFull):
            self._count("queue full")
            self._time.call_later(error.retry_after_s, self._submit)
        else:
            self._time.call_later(0.5, self._submit)
        self._note(f"{self.request_id}: " + ("submitted" if error is None else f"refused: {error}"))

    def _cancel(self) -> None:
        if not self.is_ended:
            self._note(f"{self.request_id}: cancelled by its client")
            self._count("client cancelled")
            self._head.cancel(self.request_id)

    def on_event(self, event: EmitTokens | EmitChoiceEnd | EmitEnd) -> None:
        if self.is_ended:
            self._violation(f"{self.request_id}: {type(event).__name__} after its end")
        match event:
            case EmitTokens():
                self._on_tokens(event)
            case EmitChoiceEnd():
                self._on_choice_end(event)
            case EmitEnd():
                self._on_end(event)

    def _on_tokens(self, event: EmitTokens) -> None:
        received, expected = self._received[event.choice], self._expected[event.choice]
        if self._reasons[event.choice] is not None:
            self._violation(f"{self.request_id}/{event.choice}: a token after its end")
        for token in event.tokens:
            index = len(received)
            if token.index != index:
                self._violation(f"{self.request_id}/{event.choice}: token {token.index} came, {index} was due")
            elif index >= len(expected) or token.token_id != expected[index]:
                right = expected[index : index + 1]
                self._violation(f"{self.request_id}/{event.choice}: token {index} is {token.token_id}, {right} is right")
            received.append(token.token_id)
        if event.choice == 0 and not self._stopped and len(received) == self._plan.stop_after_tokens:
            self._stopped = True
            self._count("stop string found")
            self._time.call_later(0.0, lambda: None if self.is_ended else self._head.cancel(self.request_id, 0))

    def _on_choice_end(self, event: EmitChoiceEnd) -> None:
        if self._reasons[event.choice] is not None:
            self._violation(f"{self.request_id}/{event.choice}: a second ending")
        self._reasons[event.choice] = event.finish_reason
        by_itself = event.finish_reason in BY_ITSELF and not (event.choice == 0 and self._stopped)
        if by_itself and self._received[event.choice] != self._expected[event.choice]:
            num, of = len(self._received[event.choice]), len(self._expected[event.choice])
            self._violation(f"{self.request_id}/{event.choice}: ended ({event.finish_reason.value}) after {num} of {of} tokens")

    def _on_end(self, event: EmitEnd) -> None:
        self.is_ended = True
        self.was_resumed = len(event.timeline.dispatches) > 1
        if None in self._reasons:
            self._violation(f"{self.request_id}: ended before its choices")
        if event.finish_reason is FinishReason.DEADLINE:
            self._count("deadline missed")
        if event.finish_reason is FinishReason.ERROR:
            self._violation(f"{self.request_id}: lost: {event.error}")
        self._note(f"{self.request_id}: ended, {event.finish_reason or 'complete'}")
