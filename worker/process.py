"""One worker: an engine, the two roles on its thread, a transfer endpoint and the connection to the router.

    router-reader --commands--> inbox --> engine thread: Worker.step() --> its messages --> router
    transfer thread --endings--> inbox
    grammar thread --token masks--> masks

Knows no Ray; an actor runs it (`cluster.actors`), and so can a test.
"""

import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from ..core.failures import FailureKind
from ..core.handshake import HandshakeDialler, Purpose
from ..core.messages import (
    HostFull,
    Probe,
    Probed,
    StepReport,
    TransferAddress,
    TransferStats,
    WorkerCommand,
    WorkerInfo,
)
from ..core.reach import reach
from ..core.request import TransferId
from ..engine.batch import RoleEngine
from ..engine.checkpoint import resolve_model_path
from ..engine.engine import Engine
from ..engine.sequence import Sequence as SequenceState
from ..grammar.messages import GrammarSetup
from ..grammar.thread import GrammarThread
from ..grammar.vocabulary import tokenizer_json
from .device import SWITCH_INTERVAL_S, bind_to_cores, engine_options, names_of, own_gpu
from .ending import Part, give_up, in_closing_order
from .gpu_monitor import GpuMonitor
from .host_monitor import HostMonitor
from .ranks import Ranks
from .router_link import RouterLink, shake_hands
from .router_session import RECONNECT_S, RouterSession
from .spec import WorkerSpec
from .step_watch import FIRST_ON_GPU_S, FIRST_S, StepWatch, WatchedRunner
from .transfers import Transfers
from .worker import Worker

log = logging.getLogger(__name__)

MASK_WAIT_S = 0.002  # upper bound on how long a computed step waits for masks


