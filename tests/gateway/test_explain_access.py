"""If keys scope request ids, a request is found by the id that its client knows."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import openai
import pytest

from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.auth.keys import make_key, new_key
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

ALICE, BOB, ROOT = new_key(), new_key(), new_key()


@pytest.fixture
async def server(cluster: ScriptedCluster, tmp_path: Path) -> AsyncIterator[GatewayServer]:
    keys = [make_key("alice", ALICE), make_key("bob", BOB), make_key("root", ROOT, is_admin=True)]
    path = tmp_path / "keys"
    path.write_text("".join(f"{key.line}\n" for key in keys))
    path.chmod(0o600)
    config = CONFIG.model_copy(update={"listen": CONFIG.listen.model_copy(update={"api_keys": str(path)})})
    local = f"unix:{tmp_path}/socket"
    gateway = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer), local=local)
    yield gateway
    await gateway.stop(0)


@pytest.fixture
async def local(server: GatewayServer, tmp_path: Path) -> AsyncIterator["pdserve_pb2_grpc.ClusterAsyncStub"]:
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        yield pdserve_pb2_grpc.ClusterStub(channel)


@pytest.fixture
def admin(channel: grpc.aio.Channel) -> "pdserve_pb2_grpc.ClusterAsyncStub":
    """Connects over TCP."""
    return pdserve_pb2_grpc.ClusterStub(channel)


@pytest.fixture
async def made(generation: "pdserve_pb2_grpc.GenerationAsyncStub") -> None:
    """Sends alice/first, alice/both and bob/both."""
    for key, request_id in ((ALICE, "first"), (ALICE, "both"), (BOB, "both")):
        prompt, sampling = pb.Prompt(text="the dog"), pb.SamplingParams(max_tokens=2)
        await generation.Generate(
            pb.GenerateRequest(prompt=prompt, sampling=sampling, request_id=request_id),
            metadata=(("authorization", f"Bearer {key}"),),
        )


async def explained(admin: "pdserve_pb2_grpc.ClusterAsyncStub", request_id: str, key: str | None) -> str:
    """Returns the request's internal id."""
    shown = (("authorization", f"Bearer {key}"),) if key else ()
    return (await admin.Explain(pb.ExplainRequest(request_id=request_id), metadata=shown)).request_id


async def code(
    admin: "pdserve_pb2_grpc.ClusterAsyncStub", request_id: str, key: str | None
) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await explained(admin, request_id, key)
    return caught.value.code()


@pytest.mark.usefixtures("made")
async def test_a_client_finds_its_own_requests_by_the_ids_it_gave(
    admin: "pdserve_pb2_grpc.ClusterAsyncStub",
) -> None:
    assert await explained(admin, "first", ALICE) == "alice/first"
    assert await explained(admin, "both", ALICE) == "alice/both"
    assert await explained(admin, "both", BOB) == "bob/both"


async def listed(
    admin: "pdserve_pb2_grpc.ClusterAsyncStub", key: str | None, **wanted: int
) -> list[tuple[str, str]]:
    """Returns the listed requests' ids and clients."""
    shown = (("authorization", f"Bearer {key}"),) if key else ()
    found = await admin.ListRequests(pb.ListRequestsRequest(**wanted), metadata=shown)
    return [(one.request_id, one.client) for one in found.requests]


@pytest.mark.usefixtures("made")
async def test_a_key_lists_its_own_requests_and_an_administrator_all(
    admin: "pdserve_pb2_grpc.ClusterAsyncStub", local: "pdserve_pb2_grpc.ClusterAsyncStub"
) -> None:
    everything = [("bob/both", "key:bob"), ("alice/both", "key:alice"), ("alice/first", "key:alice")]
    assert await listed(admin, ALICE) == [("both", "key:alice"), ("first", "key:alice")]
    assert await listed(admin, BOB) == [("both", "key:bob")]
    assert await listed(admin, ROOT) == await listed(local, None) == everything
    assert await listed(admin, ROOT, max_requests=1) == everything[:1]
    for request_id, _ in await listed(admin, ALICE):
        assert await explained(admin, request_id, ALICE) == f"alice/{request_id}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listed(admin, None)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("number", [0, -1, 201])
async def test_a_list_is_bounded(local: "pdserve_pb2_grpc.ClusterAsyncStub", number: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listed(local, None, max_requests=number)
    assert caught.value.details() == f"max_requests: {number} is not valid, expected 1 to 200"


@pytest.mark.usefixtures("made")
async def test_a_client_finds_no_other_clients_requests(admin: "pdserve_pb2_grpc.ClusterAsyncStub") -> None:
    for request_id in ("first", "alice/first", "cmpl-first", "../alice/first"):
        assert await code(admin, request_id, BOB) is grpc.StatusCode.NOT_FOUND
    assert await code(admin, "first", None) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.usefixtures("made")
async def test_an_operator_finds_any_request_and_must_resolve_ambiguous_ids(
    admin: "pdserve_pb2_grpc.ClusterAsyncStub", local: "pdserve_pb2_grpc.ClusterAsyncStub"
) -> None:
    for channel, key in ((admin, ROOT), (local, None)):
        assert await explained(channel, "first", key) == "alice/first"
        assert await explained(channel, "bob/both", key) == "bob/both"
        assert await code(channel, "never", key) is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError, match="as alice/both, bob/both has it") as caught:
            await explained(channel, "both", key)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.usefixtures("made")
async def test_a_request_is_found_by_its_http_response_id(admin: "pdserve_pb2_grpc.ClusterAsyncStub") -> None:
    assert await explained(admin, "cmpl-first", ALICE) == "alice/first"
    assert await explained(admin, "chatcmpl-first", ROOT) == "alice/first"


async def test_an_http_request_without_an_id_is_found_by_its_response_id(
    server: GatewayServer, admin: "pdserve_pb2_grpc.ClusterAsyncStub"
) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://{server.http_address}/v1", api_key=BOB) as client:
        answer = await client.completions.create(model="tiny", prompt="hello", max_tokens=2)
    assert await explained(admin, answer.id, BOB) == f"bob/{answer.id.removeprefix('cmpl-')}"
