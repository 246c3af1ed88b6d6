"""All of a rank's pairs, on one thread: finds the pairs for a call of the worker or the pair for an incoming
connection, and joins the ends of a transfer's parts with several ranks.

The endpoint owns the thread and the sockets around it; the simulator owns neither.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from ..core.messages import TransferAddress, TransferStats
from ..core.request import TransferId
from .choice import LINKS
from .events import CancelTransfer, Expect, OpenTransfer, PeerGone, ReleaseLink, SenderEvent, TransferTick
from .idle_links import LinkUse, unused_links
from .inbound import InboundPair
from .interfaces import TransferListener
from .outbound import Dial, OutboundPair
from .pair import Local
from .parted import Failure, PartedTransfers, PartListener, total
from .parts import Share
from .protocol import PROTOCOL_VERSION, Connect

logger = logging.getLogger(__name__)


class Key(NamedTuple):
    """One rank of another worker."""

    worker_id: str
    incarnation: int
    rank: int = 0
    num_ranks: int = 1


class TransferHub:
    """Outbound pairs by target and inbound pairs by source; a pair exists while it has something to do."""

    def __init__(self, local: Local, dial: Dial) -> None:
        self._local = local
        self._dial = dial
        self._outbound: dict[Key, OutboundPair] = {}
        self._inbound: dict[Key, InboundPair] = {}
        listener = local.listener
        self._sends: PartedTransfers[Key, TransferStats] = PartedTransfers(
            lambda *part: self._abort(self._outbound, *part),
            lambda transfer, stats: local.notify(listener.on_sent, transfer, total(stats)),
            partial(local.notify, listener.on_send_failed),
        )
        self._receives: PartedTransfers[Key, bytes] = PartedTransfers(
            lambda *part: self._abort(self._inbound, *part),
            lambda transfer, payloads: local.notify(listener.on_received, transfer, payloads[0]),
            partial(local.notify, listener.on_receive_failed),
        )

    # decode side

    def expect(self, source: tuple[str, int], event: Expect, num_source_ranks: int = 1) -> None:
        parts = self._local.share.received(num_source_ranks)
        peers = {Key(*source, part.sender, num_source_ranks): part.heads for part in parts}
        self._receives.open(
            event.transfer, peers, lambda peer: self._inbound_pair(peer, peers[peer]).feed(event)
        )

    def admit(self, connect: Connect) -> "InboundPair | str":
        """Returns the pair that a connection belongs to, whose older epochs are fenced from now on; or the
        reason for refusal."""
        error = refusal(connect, self._local)
        if error is not None:
            return error
        peer = Key(
            connect.source_worker_id,
            connect.source_incarnation,
            connect.source_rank,
            connect.num_source_ranks,
        )
        heads = _heads_from(peer, self._local.share)
        if isinstance(heads, str):
            return heads
        pair = self._inbound_pair(peer, heads)
        if connect.epoch <= pair.last_epoch:
            source = f"{peer.worker_id} (incarnation {peer.incarnation})"
            return f"epoch {connect.epoch} of {source} is over, the newest is {pair.last_epoch}"
        pair.last_epoch = connect.epoch
        return pair

    # prefill side

    def send(self, target: TransferAddress, event: OpenTransfer) -> None:
        parts = self._local.share.sent(target.num_ranks)
        worker = target.worker_id, target.incarnation
        peers = {Key(*worker, part.receiver, target.num_ranks): part.heads for part in parts}

        def begin(peer: Key) -> None:
            if peer not in self._outbound:
                self._outbound[peer] = OutboundPair(
                    self._local, target.of_rank(peer.rank), self._dial, peers[peer], self._listener(peer)
                )
            self._outbound[peer].feed(event)

        self._sends.open(event.transfer, peers, begin)

    def feed_sender(self, transfer: TransferId, event: SenderEvent) -> None:
        for peer in self._sends.open_parts(transfer):
            if (pair := self._outbound.get(peer)) is not None:
                pair.feed(event)

    # either side

    def cancel(self, event: CancelTransfer) -> None:
        self.feed_sender(event.transfer, event)
        for pair in self._inbound.values():
            pair.feed(event)

    def _abort(
        self,
        pairs: Mapping[Key, OutboundPair] | Mapping[Key, InboundPair],
        peer: Key,
        transfer: TransferId,
        failure: Failure,
    ) -> None:
        if (pair := pairs.get(peer)) is not None:
            pair.feed(CancelTransfer(transfer, *failure))

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
        return len(self._sends)

    @property
    def num_links(self) -> int:
        """The number of open links, of the direction that has more of them."""
        return max(len(_open_links(self._outbound)), len(_open_links(self._inbound)))

    def _inbound_pair(self, peer: Key, heads: range) -> InboundPair:
        """Returns the pair with this source."""
        if peer not in self._inbound:
            self._inbound[peer] = InboundPair(self._local, peer.worker_id, heads, self._listener(peer))
        return self._inbound[peer]

    def _listener(self, peer: Key) -> TransferListener:
        return PartListener(peer, self._sends, self._receives)


def _heads_from(peer: Key, share: Share) -> range | str:
    """Returns the heads that the peer sends to us, or why it has none to send."""
    try:
        sent = {part.sender: part.heads for part in share.received(peer.num_ranks)}
    except ValueError as error:
        return str(error)
    mine = f"rank {share.rank} of {share.num_ranks}"
    return sent.get(peer.rank, f"rank {peer.rank} of {peer.num_ranks} sends no KV heads to {mine}")


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
    share = local.share
    if (connect.target_rank, connect.num_target_ranks) != (share.rank, share.num_ranks):
        wanted = f"rank {connect.target_rank} of {connect.num_target_ranks}"
        return f"this is rank {share.rank} of {share.num_ranks} of {mine}, not {wanted}"
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
