"""A load on a real cluster: every request is accounted for, and its timeline explains its time to first
token."""

import asyncio

import pytest

from pdserve.loadgen.arrivals import Poisson
from pdserve.loadgen.campaign import CampaignPlan, Contender, Result, run_campaign
from pdserve.loadgen.grpc_target import GrpcTarget
from pdserve.loadgen.lengths import Fixed, Uniform
from pdserve.loadgen.slo import Slo
from pdserve.loadgen.workload import Drawn, SharedPrefixes

from .harness import Cluster, Clusters

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(clusters: Clusters) -> Cluster:
    return clusters.get()


def load(cluster: Cluster, plan: CampaignPlan) -> Result:
    async def run() -> Result:
        target = GrpcTarget(cluster.address)
        try:
            (result,) = await run_campaign(plan, [Contender("cluster", target)])
        finally:
            await target.close()
        return result

    return asyncio.run(run())


def test_the_legs_explain_the_time_to_first_token(cluster: Cluster) -> None:
    plan = CampaignPlan(Drawn(Poisson(50.0), Uniform(64, 256), Fixed(64)), max_requests=20, num_warm_up=2)
    result = load(cluster, plan)
    report = result.report(Slo(ttft=1e6))
    assert (report.num_ok, report.errors, report.num_output_tokens, report.good_share) == (20, {}, 1280, 1.0)
    for record in result.rounds[0].records:
        assert record.answer is not None and record.answer.legs is not None and record.ttft_s is not None
        legs = record.answer.legs
        assert sum(chunk.num_tokens for chunk in record.chunks) == 64
        assert 0 <= legs.first_token_s <= record.ttft_s  # the router's interval lies within the client's
        assert legs.queue_s <= legs.first_token_s
        # a worker's account may arrive after a short stream's end
        assert (legs.transfer_s is None) == (legs.exposed_s is None)
    assert {"queue", "transfer", "exposed_transfer", "first_decode"} <= set(report.legs_ms)


def test_a_closed_loop_over_shared_prefixes_finds_them_cached(cluster: Cluster) -> None:
    workload = Drawn(None, Fixed(16), Fixed(4), SharedPrefixes(num_groups=2, num_tokens=128))
    report = load(cluster, CampaignPlan(workload, max_requests=20, concurrency=1)).report(Slo())
    assert report.num_ok == 20
    assert report.num_cached_tokens is not None
    assert report.num_cached_tokens >= 18 * 112  # all but the first of each group, except for the last block
