"""One process of an instance beside its rank 0: computes its part of each step, moves its part of the KV, and
decides nothing.

    rank 0's steps and commands, in one order --> follower; its thread --> transfers
    transfers --ends of its parts--> rank 0

It has no connection to the router, and ends with rank 0."""

import os
import sys

from ..engine.checkpoint import open_checkpoint, resolve_model_path
from ..engine.parallel.follower import Follower
from ..engine.parallel.group import RankGroup
from ..engine.parallel.steps import FIRST_FREE_KIND
from ..kv_transfer.endpoint import TransferEndpoint
from ..kv_transfer.parts import Share
from ..kv_transfer.ranks import RankPort
from .device import SWITCH_INTERVAL_S, bind_to_cores, engine_options, names_of
from .ending import give_up
from .rank_links import RankLinks
from .rank_meeting import join, meeting_point
from .rank_messages import Failed, Loaded, Said
from .spec import WorkerSpec
from .transfers import open_endpoint


class RankProcess:
    """Runs from `run` until its rank 0 ends. The calling thread of `run` computes the steps."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    def run(self) -> None:
        """Loads its share of the model and follows rank 0. Raises OSError when that does not come, and what
        loading raises; a rank 0 that is lost ends the process at once."""
        spec = self._spec
        cores = bind_to_cores(spec.cores)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        sock, address = join(spec.token, meeting_point(spec.token, *spec.key), spec.rank)
        links = RankLinks({0: sock}, lambda rank, message: None, give_up)
        links.start()
        try:
            self._follow(links, RankGroup.join(address, spec.rank), cores)
        except Exception as error:
            links.send(0, Failed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            links.close()

    def stop(self) -> None:
        """Does nothing: rank 0 ends it."""

    def _follow(self, links: RankLinks, group: RankGroup, cores: tuple[int, ...]) -> None:
        spec = self._spec
        path = resolve_model_path(spec.config.model.path)
        follower = Follower.open(path, engine_options(spec), group)
        share = Share(spec.rank, spec.num_ranks, open_checkpoint(path).config.num_kv_heads)
        port = RankPort(
            lambda listener: open_endpoint(spec, follower.cache, listener, share),
            lambda data: links.send(0, Said(data)),
        )
        address = port.own.start()
        try:
            links.send(0, Loaded(address, names_of(cores, None), os.getpid()))
            follower.run(_Commands(FIRST_FREE_KIND + spec.rank, port))
        finally:
            port.own.close()
            group.close()


class _Commands:
    """Implements `Companion`: passes on the commands that are this rank's."""

    def __init__(self, kind: int, port: RankPort[TransferEndpoint]) -> None:
        self._kind = kind
        self._port = port

    def handle(self, kind: int, payload: bytearray) -> None:
        if kind == self._kind:
            self._port.on_command(bytes(payload))

    def on_layer(self, layer: int) -> None:
        """Does nothing: rank 0 reports for all ranks what is computed."""
