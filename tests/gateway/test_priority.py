"""The priority of a request, over both servers, and the lowest number that a key allows."""

import pytest

from pdserve.core.errors import InvalidRequest
from pdserve.gateway.auth.access import Caller
from pdserve.gateway.auth.keys import ApiKey
from pdserve.gateway.http.schema import CompletionRequest
from pdserve.gateway.intake import _priority
from pdserve.proto import pdserve_pb2 as pb
from tests.gateway.asking import Stub, ask, stream
from tests.gateway.support import ScriptedCluster


async def test_the_router_gets_a_requests_priority(generation: Stub, cluster: ScriptedCluster) -> None:
    request = ask(max_tokens=1)
    request.priority = -7
    await stream(generation, request)
    await stream(generation, ask(max_tokens=1))
    assert [request.priority for request in cluster.requests] == [-7, 0]


@pytest.mark.parametrize(
    ("given", "least", "priority"),
    [(None, None, 0), (None, -5, 0), (None, 3, 3), (-5, -5, -5), (4, None, 4), (7, 3, 7)],
)
def test_a_key_says_how_low_a_priority_may_be(given: int | None, least: int | None, priority: int) -> None:
    caller = Caller(ApiKey("a", b"", min_priority=least))
    assert _priority(pb.GenerateRequest(priority=given), caller) == priority


@pytest.mark.parametrize(("given", "least"), [(-1, None), (-6, -5), (2, 3), (1001, None), (-1001, -1000)])
def test_a_priority_below_the_keys_is_refused_by_name(given: int, least: int | None) -> None:
    with pytest.raises(InvalidRequest, match=f"priority: {given} is not valid"):
        _priority(pb.GenerateRequest(priority=given), Caller(ApiKey("a", b"", min_priority=least)))


def test_http_takes_the_same_field() -> None:
    assert CompletionRequest(prompt=["a"], priority=3).priority == 3
