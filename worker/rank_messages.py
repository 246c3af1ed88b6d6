"""The messages between rank 0 of an instance and its other ranks, which are processes of the same host.

    rank r --Join--------------------------> rank 0
    rank r <--Welcome----------------------- rank 0    where its group is
    rank r --Loaded, or Failed-------------> rank 0
    rank r --Said--------------------------> rank 0    a message of its transfers
    rank r <--Beat-------------------Beat--> rank 0    every `HEARTBEAT_S`
    rank r <--Leave------------------------- rank 0    in order; without it the end of a connection is a loss

Each is a packet of its own. Steps and commands travel elsewhere, in shared memory."""

import msgspec

from ..core.messages import TransferAddress

MAX_MESSAGE_BYTES = 1 << 16


class Join(msgspec.Struct, frozen=True, tag=True):
    """The first message of a rank."""

    rank: int


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Rank 0's answer: the address of the group's memory."""

    group: str


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The rank takes part in steps. `address` is where it accepts KV."""

    address: TransferAddress
    devices: tuple[str, ...]
    pid: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The rank ends, and says why."""

    why: str


class Said(msgspec.Struct, frozen=True, tag=True):
    """A message of the rank's transfers to those of rank 0."""

    data: bytes


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The sender runs, and has had so much processor time."""

    cpu_s: float


class Leave(msgspec.Struct, frozen=True, tag=True):
    """The instance ends in order."""


RankMessage = Join | Welcome | Loaded | Failed | Said | Beat | Leave
encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[RankMessage] = msgspec.msgpack.Decoder(RankMessage)


def decode(data: bytes) -> RankMessage:
    """Raises ConnectionError for an end, or for what is no message."""
    if not data:
        raise ConnectionError("the peer hung up")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConnectionError(f"malformed message: {error}") from error
