"""The common part of links over a two-rank process group of torch. The group belongs to one pair: D posts the
receives that P has announced, and P sends exactly these."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import torch

from .link import PeerLost, TransferTimeout
from .meeting import RECEIVER_RANK, SENDER_RANK, Meeting


class GroupLink(ABC):
    """One rank of the pair. Every call that may block runs on the link's executor, one at a time."""

    name: ClassVar[str]
    takes_turns = False

    def __init__(
        self,
        rank: int,
        host: str,
        num_slots: int,
        slot_bytes: int,
        timeout_s: float,
        executor: Executor,
    ) -> None:
        self.is_gone = False
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.executor = executor
        self._rank = rank
        self._host = host
        self._timeout_s = timeout_s
        self._group: Any = None
        self._is_killed = False

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._timeout_s)

    def build(self, meeting: Meeting) -> None:
        """See `MeetingLink`."""
        with self._errors():
            self._group = self._build(meeting)

    def send(self, slot: int, num_bytes: int, seq: int) -> Any:
        with self._errors():
            return self._group.send([self._tensor(slot, num_bytes)], RECEIVER_RANK, seq & 0x7FFFFFFF)

    def recv(self, slot: int, num_bytes: int, seq: int) -> Any:
        with self._errors():
            return self._group.recv([self._tensor(slot, num_bytes)], SENDER_RANK, seq & 0x7FFFFFFF)

    @abstractmethod
    def _build(self, meeting: Meeting) -> Any:
        """Builds this rank of the group; returns when the other one has joined."""

    @abstractmethod
    def _tensor(self, slot: int, num_bytes: int) -> torch.Tensor:
        """Returns a slot's memory in the form that the group accepts."""

    @abstractmethod
    def _release(self) -> None:
        """Runs on the executor, after any wait still under way: an operation's buffers must outlive
        it."""

    def kill(self) -> None:
        if not self._is_killed:
            self._is_killed = True
            self.executor.submit(self._release)
            self.executor.shutdown(wait=False)

    def join(self) -> None:
        self.executor.shutdown(wait=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Translates RuntimeError, by which torch reports every failure."""
        try:
            yield
        except RuntimeError as error:
            kind = TransferTimeout if "timed out" in str(error).lower() else PeerLost
            raise kind(f"{self.name}: {error}") from error
