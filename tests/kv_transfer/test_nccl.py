"""The link between two GPUs, over a test double of NCCL: whole transfers, the senders' turns, and the release
of a link."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from hypothesis import given, strategies as st

from pdserve.core.request import TransferId
from pdserve.kv_transfer import nccl
from pdserve.kv_transfer.link import LinkError, PeerLost
from pdserve.kv_transfer.meeting import RECEIVER_RANK, SENDER_RANK
from pdserve.kv_transfer.nccl import NcclLink
from pdserve.kv_transfer.send_turn import SendTurn

from .device_doubles import DeviceWorker, SharedMemory, device_layout
from .leftovers import T, _gloo_is_warm, _nothing_is_left  # noqa: F401  (fixtures)
from .meetings import joined_meetings
from .nccl_double import GroupDouble
from .support import WAIT_S

BLOCKS = [3, 11, 4, 7]
NUM_TOKENS = 29


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nccl, "make_group", GroupDouble)
    yield
    assert not GroupDouble.living


def worker(stack: ExitStack, name: str, gpu: str, seed: int | None = None) -> DeviceWorker:
    made = DeviceWorker(name, device_layout(), seed=seed, gpu=SharedMemory(gpu))
    stack.callback(made.endpoint.close)
    return made


def test_kv_goes_from_one_gpu_to_two_others_at_once() -> None:
    """To each in turns; every transfer arrives bit for bit."""
    with ExitStack() as stack:
        sender = worker(stack, "p", "GPU-0", seed=1)
        receivers = [worker(stack, f"d{number}", f"GPU-{number}") for number in (1, 2)]
        transfers = [
            (receiver, TransferId(f"{n} to {to}", 0))
            for n in range(6)
            for to, receiver in enumerate(receivers)
        ]
        for number, (receiver, transfer) in enumerate(transfers):
            blocks = [4 * (number // 2) + i for i in range(4)]
            receiver.expect(transfer, sender.key, blocks, NUM_TOKENS)
            sender.push(transfer, receiver.address, BLOCKS, NUM_TOKENS, b"payload")
        for number, (receiver, transfer) in enumerate(transfers):
            assert receiver.ends.received(transfer) == b"payload"
            blocks = [4 * (number // 2) + i for i in range(4)]
            sent = sender.store.tokens(BLOCKS, 0, NUM_TOKENS)
            assert torch.equal(receiver.store.tokens(blocks, 0, NUM_TOKENS), sent)
        assert sum(group.num_sends for group in GroupDouble.living) > len(transfers)


def test_a_lost_peer_fails_only_its_own_transfers() -> None:
    with ExitStack() as stack:
        sender, lost = worker(stack, "p", "GPU-0", seed=1), worker(stack, "d1", "GPU-1")
        other = worker(stack, "d2", "GPU-2")
        lost.expect(T, sender.key, BLOCKS, NUM_TOKENS)
        sender.push(T, lost.address, BLOCKS, NUM_TOKENS, b"")
        lost.ends.received(T)
        lost.endpoint.close()
        second = TransferId("second", 0)
        other.expect(second, sender.key, BLOCKS, NUM_TOKENS)
        sender.push(TransferId("lost", 0), lost.address, BLOCKS, NUM_TOKENS, b"")
        sender.push(second, other.address, BLOCKS, NUM_TOKENS, b"payload")
        assert other.ends.received(second) == b"payload"
        assert sender.ends.send_error(TransferId("lost", 0))


def links(on_stuck: list[str]) -> tuple[NcclLink, NcclLink]:
    """Yields two ranks in one process, joined."""
    ours, theirs = (
        NcclLink(
            rank,
            "127.0.0.1",
            1,
            4096,
            WAIT_S,
            ThreadPoolExecutor(1, thread_name_prefix="pdserve-nccl"),
            torch.device("cpu"),
            on_stuck.append,
        )
        for rank in (RECEIVER_RANK, SENDER_RANK)
    )
    building = [
        link.executor.submit(link.build, meeting)
        for link, meeting in zip((ours, theirs), joined_meetings(), strict=True)
    ]
    for each in building:
        each.result(WAIT_S)
    return ours, theirs


def test_a_wait_ends_when_the_link_is_killed() -> None:
    ours, theirs = links([])
    ticket = ours.recv(0, 64, 1)
    waiting = ours.executor.submit(ours.wait, ticket, WAIT_S)
    ours.kill()
    with pytest.raises(LinkError, match="killed"):
        waiting.result(WAIT_S)
    theirs.kill()
    ours.join()
    theirs.join()
    assert ours.is_gone and theirs.is_gone


def test_a_failed_operation_loses_the_link() -> None:
    """Torch reports it as completed, like a successful one; its group reports the error."""
    ours, theirs = links([])
    ticket = ours.recv(0, 64, 1)
    theirs.kill()
    theirs.join()
    ours._group.settle()
    with pytest.raises(PeerLost, match="COMM_ERROR"):
        ours.wait(ticket, WAIT_S)
    ours.kill()
    ours.join()


def test_without_group_errors_an_operation_counts_as_torch_reports_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(GroupDouble, "get_error")
    ours, theirs = links([])
    sent, received = theirs.send(0, 64, 1), ours.recv(0, 64, 1)
    ours.wait(received, WAIT_S)
    theirs.wait(sent, WAIT_S)
    for link in (ours, theirs):
        link.kill()
        link.join()


def test_an_abort_that_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "ABORT_S", 0.01)
    reported, let_go = threading.Event(), threading.Event()
    why: list[str] = []
    ours, theirs = links(why)
    abort = ours._group.abort

    def hang() -> None:
        assert let_go.wait(WAIT_S)
        abort()

    def on_stuck(text: str) -> None:
        why.append(text)
        reported.set()

    ours._group.abort = hang
    ours._on_stuck = on_stuck
    ours.kill()
    assert reported.wait(WAIT_S)
    assert not ours.is_gone
    let_go.set()
    theirs.kill()
    for link in (ours, theirs):
        assert link._released.wait(WAIT_S)
    assert "did not let go" in why[0]


def test_a_peer_lost_while_a_link_is_built_fails_the_transfer_cleanly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both sides are in the driver, which would wait for ever."""
    entered, let_go = threading.Barrier(3), threading.Event()

    def build(store: object, rank: int, timeout: object) -> GroupDouble:
        entered.wait(WAIT_S)
        assert let_go.wait(WAIT_S)
        raise RuntimeError("the peer has gone")

    monkeypatch.setattr(nccl, "make_group", build)
    monkeypatch.setattr(nccl, "ABORT_S", 0.1)
    with ExitStack() as stack:
        sender, lost = worker(stack, "p", "GPU-0", seed=1), worker(stack, "d1", "GPU-1")
        lost.expect(T, sender.key, BLOCKS, NUM_TOKENS)
        sender.push(T, lost.address, BLOCKS, NUM_TOKENS, b"")
        entered.wait(WAIT_S)
        lost.endpoint.close()
        assert "connecting to d1 failed" in sender.ends.send_error(T)
        let_go.set()


