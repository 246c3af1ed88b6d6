"""A worker's end of every transfer: one thread, one loop, a pair for each peer. The worker calls in from its
own threads; the endpoint reports the end of each transfer to its listener."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from ..core.devices import GPU_LINKS
from ..core.failures import FailureKind
from ..core.messages import TransferAddress
from ..core.request import TransferId
from .acceptor import TransferAcceptor
from .choice import TRANSPORTS, Place
from .config import MAX_PAYLOAD_BYTES, Membership, TransferConfig
from .counters import TransferCounters
from .dialler import TransferDialler
from .events import CancelTransfer, CommitReady, Expect, Extend, OpenTransfer, PartComputed, PrefillDone
from .hub import TransferHub, guarded
from .interfaces import Gpu, KVStore, TransferListener
from .link_maker import LinkMaker
from .pair import Identity, Local
from .polling_loop import polling_loop
from .shm import host_id
from .span import Span

logger = logging.getLogger(__name__)


class TransferEndpoint:
    """Sends and receives KV. All methods but `start` and `close` are thread-safe and never block; requests
    are carried out in the order of the calls. Each `send` and each `expect` ends in exactly one call of the
    listener, also at `close`."""

    def __init__(
        self,
        store: KVStore,
        listener: TransferListener,
        member: Membership,
        *,
        transport: str = "auto",
        config: TransferConfig | None = None,
        gpu: Gpu | None = None,
        on_stuck: Callable[[str], None] | None = None,
    ) -> None:
        """`gpu` holds the store's blocks, if they are not in host memory. `on_stuck` is called with the
        reason why the process has to end when a link on the GPU does not terminate; by default it is
        logged."""
        valid = [name for name in TRANSPORTS if gpu is not None or name not in GPU_LINKS]
        if transport not in valid:
            where = "" if gpu is not None else " on a processor"
            raise ValueError(f"kv.transport: got {transport!r}, expected one of {', '.join(valid)}{where}")
        self._member = member
        place = Place(host_id(), "" if gpu is None else gpu.uuid)
        identity = Identity(member.worker_id, member.incarnation, place)
        self._local = Local(identity, store, listener, config or TransferConfig(), rank_share=member.share)
        self._links = LinkMaker(member.host, self._local.config, gpu, on_stuck or logger.critical)
        dialler = TransferDialler(self._local, self._links, member.token, transport)
        self._hub = TransferHub(self._local, dialler)
        self._inbox: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # guards the three below
        self._is_woken = False
        self._is_open = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._thread: threading.Thread | None = None

    # life cycle

    def start(self) -> TransferAddress:
        """Starts to listen and returns the address. Raises OSError when `host` cannot be bound."""
        assert self._thread is None, "an endpoint starts once"
        member, place = self._member, self._local.identity.place
        acceptor = TransferAcceptor(self._local, member, self._links, self._hub.admit)
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(acceptor, started), name="pdserve-kv-transfer", daemon=True
        )
        self._thread.start()
        started.wait()
        return TransferAddress(
            worker_id=member.worker_id,
            incarnation=member.incarnation,
            host_id=place.host_id,
            unix_path=acceptor.unix_path,
            tcp_host=member.host,
            tcp_port=acceptor.tcp_port,
            gpu=place.gpu,
            rank=self._local.share.rank,
            num_ranks=self._local.share.num_ranks,
        )

    def close(self) -> None:
        """Fails all open transfers and cleans up. Idempotent; must not be called by the listener."""
        thread = self._thread
        if thread is None:
            return
        assert thread is not threading.current_thread(), "the listener cannot close its endpoint"
        with self._lock:
            if self._is_open and self._loop is not None:
                self._is_open = False
                self._loop.call_soon_threadsafe(self._stopping.set)
        thread.join()

    @property
    def counters(self) -> TransferCounters:
        return self._local.counters

    # decode side

    def expect(
        self,
        transfer: TransferId,
        source: tuple[str, int],
        block_ids: Sequence[int],
        num_tokens: int,
        num_cached_tokens: int = 0,
        num_source_ranks: int = 1,
    ) -> None:
        """Announces that blocks are reserved for the KV that the ranks of `source` (worker_id, incarnation)
        will push. The first `num_cached_tokens` are in them already: they are neither sent nor written.
        Device work that this thread has queued until now may still write to the blocks. Raises ValueError for
        arguments that do not fit."""
        self._check_table(block_ids, num_tokens)
        if not 0 <= num_cached_tokens <= num_tokens:
            raise ValueError(
                f"num_cached_tokens: {num_cached_tokens} is not valid, expected 0 to {num_tokens}"
            )
        event = Expect(transfer, tuple(block_ids), num_tokens, num_cached_tokens, self._local.store.mark())
        self._local.share.received(num_source_ranks)  # raises for a number that does not fit
        self._post_or_raise(partial(self._hub.expect, source, event, num_source_ranks))

    # prefill side

    def send(
        self, transfer: TransferId, target: TransferAddress, block_ids: Sequence[int], num_tokens: int
    ) -> None:
        """Opens a transfer of `num_tokens` tokens. `block_ids` may still be short, or empty: `extend` adds to
        it. Call it as soon as the target is known, so that the pair is connected and the offer accepted when
        KV is ready."""
        if num_tokens < 1:
            raise ValueError(f"num_tokens: {num_tokens} is not valid, expected at least 1")
        if len(target.others) != target.num_ranks - 1 or not self._local.share.sent(target.num_ranks):
            raise ValueError(
                f"target: {target} is not valid, expected addresses of all ranks, and one to send to"
            )
        self._post_or_raise(
            partial(self._hub.send, target, OpenTransfer(transfer, tuple(block_ids), num_tokens))
        )

    def extend(self, transfer: TransferId, block_ids: Sequence[int]) -> None:
        """Appends blocks to the transfer's table; must precede `computed` of the tokens in them."""
        self._post(partial(self._hub.feed_sender, transfer, Extend(transfer, tuple(block_ids))))

    def computed(
        self, transfer: TransferId, layer_start: int, layer_end: int, token_start: int, token_end: int
    ) -> None:
        """Reports that the KV of these layers and tokens is final, or will be when the device has done the
        work that this thread has queued until now; it may be sent. Every cell must be reported exactly once,
        including those from the worker's own prefix cache; cells that the target has already are not sent."""
        span = Span(layer_start, layer_end, token_start, token_end)
        self._post(
            partial(self._hub.feed_sender, transfer, PartComputed(transfer, span, self._local.store.mark()))
        )

    def prefill_done(self, transfer: TransferId) -> None:
        """The last layer is computed: all bytes acknowledged by now were hidden behind the prefill."""
        self._post(partial(self._hub.feed_sender, transfer, PrefillDone(transfer)))

    def commit(self, transfer: TransferId, payload: bytes) -> None:
        """All KV is computed; `payload` reaches the target's listener with the last byte."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"payload: {len(payload)} bytes, expected {MAX_PAYLOAD_BYTES} at most")
        self._post(partial(self._hub.feed_sender, transfer, CommitReady(transfer, payload)))

    # either side

    def cancel(
        self,
        transfer: TransferId,
        error: str = "cancelled",
        kind: FailureKind = FailureKind.CANCELLED,
    ) -> None:
        """Aborts the transfer, unless it has ended already; unknown ones are ignored."""
        self._post(partial(self._hub.cancel, CancelTransfer(transfer, error, kind)))

    # on the endpoint's thread

    def _check_table(self, block_ids: Sequence[int], num_tokens: int) -> None:
        capacity = len(block_ids) * self._local.layout.block_size
        if not 1 <= num_tokens <= capacity:
            raise ValueError(
                f"num_tokens: {num_tokens} is not valid, expected 1 to {capacity} for {len(block_ids)} blocks"
            )

    def _post_or_raise(self, call: Callable[[], None]) -> None:
        if not self._post(call):
            raise RuntimeError("the transfer endpoint is not open")

    def _post(self, call: Callable[[], None]) -> bool:
        with self._lock:
            if not self._is_open:
                return False
            self._inbox.append(call)
            if not self._is_woken and self._loop is not None:
                self._is_woken = True
                self._loop.call_soon_threadsafe(self._drain)
        return True

    def _drain(self) -> None:
        with self._lock:
            self._is_woken = False
        while self._inbox:
            guarded(self._inbox.popleft())

    def _run(self, acceptor: TransferAcceptor, started: threading.Event) -> None:
        with asyncio.Runner(loop_factory=partial(polling_loop, self._local.store_waits)) as runner:
            runner.run(self._main(acceptor, started))

    async def _main(self, acceptor: TransferAcceptor, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        acceptor.start()
        self._is_open = True
        started.set()
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._local.config.heartbeat_s / 2):
                    await self._stopping.wait()
            self._hub.tick()
        await self._shut_down(acceptor)

    async def _shut_down(self, acceptor: TransferAcceptor) -> None:
        self._drain()
        await acceptor.close()
        self._hub.close("the endpoint was closed")
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self._local.store_waits.finish(self._local.config.chunk_timeout_s)
        for link in self._local.retired:
            await asyncio.to_thread(link.join)
        self._links.close()
