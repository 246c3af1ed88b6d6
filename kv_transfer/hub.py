"""All of a worker's pairs, on one thread: finds the pair for a call of the worker or for an incoming
connection.

The endpoint owns the thread and the sockets around it; the simulator owns neither.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial

from ..core.messages import TransferAddress
from ..core.request import TransferId
from .choice import LINKS
from .events import CancelTransfer, Expect, OpenTransfer, PeerGone, ReleaseLink, SenderEvent, TransferTick
from .idle_links import LinkUse, unused_links
from .inbound import InboundPair
from .outbound import Dial, OutboundPair
from .pair import Local
from .protocol import PROTOCOL_VERSION, Connect

logger = logging.getLogger(__name__)

Key = tuple[str, int]  # (worker_id, incarnation) of the peer


class TransferHub:
    """Outbound pairs by target and inbound pairs by source; a pair exists while it has something to do."""

    def __init__(self, local: Local, dial: Dial) -> None:
        self._local = local
        self._dial = dial
        self._outbound: dict[Key, OutboundPair] = {}
        self._inbound: dict[Key, InboundPair] = {}
        self._pair_of: dict[TransferId, OutboundPair] = {}

    # decode side

    def expect(self, source: Key, event: Expect) -> None:
        self._inbound_pair(source).feed(event)

    def admit(self, connect: Connect) -> "InboundPair | str":
        """Returns the pair that a connection belongs to, whose older epochs are fenced from now on; or the
        reason for refusal."""
        error = refusal(connect, self._local)
        if error is not None:
            return error
        key = connect.source_worker_id, connect.source_incarnation
        pair = self._inbound_pair(key)
        if connect.epoch <= pair.last_epoch:
            source = f"{key[0]} (incarnation {key[1]})"
            return f"epoch {connect.epoch} of {source} is over, the newest is {pair.last_epoch}"
        pair.last_epoch = connect.epoch
        return pair

    # prefill side

    def send(self, target: TransferAddress, event: OpenTransfer) -> None:
        assert event.transfer not in self._pair_of, f"{event.transfer} is being sent already"
        key = (target.worker_id, target.incarnation)
        if key not in self._outbound:
            self._outbound[key] = OutboundPair(
                self._local, target, self._dial, lambda transfer: self._pair_of.pop(transfer, None)
            )
        self._pair_of[event.transfer] = self._outbound[key]
        self._outbound[key].feed(event)

    def feed_sender(self, transfer: TransferId, event: SenderEvent) -> None:
        pair = self._pair_of.get(transfer)
        if pair is not None:
            pair.feed(event)

    # either side

    def cancel(self, event: CancelTransfer) -> None:
        self.feed_sender(event.transfer, event)
        for pair in self._inbound.values():
            pair.feed(event)

    def tick(self) -> None:
        """Handles the passage of time; to be called a few times per heartbeat."""
        self._local.time.tick()
        for outbound in list(self._outbound.values()):
            guarded(partial(outbound.feed, TransferTick()))
        for inbound in list(self._inbound.values()):
            guarded(partial(inbound.feed, TransferTick()))
        self._release_unused(self._outbound)
        self._release_unused(self._inbound)
        self._outbound = {key: pair for key, pair in self._outbound.items() if not pair.is_idle}
        self._inbound = {key: pair for key, pair in self._inbound.items() if not pair.is_idle}

    def _release_unused(self, pairs: Mapping[Key, OutboundPair] | Mapping[Key, InboundPair]) -> None:
        config = self._local.config
        for key in unused_links(_open_links(pairs), config.max_links, config.max_idle_s, self._local.time()):
            guarded(partial(pairs[key].feed, ReleaseLink()))

    def close(self, error: str) -> None:
        """Ends every pair and fails all open transfers."""
        pairs: tuple[OutboundPair | InboundPair, ...] = (*self._outbound.values(), *self._inbound.values())
        self._outbound.clear()
        self._inbound.clear()
        for pair in pairs:
            guarded(partial(pair.feed, PeerGone(error)))

    @property
    def num_transfers(self) -> int:
        """The number of open transfers on the prefill side."""
        return len(self._pair_of)

    @property
    def num_links(self) -> int:
        """The number of open links, of the direction that has more of them."""
        return max(len(_open_links(self._outbound)), len(_open_links(self._inbound)))

    def _inbound_pair(self, key: Key) -> InboundPair:
        """Returns the pair with this source."""
        if key not in self._inbound:
            self._inbound[key] = InboundPair(self._local, key[0])
        return self._inbound[key]


def _open_links(pairs: Mapping[Key, OutboundPair] | Mapping[Key, InboundPair]) -> dict[Key, LinkUse]:
    return {key: use for key, pair in pairs.items() if (use := pair.use) is not None}


def refusal(connect: Connect, local: Local) -> str | None:
    """Returns why `connect` must be refused, in words."""
    mine = local.identity
    gpu = mine.place.gpu
    if connect.version != PROTOCOL_VERSION:
        return f"protocol version {connect.version}, expected {PROTOCOL_VERSION}"
    if (connect.target_worker_id, connect.target_incarnation) != (mine.worker_id, mine.incarnation):
        wanted = f"{connect.target_worker_id} (incarnation {connect.target_incarnation})"
        return f"this is {mine}, not {wanted}"
    if connect.link not in LINKS:
        return f"link {connect.link!r}, expected one of {', '.join(LINKS)}"
    if connect.link == "cuda_ipc" and (not connect.gpu or connect.gpu != gpu):
        return f"link 'cuda_ipc' from GPU {connect.gpu!r}, expected this worker's {gpu!r}"
    if connect.link == "nccl" and (not gpu or connect.gpu in ("", gpu)):
        return f"link 'nccl' from GPU {connect.gpu!r}, expected another one than this worker's {gpu!r}"
    mismatch = local.layout.mismatch(connect.layout)
    if mismatch is not None:
        return f"the KV layouts differ in {mismatch}"
    return None


def guarded(call: Callable[[], None]) -> None:
    """A bug that shows in one call must not end the thread and with it every other transfer."""
    try:
        call()
    except Exception:
        logger.exception("%s failed", call)
