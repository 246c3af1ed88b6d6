"""Both sides of the handshake against each other, and against peers without the token."""

import contextlib

import pytest
from hypothesis import given, strategies as st

from pdserve.core.handshake import (
    HandshakeAcceptor,
    HandshakeDialler,
    HandshakeError,
    HandshakeStream,
    Purpose,
)

TOKEN = "0123456789abcdef" * 4


def met(dialler: HandshakeDialler, acceptor: HandshakeAcceptor) -> bytes:
    """The whole conversation, both directions."""
    said = [dialler.opening]
    said.append(acceptor.take(said[-1]))
    said.append(dialler.take(said[-1]))
    said.append(acceptor.take(said[-1]))
    assert dialler.num_wanted == acceptor.num_wanted == 0
    return b"".join(said)


def test_two_that_know_the_token_meet_and_it_does_not_travel() -> None:
    said = met(HandshakeDialler(TOKEN, Purpose.CONTROL), HandshakeAcceptor(TOKEN, Purpose.CONTROL))
    assert TOKEN.encode() not in said and bytes.fromhex(TOKEN) not in said


def test_no_two_conversations_are_alike() -> None:
    first, second = (
        met(HandshakeDialler(TOKEN, Purpose.CONTROL), HandshakeAcceptor(TOKEN, Purpose.CONTROL))
        for _ in range(2)
    )
    assert first[-32:] != second[-32:]


def test_a_dialler_does_not_answer_an_acceptor_without_the_token() -> None:
    dialler, acceptor = HandshakeDialler(TOKEN, Purpose.CONTROL), HandshakeAcceptor("guess", Purpose.CONTROL)
    with pytest.raises(HandshakeError, match="does not know this cluster's token"):
        dialler.take(acceptor.take(dialler.opening))


def test_an_acceptor_rejects_a_dialler_without_the_token() -> None:
    acceptor = HandshakeAcceptor(TOKEN, Purpose.CONTROL)
    acceptor.take(HandshakeDialler("guess", Purpose.CONTROL).opening)
    with pytest.raises(HandshakeError, match="does not know this cluster's token"):
        acceptor.take(bytes(32))


def test_a_connection_of_one_purpose_is_not_taken_for_another() -> None:
    with pytest.raises(HandshakeError, match="does not speak this protocol"):
        HandshakeAcceptor(TOKEN, Purpose.TRANSFER).take(HandshakeDialler(TOKEN, Purpose.CONTROL).opening)


def test_an_answer_that_was_heard_before_is_worth_nothing() -> None:
    said = met(HandshakeDialler(TOKEN, Purpose.CONTROL), HandshakeAcceptor(TOKEN, Purpose.CONTROL))
    acceptor = HandshakeAcceptor(TOKEN, Purpose.CONTROL)
    acceptor.take(said[: acceptor.num_wanted])
    with pytest.raises(HandshakeError):
        acceptor.take(said[-32:])


def test_an_acceptors_own_proof_sent_back_to_it_is_worth_nothing() -> None:
    acceptor = HandshakeAcceptor(TOKEN, Purpose.CONTROL)
    proof = acceptor.take(HandshakeDialler(TOKEN, Purpose.CONTROL).opening)[32:]
    with pytest.raises(HandshakeError):
        acceptor.take(proof)


def test_a_peer_that_makes_us_dial_ourselves_learns_no_proof() -> None:
    """It relays a dialler's opening to an acceptor that dials it: the reply does not fit an acceptor's
    part."""
    dialler, other = HandshakeDialler(TOKEN, Purpose.TRANSFER), HandshakeDialler(TOKEN, Purpose.TRANSFER)
    with pytest.raises(HandshakeError):
        dialler.take((other.opening + bytes(64))[-64:])


@given(st.data())
def test_a_stream_may_come_in_any_pieces(data: st.DataObject) -> None:
    dialler, acceptor = (
        HandshakeDialler(TOKEN, Purpose.CONTROL),
        HandshakeStream(HandshakeAcceptor(TOKEN, Purpose.CONTROL)),
    )
    answer, rest = b"", b""
    for piece in pieces(data, dialler.opening):
        more, rest = acceptor.feed(piece)
        answer += more
        assert rest == b""
    behind = data.draw(st.binary(max_size=50))
    for piece in pieces(data, dialler.take(answer) + behind):
        more, after = acceptor.feed(piece)
        assert more == b""
        rest += after
    assert rest == behind


def pieces(data: st.DataObject, whole: bytes) -> list[bytes]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def test_a_peer_that_speaks_out_of_turn_is_refused() -> None:
    stream = HandshakeStream(HandshakeAcceptor(TOKEN, Purpose.CONTROL))
    with pytest.raises(HandshakeError, match="wait for its turn"):
        stream.feed(HandshakeDialler(TOKEN, Purpose.CONTROL).opening + b"x")


@given(st.lists(st.binary(max_size=200)))
def test_nothing_but_the_proof_comes_through(said: list[bytes]) -> None:
    stream = HandshakeStream(HandshakeAcceptor(TOKEN, Purpose.CONTROL))
    with contextlib.suppress(HandshakeError):
        assert all(stream.feed(piece) == (b"", b"") for piece in said)
