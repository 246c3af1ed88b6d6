"""Placement by queues, loads, cached prefixes, and predictions for a place."""

import random
from collections import Counter
from typing import cast

import msgspec
import pytest

from pdserve.core.latency import LatencyModel, LatencyPriors
from pdserve.core.messages import Leg, Prefill, Reserve, Role, Serve, StepReport, StepTiming, WorkerLoad
from pdserve.core.request import Request, TransferId
from pdserve.router.config import RouterConfig
from pdserve.router.core import Router
from pdserve.router.events import WorkerRole

from .cluster import Cluster, make_request, prefix_hashes, worker_info

PAIRS_ONLY = RouterConfig(prefill_on_decode_factor=None)


def test_prompts_go_to_the_prefill_worker_with_the_shortest_queue() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request("a", num_tokens=500))
    cluster.submit(make_request("b", num_tokens=100))
    cluster.submit(make_request("c", num_tokens=50))
    assert cluster.spec("prefill-0").transfer.request_id == "a"
    assert [c.spec.transfer.request_id for c in cluster.sent["prefill-1"] if isinstance(c, Prefill)] == [
        "b",
        "c",
    ]


def test_streams_go_to_the_least_loaded_decode_worker() -> None:
    cluster = Cluster("prefill-0", "decode-0", "decode-1", config=PAIRS_ONLY)
    for name in ("a", "b", "c"):
        cluster.submit(make_request(name))
    assert [len(cluster.sent["decode-0"]), len(cluster.sent["decode-1"])] == [2, 1]


def test_a_cached_prefix_attracts_prompts_until_the_queue_costs_more() -> None:
    cluster = Cluster("prefill-0", "prefill-1", worker_info("decode-0", num_blocks=10_000), config=PAIRS_ONLY)
    cluster.hold_prefix("prefill-1", make_request(num_tokens=400))
    for i in range(5):
        cluster.submit(make_request(f"a{i}", num_tokens=400))
    assert (len(cluster.sent["prefill-0"]), len(cluster.sent["prefill-1"])) == (0, 5)
    for i in range(20):
        cluster.submit(make_request(f"b{i}", num_tokens=400))
    assert cluster.sent["prefill-0"]


def test_a_fully_computed_prompt_ignores_its_cached_prefix() -> None:
    cluster = Cluster("prefill-0", "prefill-1", worker_info("decode-0", num_blocks=10_000), config=PAIRS_ONLY)
    request = make_request(num_tokens=400)
    cluster.hold_prefix("prefill-1", request)
    for name in ("a", "b"):
        sampling = msgspec.structs.replace(request.sampling, prompt_logprobs=0)
        cluster.submit(msgspec.structs.replace(request, request_id=name, sampling=sampling))
    assert (len(cluster.sent["prefill-0"]), len(cluster.sent["prefill-1"])) == (1, 1)


def test_a_prefix_of_another_salt_is_not_a_prefix() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
    cluster.hold_prefix("prefill-1", make_request("a", num_tokens=400, salt="alice"))
    cluster.submit(make_request("a", num_tokens=400, salt="bob"))
    assert cluster.sent["prefill-0"]


def test_evicted_blocks_and_lost_workers_hold_no_prefix() -> None:
    request = make_request("a", num_tokens=400)
    for forget in ("evict", "lose"):
        cluster = Cluster("prefill-0", "prefill-1", "decode-0", config=PAIRS_ONLY)
        cluster.hold_prefix("prefill-1", request)
        if forget == "evict":
            cluster.report("prefill-1", evicted=prefix_hashes(request))
        else:
            cluster.lose("prefill-1")
            cluster.add(worker_info("prefill-1", incarnation=2))
        cluster.submit(request)
        assert cluster.sent["prefill-0"], forget


def test_a_prompt_whose_prefix_d_holds_is_prefilled_there() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    request = make_request("a", num_tokens=1000)
    cluster.hold_prefix("decode-0", request)
    cluster.submit(request)
    assert isinstance(cluster.last("decode-0"), Serve)
    assert cluster.router.status(0.0).counters.served_on_one == 1


def test_a_prompt_is_prefilled_on_d_when_ps_queue_is_long() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.submit(make_request("a", num_tokens=2000))
    assert isinstance(cluster.last("decode-0"), Reserve)
    cluster.submit(make_request("b", num_tokens=20, first_token=5000))
    assert isinstance(cluster.last("decode-0"), Serve)


