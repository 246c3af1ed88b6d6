"""A client that checks its stream: contiguous tokens, each the right one, and exactly one ending."""

from collections.abc import Callable

from ..core.errors import KillsWorkers, Overloaded, QueueFull
from ..core.request import FinishReason
from ..router.events import EmitChoiceEnd, EmitEnd, EmitTokens, StreamRead, StreamUnread
from ..router.fair_queue import OUTPUT_TOKEN
from .kv_model import expected_tokens, prompt_logprob
from .scenario import PlannedRequest
from .simulated_head import SimulatedHead
from .virtual_time import VirtualTime

FEW_ATTEMPTS = 10  # with so few, all of them may fail
RETURN_S = 0.05  # until a client returns to a router that is absent, frozen or serving another of its id
IMPATIENT_S = 10.0  # a refused client waits no longer, whatever retry delay it gets
CONVICTED = "ended as workers died of it"
BY_ITSELF = (FinishReason.STOP, FinishReason.LENGTH)


class SimulatedClient:
    """Submits its request, again after a while when it is refused, and checks its stream."""

    def __init__(
        self,
        time: VirtualTime,
        head: Callable[[], SimulatedHead],
        ids: dict[str, "SimulatedClient"],
        plan: PlannedRequest,
        violation: Callable[[str], None],
        note: Callable[[str], None],
        count: Callable[[str], None],
    ) -> None:
        """`head` returns the present head; `ids` maps each id in use to its client."""
        self.is_ended = False
        self.was_resumed = False
        self._time, self._get_head, self._ids, self._plan = time, head, ids, plan
        self._violation, self._note, self._count = violation, note, count
        sampling = plan.request.sampling
        self.request_id = plan.request.request_id
        eos = plan.request.eos_token_ids[0] if plan.request.eos_token_ids else None
        self._expected = [
            expected_tokens(
                plan.request.prompt_token_ids,
                sampling.seed,
                choice,
                sampling.max_tokens,
                eos,
                plan.request.cache_salt,
            )
            for choice in range(sampling.n)
        ]
        wanted = () if sampling.prompt_logprobs is None else plan.request.prompt_token_ids[1:]
        self._expected_prompt = tuple(map(prompt_logprob, wanted))
        self._received: list[list[int]] = [[] for _ in range(sampling.n)]
        self._positions = [
            0
        ] * sampling.n  # in the present stream, which repeats what an earlier one has brought
        self._reasons: list[FinishReason | None] = [None] * sampling.n
        self._stopped = self._cancelled = self._is_unread = self._was_unread = self._comes_back = False
        self._is_read = False
        if plan.body_s:  # it arrives even at a router that stands still
            self._time.call_later(plan.at_s, self._submit)
        else:
            self._later(plan.at_s, self._submit)
        if plan.first_token_within_s is not None:
            self._time.call_later(plan.at_s + plan.first_token_within_s, self._must_have_begun)
        if plan.ends_within_s is not None:
            self._time.call_later(
                plan.at_s + plan.ends_within_s,
                lambda: self._must_have_ended("a fast worker would have ended it"),
            )

    @property
    def _head(self) -> SimulatedHead:
        """Returns the present head, which may be dead."""
        return self._get_head()

    @property
    def _is_connected(self) -> bool:
        return self._head.process.is_alive and self._head.clients.get(self.request_id) is self

    @property
    def _may_give_up(self) -> bool:
        return self._head.router.config.max_attempts < FEW_ATTEMPTS

    @property
    def client(self) -> str:
        return self._plan.request.client

    @property
    def service(self) -> float:
        """Returns what the request has had, by the measure of turns."""
        request = self._plan.request
        return (len(request.prompt_token_ids) + OUTPUT_TOKEN * self.num_tokens) / request.weight

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._received))

    def _later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Delivers `call` to the router after `delay_s`; a frozen router does not receive it."""

        def arrive() -> None:
            if self._head.process.is_alive and self._head.process.is_frozen:
                self._time.call_later(RETURN_S, arrive)
            else:
                call()

        self._time.call_later(delay_s, arrive)

    def _send(self, delay_s: float, call: Callable[[SimulatedHead], None]) -> None:
        """Sends a message about the present stream; dropped when that has ended or broken."""
        head = self._head
        self._later(delay_s, lambda: call(head) if self._is_connected and self._head is head else None)

    def _submit(self) -> None:
        if self.is_ended:  # cancelled while there was no router
            return
        deadline_s = self._plan.request.deadline_s
        if deadline_s is not None and self._time.now_s >= deadline_s:
            self._leave()
            return
        head = self._head
        if not head.process.is_alive or self._ids.setdefault(self.request_id, self) is not self:
            self._later(RETURN_S, self._submit)  # no router, or the id is in use by another client
            return
        if self._plan.body_s and not self._is_read:
            self._is_read = True
            head.process.call_later(0.0, lambda: self._read(head))
            return
        error = head.submit(self._plan.request, self, comes_back=self._comes_back)
        if error is not None and not self._comes_back:
            del self._ids[self.request_id]
        if error is None:
            if self._plan.cancel_after_s is not None and not self._comes_back:
                self._later(self._plan.cancel_after_s, self.cancel)
            if deadline_s is not None:
                head.process.call_at(deadline_s + 0.001, lambda: self._must_have_ended("its deadline"))
        elif isinstance(error, Overloaded):
            self._count("queue full" if isinstance(error, QueueFull) else "tokens too slow")
            self._later(min(error.retry_after_s, IMPATIENT_S), self._submit)
        elif isinstance(error, KillsWorkers):
            self._count("deadly request refused")
            self._leave()
        else:
            self._later(0.5, self._submit)
        self._note(f"{self.request_id}: " + ("submitted" if error is None else f"refused: {error}"))

    def _read(self, head: SimulatedHead) -> None:
        """Reads the body, which takes a turn of the head's loop."""
        self._note(f"{self.request_id}: its body takes the head {self._plan.body_s:.1f} s")
        head.process.stand_still(self._plan.body_s)
        head.process.call_later(0.0, self._submit)

    def cancel(self) -> None:
        """Cancels the request, unless it has ended."""
        if self.is_ended:
            return
        self._note(f"{self.request_id}: cancelled by its client")
        self._count("client cancelled")
        self._cancelled = True
        if self._is_connected:
            self._head.cancel(self.request_id)
            self._must_have_ended("it was cancelled")
        else:
            self._leave()

    def _must_have_ended(self, when: str) -> None:
        if not self.is_ended:
            self._violation(f"{self.request_id}: continues after {when}")

    def _must_have_begun(self) -> None:
        if not (self.num_tokens or self.is_ended):
            self._violation(
                f"{self.request_id}: waits for its first token while another client has all places"
            )

    def _leave(self) -> None:
        self.is_ended = True
        if self._ids.get(self.request_id) is self:
            del self._ids[self.request_id]

    def on_lost(self) -> None:
        """Handles the router's death: comes back for the rest."""
        self._note(f"{self.request_id}: lost its connection")
        self._comes_back = True
        self._positions = [0] * len(self._positions)
        self._reasons = [None] * len(self._reasons)
        self._stopped = self._is_unread = False
        self._later(RETURN_S, self._submit)

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
        choice = event.choice
        received, expected = self._received[choice], self._expected[choice]
        if self._reasons[event.choice] is not None:
            self._violation(f"{self.request_id}/{event.choice}: a token after its end")
        for token in event.tokens:
            index = self._positions[choice]
            self._positions[choice] += 1
            if token.index != index:
                self._violation(
                    f"{self.request_id}/{event.choice}: token {token.index} came, {index} was due"
                )
            elif index >= len(expected) or token.token_id != expected[index]:
                right = expected[index : index + 1]
                self._violation(
                    f"{self.request_id}/{event.choice}: token {index} is {token.token_id}, {right} is correct"
                )
            if token.prompt_logprobs != (self._expected_prompt if choice == token.index == 0 else ()):
                self._violation(
                    f"{self.request_id}/{event.choice}: token {index} came with {len(token.prompt_logprobs)}"
                    " others"
                )
            if index == len(received):
                received.append(token.token_id)
        if self._is_unread:
            self._violation(f"{self.request_id}/{event.choice}: a token for a client that does not read")
        if choice == 0:
            self._look_at_position(self._positions[0])

    def _look_at_position(self, position: int) -> None:
        """Checks whether choice 0 has a stop string at this position, or the client stops reading there."""
        plan = self._plan
        if (
            not self._was_unread
            and plan.unread_after_tokens is not None
            and position >= plan.unread_after_tokens
        ):
            self._was_unread = True
            self._send(0.0, self._stop_reading)
        if not self._stopped and plan.stop_after_tokens is not None and position >= plan.stop_after_tokens:
            self._stopped = True
            self._count("stop string found")
            self._send(plan.stop_delay_s, lambda head: head.cancel(self.request_id, 0))

    def _stop_reading(self, head: SimulatedHead) -> None:
        self._note(f"{self.request_id}: its client does not read for {self._plan.unread_s} s")
        self._is_unread = True
        head.handle(StreamUnread(self.request_id))
        self._send(self._plan.unread_s, self._read_on)

    def _read_on(self, head: SimulatedHead) -> None:
        self._is_unread = False
        head.handle(StreamRead(self.request_id))

    def _on_choice_end(self, event: EmitChoiceEnd) -> None:
        if self._reasons[event.choice] is not None:
            self._violation(f"{self.request_id}/{event.choice}: a second ending")
        self._reasons[event.choice] = event.finish_reason
        by_itself = event.finish_reason in BY_ITSELF and not (event.choice == 0 and self._stopped)
        expected = self._expected[event.choice]
        eos_token_ids = self._plan.request.eos_token_ids
        right = FinishReason.STOP if expected[-1] in eos_token_ids else FinishReason.LENGTH
        if by_itself and (self._positions[event.choice] != len(expected) or event.finish_reason is not right):
            num, of = self._positions[event.choice], len(expected)
            self._violation(
                f"{self.request_id}/{event.choice}: ended ({event.finish_reason.value}) after {num} of {of}"
                " tokens"
            )

    def _on_end(self, event: EmitEnd) -> None:
        self._leave()
        self.was_resumed = len(event.timeline.dispatches) > 1
        if None in self._reasons:
            self._violation(f"{self.request_id}: ended before its choices")
        deadline_s = self._plan.request.deadline_s
        match event.finish_reason:
            case None:
                pass
            case FinishReason.CANCELLED if self._cancelled:
                pass
            case FinishReason.DEADLINE if self._plan.first_token_within_s is not None and not self.num_tokens:
                self._violation(f"{self.request_id}: dropped, though its deadline could be met")
            case FinishReason.DEADLINE if deadline_s is not None and self._time.now_s >= deadline_s:
                self._count("deadline missed")
            case FinishReason.DEADLINE if deadline_s is not None and (
                self._comes_back or not self.num_tokens
            ):
                self._count("hopeless deadline")
            case FinishReason.ERROR if self._may_give_up and (event.error or "").startswith("gave up"):
                self._count("given up")
            case FinishReason.FATAL:
                self._count(CONVICTED)
            case reason:
                self._violation(f"{self.request_id}: lost ({reason.value}): {event.error}")
        self._note(f"{self.request_id}: ended, {event.finish_reason or 'complete'}")
