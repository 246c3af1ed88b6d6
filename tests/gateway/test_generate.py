"""The responses to valid requests: text, tokens, finish reasons and the timeline."""

from typing import cast

import grpc
import pytest

from pdserve.core.request import FinishReason
from pdserve.gateway.app import GatewayServer
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.gateway.asking import Stub, ask, stream, text_of
from tests.gateway.support import EOS, ScriptedCluster
from tests.gateway.test_admin import config_yaml


async def test_tokens_stream_with_contiguous_indices_then_one_end_each(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    events = await stream(generation, ask(max_tokens=7))
    deltas = [event.tokens for event in events if event.HasField("tokens")]
    assert [delta.index for delta in deltas] == list(range(7))
    assert [token_id for delta in deltas for token_id in delta.token_ids] == list(cluster.token_ids[:7])
    assert text_of(events) == cluster.tokenizer.decode(cluster.token_ids[:7])
    assert [event.WhichOneof("event") for event in events[-2:]] == ["choice_end", "end"]
    assert events[-2].choice_end.finish_reason == pb.FINISH_REASON_LENGTH
    usage = events[-1].end.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (
        len(cluster.requests[0].prompt_token_ids),
        1,
        7,
    )


async def test_the_unary_answer_is_the_assembled_stream(generation: Stub) -> None:
    request = ask(max_tokens=9, n=2, logprobs=1, seed=1)
    events = await stream(generation, request)
    response = await generation.Generate(request)
    for index, choice in enumerate(response.choices):
        assert choice.text == text_of(events, index)
        assert len(choice.token_ids) == len(choice.logprobs) == 9
        assert choice.finish_reason == pb.FINISH_REASON_LENGTH
    assert len(response.choices) == 2
    assert response.usage == events[-1].end.usage
    assert response.timeline == events[-1].end.timeline


async def test_the_timeline_reports_each_leg(generation: Stub) -> None:
    timeline = (await stream(generation, ask(max_tokens=2)))[-1].end.timeline
    assert timeline.first_token_s == pytest.approx(0.04)
    assert timeline.ended_s == pytest.approx(0.1)
    (attempt,) = timeline.attempts
    assert attempt.dispatched_s == pytest.approx(0.01)
    assert (attempt.prefill.worker, attempt.decode.worker) == ("prefill-0", "decode-0")
    assert attempt.prefill.compute_s == pytest.approx(0.025)
    assert attempt.transfer.num_bytes == 4 << 20
    assert attempt.transfer.hidden_share == pytest.approx(0.75)
    assert attempt.decode.duration_s == pytest.approx(0.06)


async def test_unset_parameters_have_their_defaults_and_a_drawn_seed(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    await stream(generation, pb.GenerateRequest(prompt=pb.Prompt(text="hello")))
    await stream(
        generation, ask(temperature=0.0, top_k=5, stop_token_ids=[7], ignore_eos=True, seed=2**64 - 1)
    )
    drawn, asked = (request.sampling for request in cluster.requests)
    assert (drawn.max_tokens, drawn.temperature, drawn.n, drawn.logprobs, drawn.stop) == (
        16,
        1.0,
        1,
        None,
        (),
    )
    assert (asked.temperature, asked.top_k, asked.stop_token_ids, asked.ignore_eos) == (0.0, 5, (7,), True)
    assert asked.seed == 2**64 - 1
    assert drawn.logit_bias == ()
    assert len({request.request_id for request in cluster.requests}) == 2


async def test_biases_reach_the_workers_in_one_order(generation: Stub, cluster: ScriptedCluster) -> None:
    await stream(generation, ask(logit_bias={300: -1.5, 7: 100.0, 12: 0.0}))
    assert cluster.requests[0].sampling.logit_bias == ((7, 100.0), (12, 0.0), (300, -1.5))


async def test_an_end_of_text_token_ends_a_choice_without_text(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    cluster.eos_after = 3
    events = await stream(generation, ask(max_tokens=9))
    end = next(event.choice_end for event in events if event.HasField("choice_end"))
    assert end.finish_reason == pb.FINISH_REASON_STOP
    assert not end.HasField("stop_string")
    assert EOS not in text_of(events)
    assert events[-1].end.usage.completion_tokens == 4


async def test_a_stop_string_across_tokens_ends_only_its_choice(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    events = await stream(generation, ask(max_tokens=40, n=2, stop=["fox jumps", "no such"]))
    ends = [event.choice_end for event in events if event.HasField("choice_end")]
    assert [(end.choice, end.finish_reason, end.stop_string) for end in ends] == [
        (0, pb.FINISH_REASON_STOP, "fox jumps"),
        (1, pb.FINISH_REASON_STOP, "fox jumps"),
    ]
    assert text_of(events) == "the quick brown "
    request_id = cluster.requests[0].request_id
    assert cluster.stopped == [(request_id, 0), (request_id, 1)]
    assert events[-1].HasField("end")


async def test_stop_strings_do_not_count_before_min_tokens(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    num_tokens = len(cluster.token_ids)
    events = await stream(generation, ask(max_tokens=2 * num_tokens, min_tokens=num_tokens, stop=["quick"]))
    assert text_of(events).count("quick") == 1
    assert events[-2].choice_end.stop_string == "quick"


async def test_text_held_back_is_sent_at_the_end(generation: Stub, cluster: ScriptedCluster) -> None:
    num_tokens = len(cluster.token_ids)
    events = await stream(generation, ask(max_tokens=num_tokens, stop=["lazy dog and more"]))
    assert text_of(events) == "the quick brown fox jumps over the lazy dog"
    assert events[-2].choice_end.finish_reason == pb.FINISH_REASON_LENGTH


async def test_logprobs_are_sent_with_their_tokens(generation: Stub) -> None:
    events = await stream(generation, ask(max_tokens=2, logprobs=2))
    (first,) = events[0].tokens.logprobs
    assert first.logprob == -0.5
    assert [(top.token_id, top.logprob) for top in first.top] == [(0, -0.5), (1, -1.5)]


async def test_closing_a_stream_frees_its_resources(generation: Stub, cluster: ScriptedCluster) -> None:
    cluster.hold_after = 1
    call = generation.GenerateStream(ask(max_tokens=9))
    await call.read()
    assert cluster.closed == []
    call.cancel()
    await cluster.all_closed.wait()


async def test_a_deadline_travels_with_the_request_and_ends_it(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    cluster.hold_after = 0
    timeout_s = 0.2
    while not cluster.requests:  # one that has expired on its way to the cluster shows nothing
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generation.Generate(ask(), timeout=timeout_s)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        timeout_s *= 2
    await cluster.all_closed.wait()
    assert cluster.requests[0].deadline_s is not None


async def test_without_keys_connections_and_users_of_an_address_take_turns_within_it(
    generation: Stub, server: GatewayServer, cluster: ScriptedCluster
) -> None:
    named = ask()
    named.client_id = "alice"
    for request in (ask(), ask(), named):
        await generation.Generate(request)
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{server.port}", (("grpc.use_local_subchannel_pool", 1),)
    ) as other:
        await pdserve_pb2_grpc.GenerationStub(other).Generate(ask())
    assert {request.client for request in cluster.requests} == {"address:loopback"}
    first, again, alice, elsewhere = (request.turn for request in cluster.requests)
    assert first == again
    assert alice == "alice"
    assert len({first, alice, elsewhere}) == 3


async def test_without_a_deadline_a_request_has_none(generation: Stub, cluster: ScriptedCluster) -> None:
    await generation.Generate(ask())
    assert cluster.requests[0].deadline_s is None


async def test_a_client_that_stops_reading_frees_its_resources(
    generation: Stub, admin: "pdserve_pb2_grpc.ClusterAsyncStub", cluster: ScriptedCluster
) -> None:
    limits = "{max_message_bytes: 100000, max_tokens: 200, max_n: 4, max_unread_s: 0.05}"
    await admin.Apply(pb.ApplyRequest(config_yaml=config_yaml(limits=limits)))
    cluster.num_extra_logprobs = 50_000
    call = generation.GenerateStream(ask(max_tokens=90, logprobs=0))
    await call.read()
    await cluster.all_closed.wait()
    call.cancel()
    assert cluster.closed == [cluster.requests[0].request_id]


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (FinishReason.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
        (FinishReason.CANCELLED, grpc.StatusCode.CANCELLED),
        (FinishReason.ERROR, grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_a_request_that_cannot_continue_ends_with_its_status(
    generation: Stub, cluster: ScriptedCluster, reason: FinishReason, code: grpc.StatusCode
) -> None:
    cluster.ending = (reason, None)
    call = generation.GenerateStream(ask(max_tokens=3))
    for _ in range(4):
        assert not cast(pb.GenerateEvent, await call.read()).HasField("end")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is code


async def test_a_reconnecting_client_gets_its_missing_tokens_and_text(generation: Stub) -> None:
    request = ask(max_tokens=9, n=2, seed=1)
    request.request_id = "mine"
    whole = await stream(generation, request)
    for num_tokens in range(10):
        request.resume_from[:] = [num_tokens, 9]
        rest = await stream(generation, request)
        deltas = [event.tokens for event in whole if event.HasField("tokens")]
        before = "".join(delta.text for delta in deltas if delta.choice == 0 and delta.index < num_tokens)
        assert before + text_of(rest) == text_of(whole)
        lacking = [event.tokens for event in rest if event.HasField("tokens") and event.tokens.token_ids]
        assert [(delta.choice, delta.index) for delta in lacking] == [
            (0, index) for index in range(num_tokens, 9)
        ]
        assert [event.choice_end.choice for event in rest if event.HasField("choice_end")] == [0, 1]
        assert rest[-1].end.usage == whole[-1].end.usage


async def test_a_stop_string_across_the_resumption_point_is_found(generation: Stub) -> None:
    request = ask(max_tokens=9, stop=["brown"])
    request.request_id = "mine"
    whole = await stream(generation, request)
    (num_tokens,) = {event.tokens.index + 1 for event in whole[-3:] if event.HasField("tokens")}
    request.resume_from[:] = [num_tokens - 1]
    rest = await stream(generation, request)
    assert [event.choice_end.stop_string for event in rest if event.HasField("choice_end")] == ["brown"]


async def test_without_a_seed_the_request_id_determines_the_output(
    generation: Stub, cluster: ScriptedCluster
) -> None:
    for name in ("a", "a", "b", "", ""):
        await stream(generation, pb.GenerateRequest(prompt=pb.Prompt(text="hello"), request_id=name))
    first, again, *others = [request.sampling.seed for request in cluster.requests]
    assert first == again
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("header", "is_taken"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", True),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", False),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01" + "-more" * 1000, False),
        ("", False),
    ],
)
async def test_a_request_carries_its_clients_well_formed_span(
    header: str, is_taken: bool, generation: Stub, cluster: ScriptedCluster
) -> None:
    await generation.Generate(ask(max_tokens=1), metadata=(("traceparent", header),))
    assert cluster.requests[0].traceparent == (header if is_taken else "")
