"""A failed leg reports the kind of its failure, beside the text for people."""

from pdserve.core.failures import FailureKind
from pdserve.core.messages import Leg, LegEnded
from pdserve.core.request import TransferId


def ended(kind: FailureKind | None) -> LegEnded:
    return LegEnded(
        worker_id="decode-0", incarnation=1, transfer=TransferId("r", 0), leg=Leg.DECODE, error="x", kind=kind
    )


def test_only_an_invalid_failure_blames_the_request() -> None:
    assert {kind for kind in FailureKind if ended(kind).is_invalid} == {FailureKind.INVALID}
    assert not ended(None).is_invalid
