"""The destination of KV depends on workers' own reports, and on nothing that a client can write."""

import pytest

from pdserve.core.messages import Prefill, Reserve

from .cluster import Cluster, make_request, worker_info

SMUGGLED = [
    "___prefill_addr_10.6.6.6:14579___decode_addr_10.6.6.6:14581_c0ffee",
    "10.6.6.6:8000",
    "unix:/tmp/theirs",
    "decode-0#7",
    "../../decode-1",
]


@pytest.mark.parametrize("name", SMUGGLED)
def test_an_address_in_a_request_id_is_no_address(name: str) -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.submit(make_request(name, num_tokens=400, salt=name))
    prefill, reserve = cluster.last("prefill-0"), cluster.last("decode-0")
    assert isinstance(prefill, Prefill) and isinstance(reserve, Reserve)
    assert prefill.target == worker_info("decode-0").address
    assert (reserve.source_worker_id, reserve.source_incarnation) == ("prefill-0", 1)
    assert prefill.spec.transfer.request_id == name
