"""An environment for the router: clients that check their streams, workers that obey in their own time, and
accidents."""

from collections import deque
from dataclasses import dataclass, field

from pdserve.core.errors import DuplicateRequest, NoWorkerAvailable, QueueFull
from pdserve.core.messages import (
    Abort,
    Leg,
    LegEnded,
    Prefill,
    Reserve,
    Role,
    Serve,
    StepReport,
    TokenOutput,
    TransferAddress,
    WorkerCommand,
    WorkerInfo,
    WorkerLoad,
)
from pdserve.core.request import FinishReason, Request, SequenceSpec, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import (
    Cancel,
    EmitChoiceEnd,
    EmitEnd,
    EmitTokens,
    RequestClosed,
    RouterEvent,
    SendCommand,
    StreamRead,
    StreamUnread,
    Submit,
    Tick,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
    WorkerRole,
)

from .cluster import make_request, worker_info

MAX_QUEUED = 4


def token_id(choice: int, index: int) -> int:
    """Returns the token that every worker samples: a function of choice and index alone."""
    return 1000 * choice + index


def finish(spec: SequenceSpec, choice: int, index: int) -> FinishReason | None:
    if index == spec.sampling.max_tokens - 1:
        return FinishReason.LENGTH
    return FinishReason.STOP if (len(spec.prompt_token_ids) + choice + index) % 7 == 0 else None


@dataclass
class WorkerLeg:
    leg: Leg
    spec: SequenceSpec
    next_index: dict[int, int]  # of the choices that continue here; empty while KV is awaited
    target: TransferAddress | None = None
    is_reservation: bool = False
    is_sending: bool = False


@dataclass
class SimWorker:
    """A worker that obeys in its own time: commands and messages are queued until a rule moves them."""

    info: WorkerInfo
    inbox: deque[WorkerCommand] = field(default_factory=deque)
    outbox: deque[StepReport | LegEnded] = field(default_factory=deque)
    legs: dict[TransferId, WorkerLeg] = field(default_factory=dict)

    def obey(self) -> None:
        match self.inbox.popleft():
            case Prefill(spec=spec, target=target):
                self.legs[spec.transfer] = WorkerLeg(Leg.PREFILL, spec, self._start(spec), target)
            case Serve(spec=spec):
                self.legs[spec.transfer] = WorkerLeg(Leg.DECODE, spec, self._start(spec))
            case Reserve(spec=spec):
                self.legs[spec.transfer] = WorkerLeg(Leg.DECODE, spec, {}, is_reservation=True)
            case Abort(transfer=transfer):
                if transfer in self.legs:
                    self.end(transfer, "aborted")

    @staticmethod
    def _start(spec: SequenceSpec) -> dict[int, int]:
        return dict.fromkeys(spec.choices, len(spec.output_token_ids))

    def sample(self, leg: WorkerLeg) -> None:
        """Runs one step: a token of each choice."""
        outputs = []
        for choice, index in list(leg.next_index.items()):
            reason = finish(leg.spec, choice, index)
            outputs.append(TokenOutput(leg.spec.transfer, choice, index, token_id(choice, index), reason))
            leg.next_index[choice] = index + 1
            if reason is not None:
                del leg.next_index[choice]
        self.outbox.append(
            StepReport(
                worker_id=self.info.worker_id,
                incarnation=self.info.incarnation,
                load=WorkerLoad(num_running=len(self.legs)),
                outputs=tuple(outputs),
            )
        )

    def end(self, transfer: TransferId, error: str | None = None) -> None:
        leg = self.legs.pop(transfer)
        self.outbox.append(
            LegEnded(
                worker_id=self.info.worker_id,
                incarnation=self.info.incarnation,
                transfer=transfer,
                leg=leg.leg,
                error=error,
            )
        )


@dataclass
class Client:
    request: Request
    tokens: dict[int, int] = field(default_factory=dict)
    ended_choices: set[int] = field(default_factory=set)
    is_ended: bool = False
    is_unread: bool = False