@given(
    st.lists(st.tuples(st.sampled_from(["take", "give", "behind", "drop"]), st.integers(0, 2)), max_size=60)
)
def test_one_link_sends_at_a_time_and_each_in_its_order(calls: list[tuple[str, int]]) -> None:
    turn = SendTurn()
    asked: dict[int, list[int]] = {link: [] for link in range(3)}
    begun: dict[int, list[int]] = {link: [] for link in range(3)}
    under_way = [0, 0, 0]

    def begin(link: int, number: int, chunks: int) -> None:
        begun[link].append(number)
        under_way[link] += chunks
        assert sum(count > 0 for count in under_way) <= 1

    for number, (call, link) in enumerate(calls):
        if call == "take":
            asked[link].append(number)
            turn.take(link, partial(begin, link, number, 1))
        elif call == "behind":
            asked[link].append(number)
            turn.behind(link, partial(begin, link, number, 0))
        elif call == "give" and under_way[link]:
            under_way[link] -= 1
            turn.give_back(link)
        elif call == "drop":
            under_way[link] = 0
            asked[link] = list(begun[link])
            turn.drop(link)
        assert all(begun[link] == asked[link][: len(begun[link])] for link in range(3))
    while any(under_way):
        link = next(link for link in range(3) if under_way[link])
        under_way[link] -= 1
        turn.give_back(link)
    assert begun == asked
