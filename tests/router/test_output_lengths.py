"""Expected outputs, learnt by client and by `max_tokens`; and the room that is kept for them."""

from pdserve.core.messages import Reserve, StepReport, WorkerLoad
from pdserve.core.request import FinishReason
from pdserve.router.config import RouterConfig
from pdserve.router.output_lengths import FEW, MAX_CLASSES, UNKNOWN_TOKENS, OutputLengths

from .cluster import Cluster, make_request, worker_info


def test_an_unknown_output_is_expected_to_be_no_longer_than_allowed() -> None:
    lengths = OutputLengths()
    assert lengths.expected(make_request(max_tokens=10)) == 10
    assert lengths.expected(make_request(max_tokens=4096)) == UNKNOWN_TOKENS


def test_outputs_are_as_long_as_recent_ones_of_the_same_client() -> None:
    lengths = OutputLengths()
    for _ in range(FEW):
        lengths.note(make_request(client="short", max_tokens=1000), 10)
        lengths.note(make_request(client="long", max_tokens=1000), 900)
    assert lengths.expected(make_request(client="short", max_tokens=1000)) == 10
    assert lengths.expected(make_request(client="long", max_tokens=1000)) == 900
    assert 100 < lengths.expected(make_request(client="new", max_tokens=1000)) < 800
    assert lengths.expected(make_request(client="long", max_tokens=600)) == 600
    assert lengths.expected(make_request(client="long", max_tokens=50)) == 50


def test_a_client_that_changes_is_followed() -> None:
    lengths = OutputLengths()
    request = make_request(client="c", max_tokens=1000)
    for num_tokens in (*[900] * 200, *[10] * 100):
        lengths.note(request, num_tokens)
    assert lengths.expected(request) < 30


def test_many_clients_take_bounded_memory() -> None:
    lengths = OutputLengths()
    for index in range(2 * MAX_CLASSES):
        lengths.note(make_request(client=f"c{index}", max_tokens=1000), 10)
    assert len(lengths) <= MAX_CLASSES
    assert lengths.expected(make_request(client="c0", max_tokens=1000)) == 10


def _cluster() -> Cluster:
    return Cluster(
        worker_info("prefill-0", num_blocks=10_000, max_batch_tokens=1 << 16, max_batch_size=1000),
        worker_info("decode-0", num_blocks=200, max_model_len=3000),
        config=RouterConfig(prefill_on_decode_factor=None),
    )


def _num_placed(cluster: Cluster, max_tokens: int, prefix: str = "r") -> int:
    num_before = len(cluster.sent["decode-0"])
    for index in range(60):
        request = make_request(f"{prefix}{index}", num_tokens=32, max_tokens=max_tokens, client="c")
        cluster.submit(request)
    return sum(isinstance(command, Reserve) for command in cluster.sent["decode-0"][num_before:])


def test_fewer_long_outputs_than_short_ones_are_placed_at_once() -> None:
    assert _num_placed(_cluster(), max_tokens=2) == 60
    num_long = _num_placed(_cluster(), max_tokens=600)
    assert 10 < num_long < 50


def _preempt(cluster: Cluster, num_preemptions: int) -> None:
    load = WorkerLoad(num_free_blocks=200, num_preemptions=num_preemptions)
    cluster.handle(StepReport(worker_id="decode-0", incarnation=1, load=load))


def test_reported_preemptions_keep_more_room_for_growth() -> None:
    cluster = _cluster()
    for num_preemptions in range(5):
        _preempt(cluster, num_preemptions)
    assert 0 < _num_placed(cluster, max_tokens=600) < _num_placed(_cluster(), max_tokens=600) / 1.5


def test_a_repeated_count_of_preemptions_is_no_news() -> None:
    cluster = _cluster()
    for _ in range(5):
        _preempt(cluster, 1)
    assert _num_placed(cluster, max_tokens=600) > 15


def test_a_request_with_much_to_come_waits_for_no_one_when_the_worker_is_idle() -> None:
    cluster = _cluster()
    request = make_request("r", num_tokens=100, max_tokens=2900)
    cluster.submit(request)
    assert isinstance(cluster.last("decode-0"), Reserve)


def test_what_outputs_were_is_expected_of_the_next_ones() -> None:
    cluster = _cluster()
    for index in range(FEW):
        request = make_request(f"short{index}", num_tokens=32, max_tokens=600, client="c")
        cluster.submit(request)
        cluster.token("prefill-0", 0)
        cluster.token("decode-0", 1, FinishReason.STOP)
    assert _num_placed(cluster, max_tokens=600) > _num_placed(_cluster(), max_tokens=600)