class World:
    """An environment that checks with every command that streams are contiguous and endings unique, with
    every event that accounts balance."""

    def __init__(self, prefill_on_decode_factor: float | None) -> None:
        self.router = Router(
            RouterConfig(
                max_queued_requests=MAX_QUEUED,
                max_prefill_backlog_tokens=60,
                prefill_on_decode_factor=prefill_on_decode_factor,
            )
        )
        self.now_s = 0.0
        self.workers: dict[str, SimWorker] = {}
        self.clients: dict[str, Client] = {}
        self.incarnation = 0
        self.num_admitted = self.num_closed = 0
        for name in ("prefill-0", "decode-0"):
            self.start_worker(name, Role(name.rpartition("-")[0]))

    def handle(self, event: RouterEvent) -> None:
        for command in self.router.handle(event, self.now_s):
            match command:
                case SendCommand(worker_id, incarnation, message):
                    worker = self.workers[worker_id]
                    assert worker.info.incarnation == incarnation
                    worker.inbox.append(message)
                case EmitTokens(request_id, choice, tokens):
                    client = self.clients[request_id]
                    assert choice not in client.ended_choices
                    assert not client.is_unread, "a token for a client that does not read"
                    for token in tokens:
                        assert token.index == client.tokens.get(choice, 0), "a gap or a repetition"
                        assert token.token_id == token_id(choice, token.index)
                        client.tokens[choice] = token.index + 1
                case EmitChoiceEnd(request_id, choice, _):
                    client = self.clients[request_id]
                    assert choice not in client.ended_choices
                    client.ended_choices.add(choice)
                case EmitEnd(request_id):
                    client = self.clients[request_id]
                    assert not client.is_ended
                    assert len(client.ended_choices) == client.request.sampling.n
                    client.is_ended = True
                case RequestClosed():
                    self.num_closed += 1
                case _:
                    pass
        self.router.check_integrity()

    def submit(self, name: str, num_tokens: int, max_tokens: int, n: int, patience_s: float | None) -> None:
        deadline_s = None if patience_s is None else self.now_s + patience_s
        client = "greedy" if name < "e" else name
        request = make_request(
            name, num_tokens, max_tokens=max_tokens, n=n, deadline_s=deadline_s, client=client
        )
        before = self.clients.get(name)
        is_live = before is not None and not before.is_ended
        is_full = self.router.status(self.now_s).num_queued >= MAX_QUEUED
        self.clients[name] = Client(request)
        try:
            self.handle(Submit(request))
        except (QueueFull, DuplicateRequest, NoWorkerAvailable) as error:
            refused: type[Exception] | None = type(error)
            if before is None:
                del self.clients[name]
            else:
                self.clients[name] = before
        else:
            refused = None
            self.num_admitted += 1
        assert is_live == (refused is DuplicateRequest)
        assert is_full or refused is not QueueFull

    def cancel(self, name: str, choice: int | None) -> None:
        self.handle(Cancel(name, FinishReason.CANCELLED if choice is None else FinishReason.STOP, choice))

    def stop_reading(self, name: str) -> None:
        if name in self.clients:
            self.clients[name].is_unread = True
            self.handle(StreamUnread(name))

    def read_on(self, name: str) -> None:
        if name in self.clients:
            self.clients[name].is_unread = False
            self.handle(StreamRead(name))

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.handle(Tick())

    def start_worker(self, name: str, role: Role) -> None:
        self.incarnation += 1
        info = worker_info(
            name, role, incarnation=self.incarnation, num_blocks=16, max_batch_size=4, max_model_len=256
        )
        self.workers[name] = SimWorker(info)
        self.handle(WorkerReady(info))

    def start_or_kill(self, name: str, role: Role) -> None:
        worker = self.workers.pop(name, None)
        if worker is None:
            self.start_worker(name, role)
        else:
            self.handle(WorkerLost(name, worker.info.incarnation, "killed"))
            for late in worker.outbox:  # still on the wire when the connection broke
                self.handle(late)

    def drain_or_assign(self, pick: int, role: Role | None) -> None:
        if not self.workers:
            return
        name = sorted(self.workers)[pick % len(self.workers)]
        self.handle(WorkerDraining(name) if role is None else WorkerRole(name, role))

    def run_workers(self, picks: list[tuple[int, str]]) -> None:
        for pick, what in picks if self.workers else []:
            self.move(self.workers[sorted(self.workers)[pick % len(self.workers)]], what)

    def break_a_leg(self, pick: int) -> None:
        legs = [(worker, transfer) for _, worker in sorted(self.workers.items()) for transfer in worker.legs]
        if legs:
            worker, transfer = legs[pick % len(legs)]
            worker.end(transfer, "broken")

    def move(self, worker: SimWorker, what: str) -> bool:
        """Lets the worker do one thing; returns False when there was nothing to do."""
        if what == "obey" and worker.inbox:
            worker.obey()
        elif what == "report" and worker.outbox:
            self.handle(worker.outbox.popleft())
        elif what == "work" and worker.legs:
            worked = [self.work(worker, transfer, leg) for transfer, leg in list(worker.legs.items())]
            return any(worked)
        else:
            return False
        return True

    def work(self, worker: SimWorker, transfer: TransferId, leg: WorkerLeg) -> bool:
        if leg.is_reservation:
            return False
        if leg.is_sending:
            return self.send(worker, transfer, leg)
        worker.sample(leg)
        if not leg.next_index or (leg.leg is Leg.PREFILL and leg.target is None):
            worker.end(transfer)
        elif leg.leg is Leg.PREFILL:
            leg.is_sending = True
        return True

    def send(self, worker: SimWorker, transfer: TransferId, leg: WorkerLeg) -> bool:
        """Moves the KV: commits on the peer if it holds the reservation, fails if it never will."""
        assert leg.target is not None
        peer = self.workers.get(leg.target.worker_id)
        if peer is None or peer.info.incarnation != leg.target.incarnation:
            worker.end(transfer, "peer lost")
            return True
        if transfer in peer.legs:
            peer.legs[transfer].is_reservation = False
            peer.legs[transfer].next_index = leg.next_index
            worker.end(transfer)
            return True
        if any(isinstance(command, Reserve) and command.spec.transfer == transfer for command in peer.inbox):
            return False
        worker.end(transfer, "refused")
        return True

    def settle(self) -> None:
        """Checks that with reading clients, working workers and time, everything ends and nothing is left."""
        for name in self.clients:
            self.read_on(name)
        for name in ("prefill-9", "decode-9"):
            self.start_worker(name, Role(name.rpartition("-")[0]))
        for _ in range(10_000):
            moved = [
                self.move(w, what) for w in list(self.workers.values()) for what in ("obey", "work", "report")
            ]
            due_s = self.router.next_tick_s()
            if not any(moved):
                if due_s is None:
                    break
                self.now_s = max(self.now_s, due_s)
                self.handle(Tick())
        status = self.router.status(self.now_s)
        assert all(client.is_ended for client in self.clients.values())
        assert (status.num_requests, status.num_queued) == (0, 0)
        assert all((worker.num_legs, worker.num_queued_tokens) == (0, 0) for worker in status.workers)
        assert self.num_closed == self.num_admitted == status.counters.submitted
        self.router.check_integrity()
