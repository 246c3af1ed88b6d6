"""The ranks of an instance: how they find each other, and how each notices that another is gone."""

import os
import queue
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from pdserve.worker import rank_meeting
from pdserve.worker.rank_links import RankLinks
from pdserve.worker.rank_meeting import RankMeeting, join, meeting_point
from pdserve.worker.rank_messages import Failed, Leave, RankMessage, Said
from pdserve.worker.rank_watch import MAX_SILENT_BEATS, RankWatch

from ..deadlines import WAIT_S

TOKEN = "secret"
GROUP = "/proc/1/fd/3"


@pytest.fixture
def point(request: pytest.FixtureRequest) -> str:
    return meeting_point(TOKEN, request.node.name, os.getpid())


def never() -> bool:
    return False


class Ends:
    """The reports of a rank's links, in order."""

    def __init__(self, sockets: Mapping[int, socket.socket]) -> None:
        self.messages: queue.SimpleQueue[tuple[int, RankMessage]] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.links = RankLinks(sockets, lambda *message: self.messages.put(message), self.lost.put)
        self.links.start()

    def close(self) -> None:
        self.links.close()


@pytest.fixture
def linked() -> Iterator[tuple[Ends, Ends, Ends]]:
    """Rank 0, 1 and 2."""
    (zero, one), (zero_too, two) = (socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in "12")
    ranks = Ends({1: zero, 2: zero_too}), Ends({0: one}), Ends({0: two})
    yield ranks
    for rank in ranks:
        rank.close()


def test_ranks_meet_in_any_order(point: str) -> None:
    with ThreadPoolExecutor() as threads:
        # the later rank comes first, and before there is a rank 0
        joining = [threads.submit(join, TOKEN, point, rank) for rank in (2, 1)]
        sockets = RankMeeting(TOKEN, point).gather(3, GROUP, never)
        assert sorted(sockets) == [1, 2]
        for rank, future in zip((2, 1), joining, strict=True):
            sock, group = future.result(WAIT_S)
            assert group == GROUP
            with sock, sockets[rank] as other:
                sock.send(bytes([rank]))
                assert other.recv(1) == bytes([rank])


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_the_instance_does_not_have_is_refused(point: str, rank: int) -> None:
    with ThreadPoolExecutor() as threads:
        gathering = threads.submit(RankMeeting(TOKEN, point).gather, 2, GROUP, never)
        with pytest.raises(ConnectionError):
            join(TOKEN, point, rank)
        sock, _ = join(TOKEN, point, 1)
        with sock, gathering.result(WAIT_S)[1]:
            pass


def test_a_process_without_the_token_does_not_join(point: str) -> None:
    with ThreadPoolExecutor() as threads:
        gathering = threads.submit(RankMeeting(TOKEN, point).gather, 2, GROUP, never)
        with pytest.raises(ConnectionError, match="token"):
            join("guess", point, 1)
        sock, _ = join(TOKEN, point, 1)
        with sock, gathering.result(WAIT_S)[1]:
            pass


def test_a_meeting_ends_when_rank_0_is_to_stop(point: str) -> None:
    with pytest.raises(TimeoutError, match="ranks 1, 2, 3 have not joined"):
        RankMeeting(TOKEN, point).gather(4, GROUP, lambda: True)


def test_a_rank_does_not_wait_for_a_rank_0_that_never_starts(
    point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_meeting, "MEETING_S", 0.0)
    with pytest.raises(TimeoutError, match="rank 0 has not started"):
        join(TOKEN, point, 1)


def test_messages_reach_rank_0_with_their_sender(linked: tuple[Ends, Ends, Ends]) -> None:
    zero, _, two = linked
    two.links.send(0, Said(b"first"))
    two.links.send(0, Said(b"second"))
    assert [zero.messages.get(timeout=WAIT_S) for _ in "12"] == [(2, Said(b"first")), (2, Said(b"second"))]


def test_the_end_of_one_rank_is_noticed_by_rank_0(linked: tuple[Ends, Ends, Ends]) -> None:
    zero, one, _ = linked
    one.close()
    assert zero.lost.get(timeout=WAIT_S) == "rank 1 has ended"


def test_the_end_of_rank_0_is_noticed_by_all(linked: tuple[Ends, Ends, Ends]) -> None:
    zero, *others = linked
    zero.close()
    assert [rank.lost.get(timeout=WAIT_S) for rank in others] == ["rank 0 has ended"] * 2


def test_a_rank_that_cannot_go_on_says_why(linked: tuple[Ends, Ends, Ends]) -> None:
    zero, one, _ = linked
    one.links.send(0, Failed("layer 3 is gone"))
    assert zero.lost.get(timeout=WAIT_S) == "rank 1: layer 3 is gone"


def test_leaving_is_no_loss(linked: tuple[Ends, Ends, Ends]) -> None:
    zero, *others = linked
    leaving = threading.Thread(target=zero.links.leave)
    leaving.start()
    for rank in others:
        assert rank.messages.get(timeout=WAIT_S) == (0, Leave())
        rank.close()
    leaving.join(WAIT_S)
    assert not leaving.is_alive()
    assert all(rank.lost.empty() for rank in linked)


def test_a_rank_that_is_silent_for_many_beats_ends_the_instance() -> None:
    watch = RankWatch((1, 2))
    for _ in range(MAX_SILENT_BEATS):
        assert watch.beat() is None
        watch.heard(1)
    assert watch.beat() == "rank 2 has been silent for 3 s"