def test_no_prefill_on_d_delays_its_streams_beyond_the_slo() -> None:
    model = LatencyModel(LatencyPriors(prefill_token_s=1e-3))
    router = Router(RouterConfig(itl_slo_s=0.05), model)
    cluster = Cluster("prefill-0", "decode-0")
    cluster.router = router
    for worker_id in ("prefill-0", "decode-0"):
        cluster.add(worker_info(worker_id))
    cluster.submit(make_request("a", num_tokens=2000))
    cluster.submit(make_request("b", num_tokens=100, first_token=5000))
    assert cluster.spec("prefill-0").transfer.request_id == "b"


def test_a_decode_worker_takes_prompts_beyond_the_slo_once_prefill_workers_are_full() -> None:
    cluster = Cluster()
    cluster.router = Router(RouterConfig(itl_slo_s=0.05), LatencyModel(LatencyPriors(prefill_token_s=1e-3)))
    for name in ("prefill-0", "decode-0"):
        cluster.add(worker_info(name, num_blocks=10_000))
    for name in ("a", "b", "c", "d"):
        cluster.submit(make_request(name, num_tokens=2000))
    assert [type(command) for command in cluster.sent["decode-0"]] == [Reserve, Reserve, Reserve, Serve]
    assert cluster.router.status(0.0).counters.beyond_itl == 1


@pytest.mark.parametrize(("bends", "command"), [(True, Serve), (False, Prefill)])
def test_a_prefill_worker_decodes_once_no_decode_worker_keeps_the_slo(bends: bool, command: type) -> None:
    slow = LatencyModel(LatencyPriors(decode_context_token_s=1e-4))
    factor = RouterConfig().prefill_on_decode_factor if bends else None
    cluster = Cluster()
    cluster.router = Router(RouterConfig(itl_slo_s=0.05, prefill_on_decode_factor=factor), slow)
    for name in ("prefill-0", "decode-0"):
        cluster.add(worker_info(name))
    cluster.submit(make_request("a", num_tokens=450))
    cluster.submit(make_request("b", num_tokens=100, first_token=5000))
    assert isinstance(cluster.last("prefill-0"), command)


def test_workers_that_keep_the_itl_inside_the_slo_come_first() -> None:
    slow = LatencyModel(LatencyPriors(decode_context_token_s=1e-4))
    cluster = Cluster()
    cluster.router = Router(RouterConfig(itl_slo_s=0.05, prefill_on_decode_factor=None), slow)
    busy = worker_info("decode-0", max_batch_size=1000, num_blocks=10_000)
    for info in (worker_info("prefill-0"), busy):
        cluster.add(info)
    cluster.submit(make_request("a", num_tokens=450))
    cluster.add(worker_info("decode-1", max_batch_size=3))
    for name in ("b", "c"):
        cluster.submit(make_request(name, num_tokens=100))
    assert [c.spec.transfer.request_id for c in cast(list[Reserve], cluster.sent["decode-1"])] == ["b", "c"]


def _has(cluster: Cluster, worker_id: str, request: Request) -> bool:
    sent = cluster.sent[worker_id]
    return bool(sent) and cluster.spec(worker_id).transfer.request_id == request.request_id


@pytest.mark.parametrize("num_shared", [200, 2000, 4000])
def test_streams_with_one_system_prompt_spread_over_the_decode_workers(num_shared: int) -> None:
    """Though the KV that one worker holds already need not be sent there, and a transfer is not hidden."""
    model = LatencyModel(
        LatencyPriors(prefill_token_s=2e-5, decode_step_s=8e-3, decode_sequence_s=6e-5, transfer_byte_s=1e-7)
    )
    cluster = Cluster()
    cluster.router = Router(PAIRS_ONLY, model)
    for name in ("prefill-0", *(f"decode-{index}" for index in range(4))):
        cluster.add(
            worker_info(
                name, num_blocks=200_000, max_batch_tokens=8192, max_batch_size=256, max_model_len=16_000
            )
        )
    streams: Counter[str] = Counter()
    for index in range(100):
        request = make_request(f"r{index}", num_shared + 1 + index % 50, max_tokens=2000)
        cluster.submit(request)
        (decode,) = (f"decode-{i}" for i in range(4) if _has(cluster, f"decode-{i}", request))
        streams[decode] += 1
        cluster.token("prefill-0", 0)
        cluster.leg_ended("prefill-0", Leg.PREFILL)
        cluster.token(decode, 1)
        for name in ("prefill-0", decode):
            cluster.hold_prefix(name, request)
    assert len(streams) == 4
    assert max(streams.values()) <= 1.2 * min(streams.values()), streams


