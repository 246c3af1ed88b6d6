"""The open calls of a revoked key end by themselves, with an answer that states the reason."""

import asyncio
import json
from collections.abc import AsyncIterator
from os import unlink
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.core.config import ClusterConfig
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.auth import key_file
from pdserve.gateway.auth.access import Access, NotPermitted, RequiredAccess, Revoked
from pdserve.gateway.auth.keys import ApiKey, make_key, new_key
from pdserve.gateway.auth.revocation import Revocation
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from tests.deadlines import WAIT_S
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, model_info

ALICE, BOB, ROOT = new_key(), new_key(), new_key()
KEYS = make_key("alice", ALICE), make_key("bob", BOB), make_key("root", ROOT, is_admin=True)
Stub = Any


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes to the file take effect at once."""
    monkeypatch.setattr(key_file, "SETTLE_S", 0.0)
    path = tmp_path / "keys"
    write(path, *KEYS)
    return path


def write(path: Path, *keys: ApiKey) -> None:
    path.touch(0o600)
    path.write_text("".join(f"{key.line}\n" for key in keys))


@pytest.fixture
async def server(cluster: ScriptedCluster, file: Path) -> AsyncIterator[GatewayServer]:
    """Answers wait after their first token."""
    settings = CONFIG.model_dump()
    settings["listen"]["api_keys"] = str(file)
    cluster.hold_after = 1
    config = ClusterConfig.model_validate(settings)
    gateway = await serve(cluster, config, cluster.tokenizer, model_info(cluster.tokenizer))
    yield gateway
    await gateway.stop(0)


@pytest.fixture
async def http(server: GatewayServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as client:
        yield client


@pytest.fixture
def admin(channel: grpc.aio.Channel) -> Stub:
    """Connects over TCP."""
    return pdserve_pb2_grpc.ClusterStub(channel)


def as_key(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


REQUEST = pb.GenerateRequest(prompt=pb.Prompt(text="the dog"), sampling=pb.SamplingParams(max_tokens=3))
BODY = {"prompt": "the dog", "max_tokens": 3}


async def ending(call: Any) -> tuple[grpc.StatusCode, str]:
    return await call.code(), await call.details()


async def test_streams_of_a_revoked_key_end_without_another_call(
    generation: Stub, cluster: ScriptedCluster, file: Path
) -> None:
    kept, taken = (generation.GenerateStream(REQUEST, metadata=as_key(key)) for key in (BOB, ALICE))
    for call in (kept, taken):
        await call.read()
    whole = generation.Generate(REQUEST, metadata=as_key(ALICE))
    while cluster.num_held < 3:
        await cluster.held.wait()
        cluster.held.clear()
    write(file, *KEYS[1:])
    for call in (taken, whole):
        assert await ending(call) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "alice: the key of this call was revoked",
        )
    assert len(cluster.closed) == 2, "workers are free of them"
    cluster.say_on.set()
    while await kept.read():
        pass
    assert (await ending(kept))[0] is grpc.StatusCode.OK


async def test_an_http_stream_of_a_revoked_key_ends_with_an_event(
    http: httpx.AsyncClient, cluster: ScriptedCluster, file: Path
) -> None:
    lines = list[str]()
    async with http.stream(
        "POST", "/v1/completions", json=BODY | {"stream": True}, headers=bearer(ALICE)
    ) as response:
        async for line in response.aiter_lines():
            if line and not lines:
                write(file, *KEYS[1:])
            lines += [line] * bool(line)
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "unauthenticated"
    assert "data: [DONE]" not in lines and len(cluster.closed) == 1


async def test_an_unary_http_request_of_a_revoked_key_is_refused(
    http: httpx.AsyncClient, cluster: ScriptedCluster, file: Path
) -> None:
    call = asyncio.ensure_future(http.post("/v1/completions", json=BODY, headers=bearer(ALICE)))
    await cluster.held.wait()
    write(file, *KEYS[1:])
    response = await call
    assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthenticated")
    assert len(cluster.closed) == 1


async def test_revocation_does_not_wait_for_a_body(server: GatewayServer, file: Path) -> None:
    host, _, port = (server.http_address or "").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ALICE}\r\n"
    writer.write(
        f"{head}expect: 100-continue\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n".encode()
    )
    assert b"100" in await reader.readuntil(b"\r\n\r\n")  # it was admitted, and waits for the body
    write(file, *KEYS[1:])
    assert b" 401 " in await reader.readuntil(b"\r\n\r\n")
    writer.close()


async def test_a_key_that_loses_admin_rights_stops_watching(
    admin: Stub, generation: Stub, file: Path
) -> None:
    watching = admin.WatchStatus(pb.WatchStatusRequest(), metadata=as_key(ROOT))
    await watching.read()
    write(file, *KEYS[:2], make_key("root", ROOT))
    assert (await ending(watching))[0] is grpc.StatusCode.PERMISSION_DENIED
    info = await generation.GetModelInfo(pb.GetModelInfoRequest(), metadata=as_key(ROOT))
    assert info.name == "tiny"


async def test_reflection_ends_with_its_key(
    server: GatewayServer, channel: grpc.aio.Channel, file: Path
) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(metadata=as_key(ALICE))
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert (await call.read()).list_services_response.service
    write(file, *KEYS[1:])
    assert (await ending(call))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_a_missing_key_file_ends_all_calls(generation: Stub, file: Path) -> None:
    call = generation.GenerateStream(REQUEST, metadata=as_key(ALICE))
    await call.read()
    unlink(file)
    assert (await ending(call))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert (await ending(generation.Generate(REQUEST, metadata=as_key(BOB))))[
        0
    ] is grpc.StatusCode.UNAUTHENTICATED


async def test_only_calls_of_changed_keys_are_ended(file: Path) -> None:
    access = Access(str(file))
    revocation = Revocation(access)
    callers = {key: access.admit(RequiredAccess.KEY, f"Bearer {key}", 0.0) for key in (ALICE, BOB, ROOT)}
    started = asyncio.Semaphore(0)
    go_on = asyncio.Event()

    async def call(key: str, need: RequiredAccess) -> str:
        try:
            async with revocation.watch(callers[key], need):
                started.release()
                await go_on.wait()
        except (Revoked, NotPermitted) as error:
            return type(error).__name__
        return "went on"

    wanted = [
        (ALICE, RequiredAccess.REQUEST),
        (ALICE, RequiredAccess.NOTHING),
        (BOB, RequiredAccess.KEY),
        (ROOT, RequiredAccess.ADMIN),
        (ROOT, RequiredAccess.REQUEST),
    ]
    calls = [asyncio.create_task(call(*each)) for each in wanted]
    for _ in calls:
        await started.acquire()
    revocation.look()
    assert len(revocation) == 5
    write(file, KEYS[1], make_key("root", ROOT))
    revocation.look()
    await asyncio.wait((calls[0], calls[3]))
    go_on.set()
    assert await asyncio.gather(*calls) == ["Revoked", "went on", "went on", "NotPermitted", "went on"]
    assert len(revocation) == 0
    assert await call(ALICE, RequiredAccess.REQUEST) == "Revoked", (
        "a call that was admitted before and begins only now"
    )


async def test_a_calls_own_timeout_stays_a_timeout(file: Path) -> None:
    access = Access(str(file))
    caller = access.admit(RequiredAccess.KEY, f"Bearer {ALICE}", 0.0)
    with pytest.raises(TimeoutError):
        async with Revocation(access).watch(caller, RequiredAccess.KEY):
            raise TimeoutError
