"""Operators see the state, change the configuration and drain; health checks and reflection work."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias, cast

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.core.errors import CapacityError
from pdserve.gateway.app import GatewayServer
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.gateway.support import ScriptedCluster
from tests.gateway.test_refusals import Details

Admin: TypeAlias = "pdserve_pb2_grpc.ClusterAsyncStub"


def config_yaml(**lines: str) -> str:
    """Returns the configuration of the server under test, with the `key="value"` lines under metadata.pdserve
    changed."""
    values = {
        "model": "{path: tiny}",
        "listen": '{grpc: "127.0.0.1:0", http: "127.0.0.1:0"}',
        "limits": "{max_message_bytes: 100000, max_tokens: 200, max_n: 4}",
    } | lines
    return "metadata:\n  pdserve:\n" + "".join(f"    {key}: {value}\n" for key, value in values.items())


async def test_status_reports_pools_and_workers(admin: Admin) -> None:
    status = await admin.GetStatus(pb.GetStatusRequest())
    assert (status.model, status.serving, status.num_queued_requests, status.num_running_requests) == (
        "tiny",
        True,
        2,
        3,
    )
    assert [(pool.role, pool.instances, pool.ready) for pool in status.pools] == [
        ("prefill", 1, 1),
        ("decode", 1, 0),
    ]
    ready, starting = status.workers
    assert (ready.worker_id, ready.state, ready.num_free_blocks, ready.num_blocks) == (
        "prefill-0",
        pb.WORKER_STATE_READY,
        90,
        100,
    )
    assert (starting.state, starting.phase, starting.fraction) == (
        pb.WORKER_STATE_STARTING,
        "loading weights",
        0.5,
    )


async def following(call: Any) -> pb.ClusterStatus:
    """Returns the stream's next message, whose type has no name in grpc's stubs."""
    return cast(pb.ClusterStatus, await call.read())


async def test_watch_sends_each_state_change_and_ends_with_the_cluster(
    admin: Admin, cluster: ScriptedCluster
) -> None:
    call = admin.WatchStatus(pb.WatchStatusRequest())
    assert (await following(call)).num_queued_requests == 2
    cluster.change(num_queued_requests=5)
    assert (await following(call)).num_queued_requests == 5
    cluster.change(shutting_down=True)
    assert (await following(call)).shutting_down
    assert await call.read() is cast(Any, grpc.aio).EOF


async def test_apply_reports_the_changes_and_they_stay_in_force(
    admin: Admin, generation: "pdserve_pb2_grpc.GenerationAsyncStub", cluster: ScriptedCluster
) -> None:
    new = config_yaml(
        pools="{decode: {instances: 2}}", limits="{max_message_bytes: 100000, max_tokens: 7, max_n: 4}"
    )
    response = await admin.Apply(pb.ApplyRequest(config_yaml=new))
    assert [(change.key, change.before, change.after) for change in response.changes] == [
        ("pools.decode.instances", "1", "2"),
        ("limits.max_tokens", "200", "7"),
    ]
    assert cluster.applied[0].pools.decode.instances == 2
    assert (await generation.GetModelInfo(pb.GetModelInfoRequest())).limits.max_tokens == 7
    assert list((await admin.Apply(pb.ApplyRequest(config_yaml=new))).changes) == []


async def test_a_dry_run_changes_nothing(admin: Admin, cluster: ScriptedCluster) -> None:
    request = pb.ApplyRequest(config_yaml=config_yaml(pools="{decode: {instances: 2}}"), dry_run=True)
    assert len((await admin.Apply(request)).changes) == 1
    assert len((await admin.Apply(request)).changes) == 1
    assert cluster.applied == []


async def test_scaling_changes_the_ratio_and_nothing_else(admin: Admin, cluster: ScriptedCluster) -> None:
    to_three = pb.ScaleRequest(pools=[pb.PoolScale(role="decode", instances=3)])
    (change,) = (await admin.Scale(to_three)).changes
    assert (change.key, change.before, change.after) == ("pools.decode.instances", "1", "3")
    assert (await admin.Scale(to_three)).changes == []
    by = [pb.PoolScale(role="prefill", delta=1), pb.PoolScale(role="decode", delta=-2)]
    dry = await admin.Scale(pb.ScaleRequest(pools=by, dry_run=True))
    wet = await admin.Scale(pb.ScaleRequest(pools=by))
    assert dry == wet
    sizes = [(config.pools.prefill.instances, config.pools.decode.instances) for config in cluster.applied]
    assert sizes == [(1, 3), (1, 3), (2, 1)]
    assert cluster.applied[-1].limits == cluster.applied[0].limits


@pytest.mark.parametrize(
    ("pools", "field", "expected"),
    [
        ([], "pools", "at least one of prefill, decode"),
        ([pb.PoolScale(role="both", instances=1)], "pools[0].role", "one of prefill, decode"),
        ([pb.PoolScale(role="decode", delta=1)] * 2, "pools[1].role", "each once"),
        ([pb.PoolScale(role="decode")], "pools[0].instances", "instances, or delta"),
        ([pb.PoolScale(role="decode", instances=4097)], "pools[0].instances", "0 to 4096"),
        ([pb.PoolScale(role="decode", delta=-2)], "pools[0].delta", "-1 to 4095"),
        (
            [pb.PoolScale(role=role, instances=0) for role in ("prefill", "decode")],
            "pools",
            "at least one instance",
        ),
    ],
)
async def test_a_ratio_that_cannot_be_is_refused(
    pools: list[pb.PoolScale], field: str, expected: str, admin: Admin, cluster: ScriptedCluster
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.Scale(pb.ScaleRequest(pools=pools))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    message = caught.value.details() or ""
    assert message.startswith(f"{field}: ") and expected in message
    assert cluster.applied == []


async def test_a_change_that_needs_a_restart_is_refused_as_a_whole(
    admin: Admin, cluster: ScriptedCluster, details: Details
) -> None:
    request = pb.ApplyRequest(
        config_yaml=config_yaml(pools="{decode: {instances: 2, threads: 3}}", kv="{block_size: 32}")
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.Apply(request)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    failure = details(caught.value)["PreconditionFailure"]
    assert isinstance(failure, error_details_pb2.PreconditionFailure)
    assert {violation.subject for violation in failure.violations} == {
        "pools.decode.threads",
        "kv.block_size",
    }
    assert cluster.applied == []


async def test_a_broken_file_is_refused_with_file_and_line(admin: Admin, details: Details) -> None:
    request = pb.ApplyRequest(config_yaml=config_yaml(pools="{decode: {instance: 2}}"), filename="my.yaml")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.Apply(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(
        "my.yaml:6: metadata.pdserve.pools.decode.instance: unknown key"
    )
    assert "BadRequest" in details(caught.value)


async def test_more_instances_than_the_machine_holds_are_refused(
    admin: Admin, cluster: ScriptedCluster
) -> None:
    cluster.refusal = CapacityError("3 cores are missing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.Apply(pb.ApplyRequest(config_yaml=config_yaml(pools="{decode: {instances: 9}}")))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    cluster.refusal = None
    assert len((await admin.Apply(pb.ApplyRequest(config_yaml=config_yaml(), dry_run=True))).changes) == 0


async def test_drain_shows_progress_until_done(admin: Admin, cluster: ScriptedCluster) -> None:
    call = aiter(admin.Drain(pb.DrainRequest(worker_ids=["prefill-0"])))
    first = await anext(call)
    assert (first.num_running_requests, list(first.worker_ids), first.done) == (3, ["prefill-0"], False)
    cluster.go_on.set()
    rest = [progress async for progress in call]
    assert (rest[-1].num_running_requests, list(rest[-1].worker_ids), rest[-1].done) == (0, [], True)
    assert not any(progress.done for progress in rest[:-1])
    assert cluster.drained == [(("prefill-0",), False)]


async def test_a_drain_continues_when_its_client_disconnects(admin: Admin, cluster: ScriptedCluster) -> None:
    call = admin.Drain(pb.DrainRequest())
    await call.read()
    call.cancel()
    watch = admin.WatchStatus(pb.WatchStatusRequest())
    await watch.read()
    cluster.go_on.set()
    assert (await following(watch)).num_running_requests == 0
    assert cluster.drained == [((), False)]


async def test_draining_for_shutdown_ends_with_done(admin: Admin, cluster: ScriptedCluster) -> None:
    cluster.go_on.set()
    progress = [item async for item in admin.Drain(pb.DrainRequest(shutdown=True))]
    assert progress[-1].done
    assert cluster.drained == [((), True)]


async def test_a_shutdown_ends_only_after_all_answers_are_sent(
    admin: Admin, generation: "pdserve_pb2_grpc.GenerationAsyncStub", cluster: ScriptedCluster
) -> None:
    cluster.hold_after = 1
    answer = aiter(generation.GenerateStream(pb.GenerateRequest(prompt=pb.Prompt(text="hello"))))
    await anext(answer)
    drain, watch = (
        aiter(admin.Drain(pb.DrainRequest(shutdown=True))),
        aiter(admin.WatchStatus(pb.WatchStatusRequest())),
    )
    await anext(drain)
    cluster.go_on.set()
    while not (await anext(watch)).shutting_down:
        pass
    ends = asyncio.ensure_future(_last(drain)), asyncio.ensure_future(_last(watch))
    await admin.GetStatus(pb.GetStatusRequest())
    assert not any(end.done() for end in ends)
    cluster.say_on.set()
    assert [event async for event in answer][-1].HasField("end")
    progress, _ = await asyncio.gather(*ends)
    assert progress.done


async def _last(stream: AsyncIterator[Any]) -> Any:
    last = None
    async for item in stream:
        last = item
    return last


@pytest.mark.parametrize(
    "request_",
    [pb.DrainRequest(worker_ids=["nobody"]), pb.DrainRequest(worker_ids=["prefill-0"], shutdown=True)],
)
async def test_invalid_drains_are_refused(
    admin: Admin, cluster: ScriptedCluster, request_: pb.DrainRequest
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in admin.Drain(request_):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("worker_ids: ")
    assert cluster.drained == []


async def test_health_follows_the_cluster(server: GatewayServer, channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="pdserve.v1.Generation"))
    kinds = health_pb2.HealthCheckResponse
    assert (await watch.read()).status == kinds.NOT_SERVING
    server.set_serving(True)
    assert (await watch.read()).status == kinds.SERVING
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == kinds.SERVING
    server.set_serving(False)
    assert (await watch.read()).status == kinds.NOT_SERVING
    watch.cancel()


async def test_reflection_lists_the_services_and_their_file(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {"pdserve.v1.Generation", "pdserve.v1.Cluster", "grpc.health.v1.Health"} <= names
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="pdserve.v1.Generation"))
    (file,) = (await call.read()).file_descriptor_response.file_descriptor_proto
    assert FileDescriptorProto.FromString(file).package == "pdserve.v1"
    await call.done_writing()


async def test_explain_reports_predicted_and_actual_times_of_each_leg(
    admin: Admin, generation: "pdserve_pb2_grpc.GenerationAsyncStub"
) -> None:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="hello"), sampling=pb.SamplingParams(max_tokens=7), request_id="mine"
    )
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    await generation.Generate(request, metadata=(("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),))
    explained = await admin.Explain(pb.ExplainRequest(request_id="mine"))
    assert (explained.request_id, explained.outcome, explained.completion_tokens, explained.trace_id) == (
        "mine",
        "length",
        7,
        trace_id,
    )
    (attempt,) = explained.attempts
    assert {leg.leg: (leg.predicted_s, leg.actual_s) for leg in attempt.legs} == {
        "queue": pytest.approx((0.0, 0.01)),
        "worker queue": pytest.approx((0.002, 0.001)),
        "prefill": pytest.approx((0.028, 0.025)),
        "first token": pytest.approx((0.03, 0.03)),
        "transfer": pytest.approx((0.004, 0.005)),
        "token gap": pytest.approx((0.01, 0.01)),
    }
    assert not attempt.legs[0].HasField("predicted_s")
    assert [place.prefill_worker for place in attempt.considered] == ["prefill-0", "prefill-1"]
    assert attempt.dispatch == 7


async def test_explain_names_the_user_of_a_request(
    admin: Admin, generation: "pdserve_pb2_grpc.GenerationAsyncStub"
) -> None:
    request = pb.GenerateRequest(prompt=pb.Prompt(text="hello"), request_id="mine", client_id="alice")
    await generation.Generate(request)
    assert (await admin.Explain(pb.ExplainRequest(request_id="mine"))).user == "alice"


async def test_explaining_an_unknown_request_is_not_found(admin: Admin, details: Details) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.Explain(pb.ExplainRequest(request_id="never heard of"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert details(caught.value)["ErrorInfo"].reason == "UNKNOWN_REQUEST"  # type: ignore[attr-defined]