def _train(cluster: Cluster, worker_id: str, *, slowness: float, prefills: bool, num_steps: int = 40) -> None:
    """Reports steps that take `slowness` times as long as the default priors say."""
    model, rng = LatencyModel(), random.Random(worker_id)
    for _ in range(num_steps):
        num = rng.randint(1, 30)
        tokens = num * 20
        seconds = model.prefill_s(tokens, tokens**2) if prefills else model.decode_s(num, 50 * num)
        timing = StepTiming(
            num_prefill_tokens=tokens if prefills else 0,
            sum_prefill_squares=tokens**2 if prefills else 0,
            num_decode_sequences=0 if prefills else num,
            num_context_tokens=0 if prefills else 50 * num,
            duration_s=seconds * slowness,
        )
        cluster.handle(
            StepReport(
                worker_id=worker_id, incarnation=1, load=WorkerLoad(num_free_blocks=256), timing=timing
            )
        )
    cluster.report(worker_id)


def test_a_slow_prefill_worker_gets_the_prompts_that_it_can_compute_sooner() -> None:
    cluster = Cluster("prefill-0", "prefill-1", worker_info("decode-0", num_blocks=10_000), config=PAIRS_ONLY)
    _train(cluster, "prefill-1", slowness=1.0, prefills=True)
    _train(cluster, "prefill-0", slowness=4.0, prefills=True)
    for index in range(5):
        cluster.submit(make_request(f"r{index}", num_tokens=400, first_token=1000 * index))
    assert [len(cluster.sent[f"prefill-{index}"]) for index in range(2)] == [1, 4]


def test_a_slow_decode_worker_gets_fewer_streams() -> None:
    cluster = Cluster(
        worker_info("prefill-0", max_batch_tokens=1 << 16, max_batch_size=100),
        *(worker_info(f"decode-{index}", num_blocks=10_000) for index in range(2)),
        config=RouterConfig(prefill_on_decode_factor=None, max_prefill_backlog_tokens=1 << 20),
    )
    _train(cluster, "decode-1", slowness=1.0, prefills=False)
    _train(cluster, "decode-0", slowness=3.0, prefills=False)
    for index in range(60):
        cluster.submit(make_request(f"r{index}", num_tokens=40, first_token=1000 * index))
    slow, fast = (len(cluster.sent[f"decode-{index}"]) for index in range(2))
    assert slow + fast == 60
    assert 0 < 2 * slow < fast, (slow, fast)


@pytest.mark.parametrize("change", [0.05, 1.0, 20.0])
def test_a_decode_worker_that_starts_again_gets_its_share_whatever_speed_the_fleet_has_taken(
    change: float,
) -> None:
    cluster = Cluster(
        worker_info("prefill-0", max_batch_tokens=1 << 16, max_batch_size=100),
        *(worker_info(f"decode-{index}", num_blocks=10_000) for index in range(3)),
        config=RouterConfig(prefill_on_decode_factor=None, max_prefill_backlog_tokens=1 << 20),
    )
    for slowness in (1.0, change):
        for _ in range(10):
            for index in range(3):
                _train(cluster, f"decode-{index}", slowness=slowness, prefills=False, num_steps=8)
    cluster.lose("decode-0")
    cluster.add(worker_info("decode-0", incarnation=2, num_blocks=10_000))
    for index in range(60):
        cluster.submit(make_request(f"r{index}", num_tokens=40, first_token=1000 * index))
    streams = [len(cluster.sent[f"decode-{index}"]) for index in range(3)]
    assert sum(streams) == 60 and max(streams) <= 1.3 * min(streams), streams


def _slow_and_fast() -> Cluster:
    cluster = Cluster("prefill-0", "prefill-1", worker_info("decode-0", num_blocks=10_000), config=PAIRS_ONLY)
    _train(cluster, "prefill-1", slowness=1.0, prefills=True)
    _train(cluster, "prefill-0", slowness=4.0, prefills=True)
    return cluster


def test_reports_without_a_step_do_not_let_a_slow_worker_be_forgotten() -> None:
    cluster = _slow_and_fast()
    for _ in range(1000):
        cluster.report("prefill-0")
    for index in range(5):
        cluster.submit(make_request(f"r{index}", num_tokens=400, first_token=1000 * index))
    assert [len(cluster.sent[f"prefill-{index}"]) for index in range(2)] == [1, 4]


def test_a_slow_worker_that_was_idle_for_long_is_tried_again() -> None:
    cluster = _slow_and_fast()
    cluster.now_s += 600.0
    cluster.report("prefill-0")
    for index in range(4):
        cluster.submit(make_request(f"r{index}", num_tokens=400, first_token=1000 * index))
    assert [len(cluster.sent[f"prefill-{index}"]) for index in range(2)] == [2, 2]


