"""Processes that are the ranks > 0 of one engine after another, since a process that has torch takes seconds to
start. They are forked from one that has loaded it."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pdserve.engine.engine import Engine, EngineOptions
from pdserve.engine.parallel.follower import Follower
from pdserve.engine.parallel.group import Deadlines, RankGroup
from tests.deadlines import WAIT_S

DEADLINES = Deadlines(step_s=WAIT_S, start_s=WAIT_S)
ENDED = "ended by rank 0"


class Echo:
    """Replies to each message of rank 0's caller with the layers computed since the last one."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._layers = bytearray()

    def handle(self, kind: int, payload: bytearray) -> None:
        self._group.reply(kind, bytes(payload + self._layers))
        self._layers.clear()

    def on_layer(self, layer: int) -> None:
        self._layers.append(layer)


def be_a_rank(connection: Connection) -> None:
    """Is one rank after another; reports how each has ended."""
    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        address, rank, path, options, deadlines = job
        group = None
        try:
            group = RankGroup.join(address, rank, deadlines)
            Follower.open(path, options, group).run(Echo(group))
            connection.send(ENDED)
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
        if group is not None:
            group.close()


class RankPool:
    """Used by one test after another."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.engine.parallel.rank_pool"])
        self._ranks: dict[int, tuple[Any, Connection]] = {}

    @contextmanager
    def engine(
        self,
        path: Path,
        num_ranks: int,
        options: EngineOptions,
        *,
        deadlines: Deadlines = DEADLINES,
        other_paths: dict[int, Path] | None = None,
    ) -> Iterator[tuple[Engine, RankGroup]]:
        """Rank 0's engine, in this process, and its group. Its end ends the other ranks."""
        group = RankGroup.create(num_ranks, deadlines)
        for rank in range(1, num_ranks):
            there = (other_paths or {}).get(rank, path)
            self._rank(rank).send((group.address, rank, there, options, deadlines))
        try:
            yield Engine.open(path, options, group=group), group
            group.stop()
        except BaseException:
            group.abort()
            raise
        finally:
            self.ends = {rank: self._end_of(rank) for rank in range(1, num_ranks)}
            group.close()

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self._ranks[rank][0].pid, number)

    def close(self) -> None:
        for process, connection in self._ranks.values():
            connection.send(None)
            process.join(WAIT_S)
            connection.close()

    def _rank(self, rank: int) -> Connection:
        if rank not in self._ranks:
            here, there = self._context.Pipe()
            process = self._context.Process(target=be_a_rank, args=(there,), daemon=True)
            process.start()
            there.close()
            self._ranks[rank] = process, here
        return self._ranks[rank][1]

    def _end_of(self, rank: int) -> str:
        process, connection = self._ranks[rank]
        try:
            assert connection.poll(WAIT_S), f"rank {rank} does not end"
            return str(connection.recv())
        except (EOFError, ConnectionResetError):
            process.join(WAIT_S)
            connection.close()
            del self._ranks[rank]
            return "dead"