class WorkerProcess:
    """Runs from `run` to `stop`. The calling thread of `run` becomes the engine thread.

    When its connection breaks, the worker continues its work and reconnects to the router's address until a
    router answers, to which it reports all that it holds."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # separate, as a step in progress takes them
        self._masks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._info: WorkerInfo | None = None  # None until it serves
        self._monitor: GpuMonitor | None = None  # None on CPU
        self._ranks: Ranks | None = None  # None: it computes alone
        self._watch = StepWatch(FIRST_ON_GPU_S if spec.device == "cuda" else FIRST_S)
        self._session = RouterSession(spec.worker_id, spec.incarnation, time.monotonic())

    def run(self) -> None:
        """Loads the model and serves until stopped, or until no router has answered for a while; then cleans
        up."""
        spec = self._spec
        cores = bind_to_cores(spec.cores)
        gpu = own_gpu(spec.device)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        link = self._find_router()
        if link is None:
            return
        self._link = link
        link.start()
        host_monitor = HostMonitor(spec.socket_root, self._report_full)
        host_monitor.start()
        parts: dict[Part, Callable[[], object]] = {
            Part.ROUTER_LINK: lambda: self._link.close(),  # the present one
            Part.HOST_MONITOR: host_monitor.stop,
        }
        try:
            if spec.num_ranks > 1:
                self._progress("waiting for its ranks", 0.0)
                self._ranks = Ranks(spec, self._stopping.is_set, self._fail)
                parts[Part.RANKS] = self._ranks.leave
            # on a CPU the KV cache comes first: it may not fit
            self._progress("allocating memory" if spec.device == "cpu" else "loading weights", 0.0)
            engine = self._load_engine()
            transfers = Transfers(spec, engine, self, self._ranks)
            parts[Part.TRANSFERS] = transfers.close
            grammars = GrammarThread(lambda: self._grammar_setup(engine), self)
            parts[Part.GRAMMARS] = grammars.stop
            if gpu is not None:
                self._monitor = GpuMonitor(gpu)
                self._monitor.start()
                parts[Part.GPU_MONITOR] = self._monitor.stop
            self._serve(engine, transfers, grammars, names_of(cores, gpu))
        except Exception as error:
            self._report_failure(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._stopping.set()  # the reader's thread does not look for another router
            for _, close in in_closing_order(parts):
                close()

    def stop(self) -> None:
        """Ends `run` after the current step; may be called from any thread."""

        self._stopping.set()
        self._inbox.put(lambda: None)

    # ends of transfers, called on the transfer thread

    def on_received(self, transfer: TransferId, payload: bytes) -> None:
        self._inbox.put(lambda: self._worker.received(transfer, payload))

    def on_receive_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._inbox.put(lambda: self._worker.receive_failed(transfer, error, kind))

    def on_sent(self, transfer: TransferId, stats: TransferStats) -> None:
        self._inbox.put(lambda: self._worker.sent(transfer, stats))

    def on_send_failed(self, transfer: TransferId, error: str, kind: FailureKind) -> None:
        self._inbox.put(lambda: self._worker.send_failed(transfer, error, kind))

    # answers of the grammar process, called on the grammar thread

    def on_mask(self, key: int, num_tokens: int, bits: bytes) -> None:
        self._masks.put(lambda: self._worker.masked(key, num_tokens, bits))
        self._inbox.put(lambda: None)  # the engine thread may be waiting there

    def on_refused(self, key: int, why: str) -> None:
        error = f"its constraint cannot be followed: {why}"
        self._inbox.put(lambda: self._worker.mask_failed(key, error, FailureKind.INVALID))

    def on_failed(self, key: int, why: str) -> None:
        self._inbox.put(lambda: self._worker.mask_failed(key, why, FailureKind.HELPER))

    def _grammar_setup(self, engine: Engine) -> GrammarSetup:
        path = resolve_model_path(self._spec.config.model.path)
        return GrammarSetup(tokenizer_json(path), engine.config.vocab_size, engine.config.eos_token_ids)

    def _load_engine(self) -> Engine:
        path = resolve_model_path(self._spec.config.model.path)
        return Engine.open(
            path,
            engine_options(self._spec),
            lambda fraction: self._progress("loading weights", fraction),
            None if self._ranks is None else self._ranks.group,
        )

    def _serve(
        self, engine: Engine, transfers: Transfers, grammars: GrammarThread, devices: tuple[str, ...]
    ) -> None:
        spec, pool = self._spec, self._spec.pool
        self._worker = Worker(
            spec.worker_id,
            spec.incarnation,
            RoleEngine(
                engine.kv,
                WatchedRunner(engine.runner, self._watch),
                engine.layout.num_layers,
                pool.max_batch_tokens,
                pool.max_batch_size,
            ),
            transfers.port,
            grammars,
            self._await_masks,
        )
        address, others = transfers.start()
        self._info = WorkerInfo(
            worker_id=spec.worker_id,
            incarnation=spec.incarnation,
            role=spec.role,
            layout=msgspec.structs.replace(engine.layout, num_kv_heads=engine.config.num_kv_heads),
            num_blocks=engine.pool.num_blocks,
            max_model_len=engine.kv.max_model_len,
            max_batch_tokens=pool.max_batch_tokens,
            max_batch_size=pool.max_batch_size,
            address=address,
            devices=(*devices, *(name for one in others for name in one.devices)),
            node=socket.gethostname(),
            pid=os.getpid(),
            rank_pids=tuple(one.pid for one in others),
            kernels=engine.kernels.name,
        )
        self._session.loaded()
        self._greet(self._link)
        self._loop()

    def _loop(self) -> None:
        worked = False
        while not self._stopping.is_set():
            event = None if worked else self._inbox.get()
            self._watch.begin(time.monotonic())
            if event is not None:
                event()
            self._take_events()
            worked = self._worker.step()
            self._watch.end(time.monotonic())
            self._link.send(*self._worker.take_messages())
            worked = worked or self._worker.has_more_to_report

    def _take_events(self) -> None:
        while not self._inbox.empty():
            self._inbox.get()()
        while not self._masks.empty():
            self._masks.get()()

    def _await_masks(self, sequences: Sequence[SequenceState]) -> None:
        """The masks were requested before the step was computed. A wasted step costs its sequence more than a
        moment's wait."""
        give_up_s = time.monotonic() + MASK_WAIT_S
        with suppress(queue.Empty):
            while not all(seq.may_sample for seq in sequences):
                self._masks.get(timeout=max(0.0, give_up_s - time.monotonic()))()

    def _on_command(self, command: WorkerCommand) -> None:
        """Handles a command; called on the reader thread."""
        if isinstance(command, Probe):
            threading.Thread(target=self._probe, args=(command.target,), name="probe", daemon=True).start()
        else:
            self._inbox.put(lambda: self._worker.handle(command))

    def _probe(self, target: TransferAddress) -> None:
        """Connects to the other worker along the path of its KV, up to the proof that both belong to one
        cluster."""
        dialler = HandshakeDialler(self._spec.token, Purpose.TRANSFER)
        error = reach(
            (target.tcp_host, target.tcp_port), lambda sock: shake_hands(sock, dialler, target.worker_id)
        )
        self._link.send(
            Probed(
                worker_id=self._spec.worker_id,
                incarnation=self._spec.incarnation,
                target_worker_id=target.worker_id,
                target_incarnation=target.incarnation,
                error=error,
            )
        )

    def _progress(self, phase: str, fraction: float) -> None:
        self._link.send(self._session.progress(phase, fraction))

    def _report_failure(self, reason: str) -> None:
        if (failing := self._session.failing(reason)) is not None:
            self._link.send(failing)

    def _fail(self, why: str) -> None:
        """Ends this process at once, and with it all ranks; called on any thread."""
        self._report_failure(why)
        give_up(why)

    def _report_full(self, full: tuple[tuple[str, int], ...]) -> None:
        self._link.send(
            HostFull(worker_id=self._spec.worker_id, incarnation=self._spec.incarnation, full=full)
        )

    # the router

    def _find_router(self) -> RouterLink | None:
        """Returns a connection to the current router; None when none has answered for too long."""
        spec, session = self._spec, self._session
        while not self._stopping.is_set() and session.may_dial(time.monotonic()):
            try:
                link = RouterLink(
                    spec.router_address, spec.token, session.hello, self._on_command, self._on_lost
                )
            except OSError:
                self._stopping.wait(RECONNECT_S)
                continue
            session.connected(time.monotonic())
            return link
        return None

    def _on_lost(self, link: RouterLink) -> None:
        """Handles the loss of the link; called on its reader thread, which ends here."""
        link.close()
        self._session.lost(time.monotonic())
        self._stopping.wait(RECONNECT_S)
        found = self._find_router()
        if found is None:
            self.stop()
            return
        found.start()
        if self._info is None:
            self._link = found
            if (loading := self._session.catch_up()) is not None:
                found.send(loading)
        self._inbox.put(lambda: self._greet(found))

    def _greet(self, link: RouterLink) -> None:
        """Sends the greeting, on the engine thread: all later reports build on it."""
        assert self._info is not None
        worker = self._worker
        greeting = self._session.greeting(link, self._info, worker.held_legs(), worker.num_cached_blocks)
        if greeting:
            worker.greeted()
            link.send(*greeting)
            link.start_heartbeat(self._beat)
            self._link = link

    def _beat(self) -> StepReport:
        """Returns the worker's state, its ranks' processor time and, every few seconds, its GPU's state;
        called on the heartbeat's thread."""
        if (why := self._watch.beat()) is not None:
            self._fail(why)
        others = () if self._ranks is None else self._ranks.cpu_s
        return msgspec.structs.replace(
            self._worker.report(),
            gpu=None if self._monitor is None else self._monitor.take(),
            rank_cpu_s=(time.process_time(), *others),
        )