def test_a_fast_worker_is_seen_beside_many_slow_ones_that_are_idle() -> None:
    cluster = Cluster(
        *(f"prefill-{index}" for index in range(5)),
        worker_info("decode-0", num_blocks=10_000),
        config=PAIRS_ONLY,
    )
    for index in range(5):
        _train(cluster, f"prefill-{index}", slowness=10.0 if index < 4 else 1.0, prefills=True)
    cluster.submit(make_request("first", num_tokens=10))
    cluster.submit(make_request("second", num_tokens=400, first_token=5000))
    assert cluster.spec("prefill-4").transfer.request_id == "second"


def test_workers_that_swap_roles_hold_no_blocks_for_each_other() -> None:
    """Each would compute prompts for the other, with no blocks left beside those that it keeps for KV of the
    other."""
    cluster = Cluster("prefill-0", "decode-0", config=PAIRS_ONLY)
    cluster.submit(make_request("first", num_tokens=100))
    cluster.handle(WorkerRole("decode-0", Role.PREFILL))
    cluster.handle(WorkerRole("prefill-0", Role.DECODE))
    cluster.submit(make_request("second", num_tokens=100, first_token=5000))
    assert cluster.num_legs() == {"prefill-0": 1, "decode-0": 1}
    transfer = TransferId("first", 0)
    cluster.output("prefill-0", transfer, 0)
    cluster.leg_ended("prefill-0", Leg.PREFILL, transfer=transfer)
    assert cluster.num_legs() == {"prefill-0": 0, "decode-0": 1}
    cluster.output("decode-0", transfer, 1)
    assert isinstance(cluster.last("decode-0"), Prefill)
    assert cluster.spec("prefill-0").transfer.request_id == "second"


def test_a_worker_that_still_sends_is_passed_over_for_one_that_does_not() -> None:
    cluster = Cluster("prefill-0", "prefill-1", "decode-0", "decode-1", config=PAIRS_ONLY)
    cluster.submit(make_request("first", num_tokens=100))
    cluster.submit(make_request("other", num_tokens=100, first_token=3000))
    cluster.handle(WorkerRole("prefill-0", Role.DECODE))
    cluster.submit(make_request("second", num_tokens=100, first_token=5000))
    assert not any(isinstance(command, Reserve) for command in cluster.sent["prefill-0"])
    assert cluster.spec("prefill-1").transfer.request_id == "second"


def test_workers_of_another_model_are_never_paired() -> None:
    cluster = Cluster(worker_info("prefill-0", fingerprint="x"), worker_info("decode-0", fingerprint="y"))
    cluster.submit(make_request())
    assert not cluster.sent["prefill-0"]
    assert isinstance(cluster.last("decode-0"), Serve)


def test_the_model_learns_from_reports_and_status_shows_loads() -> None:
    cluster = Cluster("prefill-0", "decode-0")
    cluster.handle(
        StepReport(worker_id="decode-0", incarnation=1, load=WorkerLoad(num_running=3, num_free_blocks=7))
    )
    row = {worker.worker_id: worker for worker in cluster.router.status(0.0).workers}["decode-0"]
    assert (row.load.num_running, row.load.num_free_blocks, row.num_blocks) == (3, 7, 256)


def test_a_timeline_has_the_best_places_and_their_predictions_chosen_first() -> None:
    cluster = Cluster(
        "prefill-0", "prefill-1", "decode-0", "decode-1", config=RouterConfig(prefill_on_decode_factor=None)
    )
    cluster.submit(make_request("ahead", 2000, max_tokens=2))
    cluster.submit(make_request("r", 2000, max_tokens=2))
    timeline = cluster.router.timeline("r", 0.0)
    assert timeline is not None
    (dispatch,) = timeline.dispatches
    chosen, *others = dispatch.considered
    assert (chosen.prefill_worker, chosen.decode_worker) == (dispatch.prefill_worker, dispatch.decode_worker)
    assert len(others) == 3
    scores = [(p.has_failed, p.itl_excess_s, p.cost_s, p.load) for p in dispatch.considered]
    assert scores == sorted(scores)
    assert {place.prefill_worker for place in dispatch.considered} == {"prefill-0", "prefill-1"}
    assert (dispatch.expected_queue_s, dispatch.expected_ttft_s) == (0.0, chosen.ttft_s)
    itl_s = LatencyModel().decode_s(1, 2000)
    assert chosen.cost_s == pytest.approx(dispatch.expected_ttft_s + dispatch.expected_transfer_s + 2 * itl_s)
    assert dispatch.expected_itl_s > 0
