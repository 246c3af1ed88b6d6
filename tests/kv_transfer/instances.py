"""Instances of several ranks: an endpoint and a store for each rank, and what connects them with rank 0."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from pdserve.core.messages import KVLayout, TransferAddress
from pdserve.core.request import TransferId
from pdserve.kv_transfer import Membership, TransferConfig, TransferEndpoint
from pdserve.kv_transfer.interfaces import TransferListener
from pdserve.kv_transfer.parts import Share
from pdserve.kv_transfer.ranks import InstancePort, RankPort

from .support import CALM, ArrayStore, Recorder, layout


class Instance:
    """P or D. Its ranks get their commands at once, except those that are held back."""

    def __init__(
        self,
        name: str,
        kv_layout: KVLayout,
        num_ranks: int,
        *,
        seed: int | None = None,
        transport: str = "auto",
        config: TransferConfig = CALM,
        num_blocks: int = 64,
    ) -> None:
        self.key = (name, 1)
        self.layout = kv_layout
        self._transport, self._config = transport, config
        self.shares = [Share(rank, num_ranks, kv_layout.num_kv_heads) for rank in range(num_ranks)]
        whole = ArrayStore(kv_layout, num_blocks, seed)
        self.stores = [self._store(whole, share) for share in self.shares]
        self.ends = Recorder(self.stores[0])
        self._held: dict[int, list[bytes]] = {}
        self.port = InstancePort(partial(self._endpoint, 0), self.ends, self.shares[0], self._command)
        self.ranks = {
            rank: RankPort(partial(self._endpoint, rank), partial(self.port.on_end, rank))
            for rank in range(1, num_ranks)
        }
        self.endpoints = [self.port.own, *(port.own for port in self.ranks.values())]
        own, *others = [endpoint.start() for endpoint in self.endpoints]
        self.address: TransferAddress = msgspec.structs.replace(own, others=tuple(others))

    def _store(self, whole: ArrayStore, share: Share) -> ArrayStore:
        store = ArrayStore(self.held(share), len(whole.writable))
        store.cache[:] = whole.cache[:, :, share.heads.start : share.heads.stop]
        store.writable = whole.writable  # one table of blocks for all ranks
        return store

    def held(self, share: Share) -> KVLayout:
        return msgspec.structs.replace(self.layout, num_kv_heads=len(share.heads))

    def _endpoint(self, rank: int, listener: TransferListener) -> TransferEndpoint:
        return TransferEndpoint(
            self.stores[rank],
            listener,
            Membership(*self.key, "secret", "127.0.0.1", share=self.shares[rank]),
            transport=self._transport,
            config=self._config,
        )

    def _command(self, rank: int, data: bytes) -> None:
        if rank in self._held:
            self._held[rank].append(data)
        else:
            self.ranks[rank].on_command(data)

    def hold(self, rank: int) -> None:
        """Holds commands to a rank back, as a long step does."""
        self._held[rank] = []

    def let_go(self, rank: int) -> None:
        for data in self._held.pop(rank):
            self.ranks[rank].on_command(data)

    def close(self) -> None:
        for endpoint in self.endpoints:
            endpoint.close()
        self.port.close("the instance ends")

    def expect(
        self,
        transfer: TransferId,
        source: "Instance",
        block_ids: Sequence[int],
        num_tokens: int,
        cached: int = 0,
    ) -> None:
        self.ends.blocks[transfer] = block_ids
        self.stores[0].writable.update(block_ids)
        self.port.expect(transfer, source.key, block_ids, num_tokens, cached, source.address.num_ranks)

    def push(
        self,
        transfer: TransferId,
        target: "Instance",
        block_ids: Sequence[int],
        num_tokens: int,
        payload: bytes = b"",
    ) -> None:
        """Runs a whole prefill at once: everything computed, committed."""
        self.port.send(transfer, target.address, block_ids, num_tokens)
        self.port.computed(transfer, 0, self.layout.num_layers, 0, num_tokens)
        self.port.prefill_done(transfer)
        self.port.commit(transfer, payload)

    def read(self, block_ids: Sequence[int], start: int, end: int) -> npt.NDArray[np.uint8]:
        """Returns [layers, 2, heads of the model, tokens, bytes]; all holders of a head have the same."""
        found: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)
        for store, share in zip(self.stores, self.shares, strict=True):
            for index, head in enumerate(share.heads):
                found[head].append(store.read(block_ids, start, end)[:, :, index])
        for copies in found.values():
            for copy in copies[1:]:
                np.testing.assert_array_equal(copy, copies[0])
        return np.stack([copies[0] for _, copies in sorted(found.items())], axis=2)


@contextmanager
def instances(
    num_senders: int,
    num_receivers: int,
    num_kv_heads: int = 4,
    block_sizes: tuple[int, int] = (8, 8),
    transport: str = "auto",
    config: TransferConfig = CALM,
) -> Iterator[tuple[Instance, Instance]]:
    """Yields P with random KV and D with zeros; both are closed at the end."""
    with ExitStack() as stack:
        made = []
        for name, num_ranks, seed, block_size in zip(
            "pd", (num_senders, num_receivers), (1, None), block_sizes, strict=True
        ):
            kv_layout = layout(block_size, num_kv_heads=num_kv_heads)
            one = Instance(name, kv_layout, num_ranks, seed=seed, transport=transport, config=config)
            stack.callback(one.close)
            made.append(one)
        yield made[0], made[1]
