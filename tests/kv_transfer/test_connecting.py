"""P's decisions while it connects, by example."""

import pytest

from pdserve.core.errors import InvalidTransition
from pdserve.kv_transfer.connecting import Answer, Connecting, ConnectState
from pdserve.kv_transfer.link import LinkError, PeerLost
from pdserve.kv_transfer.protocol import Connected, LinkRefused, Meet, Prepare

from .support import CALM

PREPARE, CONNECTED, ENTRY = Prepare(1, 4, 4096), Connected(1), Meet(1, "key", b"value")


def building(link: str) -> Connecting:
    connecting = Connecting(link, CALM)
    assert connecting.prepared(PREPARE) is PREPARE
    return connecting


@pytest.mark.parametrize("link", ["shm", "gloo"])
def test_a_link_is_up_once_both_sides_have_their_end(link: str) -> None:
    connecting = building(link)
    assert connecting.built(CONNECTED) is None
    assert connecting.state is ConnectState.UP
    with pytest.raises(InvalidTransition, match=f"connecting over {link}"):
        connecting.prepared(PREPARE)


def test_only_a_group_meets_and_has_time_of_its_own_to_build() -> None:
    assert building("nccl").built(ENTRY) is ENTRY
    assert Connecting("nccl", CALM).build_timeout_s == CALM.nccl_timeout_s
    assert Connecting("cuda_ipc", CALM).build_timeout_s is None
    with pytest.raises(LinkError, match="the peer answered Meet, expected Connected"):
        building("shm").built(ENTRY)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (LinkRefused("another wire format"), "refused: another wire format"),
        (PeerLost("the peer closed the connection"), "the peer closed the connection"),
        (ENTRY, "the peer answered Meet, expected Prepare"),
        (CONNECTED, "the peer answered Connected, expected Prepare"),
    ],
)
def test_any_other_answer_to_the_greeting_ends_the_attempt(answer: Answer, error: str) -> None:
    connecting = Connecting("gloo", CALM)
    with pytest.raises(LinkError) as raised:
        connecting.prepared(answer)
    assert str(raised.value) == error
    assert connecting.state is ConnectState.GREETED
