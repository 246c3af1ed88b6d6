"""Minimal workers as the router sees them: they obey commands and report on the test's request."""

from collections import defaultdict

from pdserve.core.failures import FailureKind
from pdserve.core.hashing import block_hashes
from pdserve.core.messages import (
    Abort,
    KVLayout,
    Leg,
    LegEnded,
    Prefill,
    Probe,
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
from pdserve.core.request import FinishReason, Request, SamplingParams, SequenceSpec, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import (
    EmitChoiceEnd,
    EmitEnd,
    EmitTokens,
    RequestClosed,
    RouterCommand,
    RouterEvent,
    SendCommand,
    Submit,
    Tick,
    WorkerLost,
    WorkerReady,
)

BLOCK_SIZE = 16


def worker_info(
    worker_id: str,
    role: Role | None = None,
    *,
    incarnation: int = 1,
    num_blocks: int = 256,
    max_model_len: int = 4096,
    max_batch_size: int = 64,
    max_batch_tokens: int = 2048,
    fingerprint: str = "model",
) -> WorkerInfo:
    """Returns a worker named after its role (`prefill-0`, `decode-1`, `both-0`) by default."""
    layout = KVLayout(
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        dtype="float32",
        block_size=BLOCK_SIZE,
        model_fingerprint=fingerprint,
    )
    address = TransferAddress(
        worker_id=worker_id,
        incarnation=incarnation,
        host_id="here",
        unix_path=worker_id,
        tcp_host="",
        tcp_port=0,
    )
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        role=role or Role(worker_id.rpartition("-")[0]),
        layout=layout,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
        max_batch_size=max_batch_size,
        address=address,
        devices=("cpu:0",),
        node="here",
        pid=1,
        kernels="torch",
    )


def make_request(
    request_id: str = "r",
    num_tokens: int = 20,
    *,
    max_tokens: int = 4,
    n: int = 1,
    deadline_s: float | None = None,
    salt: str = "",
    first_token: int = 0,
    client: str = "",
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(range(first_token, first_token + num_tokens)),
        sampling=SamplingParams(max_tokens=max_tokens, n=n),
        cache_salt=salt,
        deadline_s=deadline_s,
        client=client,
    )


def prefix_hashes(request: Request) -> tuple[bytes, ...]:
    return tuple(block_hashes(request.prompt_token_ids, BLOCK_SIZE, request.cache_salt))


class Cluster:
    """A router with workers; records the commands sent to each worker and the events of each client."""

    def __init__(self, *workers: str | WorkerInfo, config: RouterConfig | None = None) -> None:
        self.router = Router(config)
        self.now_s = 0.0
        self.sent: dict[str, list[WorkerCommand]] = defaultdict(list)
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)  # indices, in order of arrival
        self.choice_ends: dict[tuple[str, int], list[FinishReason]] = defaultdict(list)
        self.ends: dict[str, list[EmitEnd]] = defaultdict(list)
        self.closed: dict[str, list[RequestClosed]] = defaultdict(list)
        self.incarnations: dict[str, int] = {}
        for worker in workers:
            self.add(worker_info(worker) if isinstance(worker, str) else worker)

    def add(self, info: WorkerInfo) -> list[RouterCommand]:
        self.incarnations[info.worker_id] = info.incarnation
        return self.handle(WorkerReady(info))

    def handle(self, event: RouterEvent) -> list[RouterCommand]:
        commands = self.router.handle(event, self.now_s)
        for command in commands:
            match command:
                case SendCommand(_, _, Probe()):
                    pass  # about links, which have tests of their own
                case SendCommand(worker_id, incarnation, message):
                    assert incarnation == self.incarnations[worker_id]
                    self.sent[worker_id].append(message)
                case EmitTokens(request_id, choice, tokens):
                    assert not self.choice_ends[request_id, choice], "a token after its choice's end"
                    self.tokens[request_id, choice] += [token.index for token in tokens]
                case EmitChoiceEnd(request_id, choice, reason):
                    self.choice_ends[request_id, choice].append(reason)
                case EmitEnd():
                    self.ends[command.request_id].append(command)
                case RequestClosed():
                    self.closed[command.request_id].append(command)
                case _:
                    pass
        self.router.check_integrity()
        return commands

    def submit(self, request: Request) -> list[RouterCommand]:
        return self.handle(Submit(request))

    def tick(self, after_s: float = 0.0) -> list[RouterCommand]:
        self.now_s += after_s
        return self.handle(Tick())

    def lose(self, worker_id: str) -> list[RouterCommand]:
        return self.handle(WorkerLost(worker_id, self.incarnations[worker_id], "killed"))

    def last(self, worker_id: str) -> WorkerCommand:
        return self.sent[worker_id][-1]

    def spec(self, worker_id: str) -> SequenceSpec:
        """Returns the spec of the last piece of work that the worker was given."""
        commands = [c for c in self.sent[worker_id] if isinstance(c, Prefill | Reserve | Serve)]
        return commands[-1].spec

    def aborts(self, worker_id: str, *, choice: int | None = None) -> list[TransferId]:
        """Returns the dispatches that the router aborted at the worker, as a whole or one `choice` of each."""
        return [
            command.transfer
            for command in self.sent[worker_id]
            if isinstance(command, Abort) and command.choice == choice
        ]

    def report(
        self,
        worker_id: str,
        *outputs: TokenOutput,
        added: tuple[bytes, ...] = (),
        evicted: tuple[bytes, ...] = (),
        incarnation: int | None = None,
    ) -> list[RouterCommand]:
        return self.handle(
            StepReport(
                worker_id=worker_id,
                incarnation=incarnation or self.incarnations[worker_id],
                load=WorkerLoad(),
                outputs=outputs,
                blocks_added=added,
                blocks_evicted=evicted,
            )
        )

    def token(
        self,
        worker_id: str,
        index: int,
        finish: FinishReason | None = None,
        *,
        choice: int = 0,
        attempt: int | None = None,
        request_id: str | None = None,
    ) -> list[RouterCommand]:
        """Reports a token of the worker's last work (or of the given attempt)."""
        transfer = self.spec(worker_id).transfer
        if attempt is not None or request_id is not None:
            transfer = TransferId(
                request_id or transfer.request_id, transfer.attempt if attempt is None else attempt
            )
        return self.output(worker_id, transfer, index, finish, choice=choice)

    def output(
        self,
        worker_id: str,
        transfer: TransferId,
        index: int,
        finish: FinishReason | None = None,
        *,
        choice: int = 0,
    ) -> list[RouterCommand]:
        return self.report(worker_id, TokenOutput(transfer, choice, index, 100 + index, finish))

    def leg_ended(
        self,
        worker_id: str,
        leg: Leg,
        error: str | None = None,
        *,
        transfer: TransferId | None = None,
        kind: FailureKind | None = None,
    ) -> list[RouterCommand]:
        return self.handle(
            LegEnded(
                worker_id=worker_id,
                incarnation=self.incarnations[worker_id],
                transfer=transfer or self.spec(worker_id).transfer,
                leg=leg,
                error=error,
                kind=kind,
            )
        )

    def hold_prefix(self, worker_id: str, request: Request) -> None:
        """Lets the worker report that it caches the prompt's full blocks."""
        self.report(worker_id, added=prefix_hashes(request))

    def num_legs(self) -> dict[str, int]:
        return {worker.worker_id: worker.num_legs for worker in self.router.status(self.now_s).workers}
