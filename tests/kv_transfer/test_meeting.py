"""How the two ends of a link under construction find each other."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed

from pdserve.kv_transfer.link import LinkError, PeerLost, TransferTimeout
from pdserve.kv_transfer.meeting import MAX_ENTRIES, Meeting

from .leftovers import T, _gloo_is_warm, _nothing_is_left  # noqa: F401  (fixtures)
from .meetings import joined_meetings
from .support import pair


def test_entries_set_at_either_end_reach_both() -> None:
    one, other = joined_meetings()
    one.set("a", b"1")
    other.set("b", b"2")
    assert [end.get(key, 0.0) for end in (one, other) for key in "ab"] == [b"1", b"2"] * 2


async def test_get_waits_for_an_entry() -> None:
    one, other = joined_meetings()
    with ThreadPoolExecutor(1) as executor:
        waiting = asyncio.get_running_loop().run_in_executor(executor, other.get, "a", 30.0)
        one.set("a", b"1")
        assert await waiting == b"1"


async def test_a_lost_peer_ends_the_wait() -> None:
    meeting = Meeting(lambda key, value: None)
    with ThreadPoolExecutor(1) as executor:
        waiting = asyncio.get_running_loop().run_in_executor(executor, meeting.get, "a", 30.0)
        meeting.close()
        with pytest.raises(PeerLost):
            await waiting


def test_a_peer_that_leaves_no_entry_times_out() -> None:
    with pytest.raises(TransferTimeout, match="'a'"):
        Meeting(lambda key, value: None).get("a", 0.0)


def test_a_peer_cannot_fill_the_memory() -> None:
    meeting = Meeting(lambda key, value: None)
    for number in range(MAX_ENTRIES):
        meeting.put(str(number), b"")
    with pytest.raises(LinkError, match=f"more than {MAX_ENTRIES}"):
        meeting.put("one more", b"")


def test_gloo_uses_no_name_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's store would: without a name server, for longer than a link may take."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a store of torch's was opened")

    monkeypatch.setattr(torch.distributed, "TCPStore", refuse)
    with pair(transport="gloo") as (sender, receiver):
        receiver.expect(T, sender.key, [0], 1)
        sender.push(T, receiver.address, [0], 1, b"payload")
        assert receiver.ends.received(T) == b"payload"
