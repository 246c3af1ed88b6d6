"""The transfer endpoint of a process, and what joins those of an instance's ranks to one port."""

import msgspec

from ..core.messages import TransferAddress
from ..engine.engine import Engine
from ..engine.kv_cache import KVCache
from ..kv_transfer.config import Membership
from ..kv_transfer.cuda_memory import CudaGpu
from ..kv_transfer.endpoint import TransferEndpoint
from ..kv_transfer.interfaces import TransferListener, TransferPort
from ..kv_transfer.parts import Share
from ..kv_transfer.ranks import InstancePort
from .ending import give_up
from .rank_messages import Loaded
from .ranks import Ranks
from .spec import WorkerSpec


def open_endpoint(
    spec: WorkerSpec, cache: KVCache, listener: TransferListener, share: Share
) -> TransferEndpoint:
    """Returns the endpoint of one rank, which does not listen yet."""
    host = spec.host or "127.0.0.1"
    return TransferEndpoint(
        cache,
        listener,
        Membership(spec.worker_id, spec.incarnation, spec.token, host, spec.socket_root, share),
        transport=spec.config.kv.transport,
        gpu=CudaGpu(cache.torch_device) if cache.torch_device.type == "cuda" else None,
        on_stuck=give_up,
    )


class Transfers:
    """Rank 0's end of its instance's transfers, with one rank or several."""

    def __init__(
        self, spec: WorkerSpec, engine: Engine, listener: TransferListener, ranks: Ranks | None
    ) -> None:
        share = Share(0, spec.num_ranks, engine.config.num_kv_heads)
        self._ranks = ranks
        self._joined: InstancePort[TransferEndpoint] | None = None
        self.port: TransferPort
        if ranks is None:
            self.port = self._own = open_endpoint(spec, engine.cache, listener, share)
        else:
            self.port = self._joined = InstancePort(
                lambda own: open_endpoint(spec, engine.cache, own, share), listener, share, ranks.command
            )
            self._own = self._joined.own

    def start(self) -> tuple[TransferAddress, list[Loaded]]:
        """Starts to listen, and returns the address of all ranks and what ranks 1, 2, ... report of
        themselves, when they have loaded. Raises OSError when an address cannot be bound."""
        address = self._own.start()
        if self._ranks is None or self._joined is None:
            return address, []
        others = self._ranks.when_loaded(self._joined.on_end)
        return msgspec.structs.replace(address, others=tuple(one.address for one in others)), others

    def close(self) -> None:
        """Fails what is open, and cleans up."""
        if self._joined is not None:
            self._joined.close("the worker ends")
        self._own.close()
