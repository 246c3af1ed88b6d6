"""Cached prefixes belong to their sender: the prompts of one key show in no answer to another."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, strategies as st

from pdserve.core.config import ClusterConfig
from pdserve.core.hashing import block_hashes
from pdserve.core.request import Request
from pdserve.gateway.app import GatewayServer, serve
from pdserve.gateway.auth.access import Caller, cache_scope, scoped_salt
from pdserve.gateway.auth.keys import ApiKey, make_key, new_key
from pdserve.gateway.frontend import StreamEvent
from pdserve.proto import pdserve_pb2 as pb
from pdserve.router.events import EmitEnd, Timeline
from tests.deadlines import WAIT_S
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, byte_level, model_info

BLOCK = 4
ALICE, ALICES_OTHER, BOB, CAROL = (new_key() for _ in range(4))
KEYS = (
    make_key("alice", ALICE, group="lab"),
    make_key("alice", ALICES_OTHER, group="lab"),
    make_key("bob", BOB, group="lab"),
    make_key("carol", CAROL),
)
SECRET = "the quick brown fox jumps over the lazy dog and then the dog sleeps"


class CachingCluster(ScriptedCluster):
    """Remembers the blocks of prompts as workers do, and counts those that it finds again."""

    def __init__(self) -> None:
        super().__init__(byte_level())
        self._blocks: set[bytes] = set()

    async def generate(self, request: Request) -> AsyncGenerator[StreamEvent, None]:
        hashes = block_hashes(request.prompt_token_ids, BLOCK, request.cache_salt)
        num_cached = BLOCK * sum(block in self._blocks for block in hashes)
        self._blocks |= set(hashes)
        async for event in super().generate(request):
            yield self._accounted(event, num_cached) if isinstance(event, EmitEnd) else event

    def _accounted(self, end: EmitEnd, num_cached: int) -> EmitEnd:
        timeline: Timeline = end.timeline
        (dispatch,) = timeline.dispatches
        assert dispatch.prefill is not None
        prefill = _changed(dispatch.prefill, num_cached_tokens=num_cached)
        dispatch = _changed(dispatch, prefill=prefill, expected_cached_tokens=num_cached)
        accounted: EmitEnd = _changed(end, timeline=_changed(timeline, dispatches=(dispatch,)))
        return accounted


def _changed(value: Any, **changes: Any) -> Any:
    return (
        msgspec.structs.replace(value, **changes)
        if isinstance(value, msgspec.Struct)
        else replace(value, **changes)
    )


@pytest.fixture
def cluster() -> ScriptedCluster:
    return CachingCluster()


@pytest.fixture
def sharing() -> str | None:
    """None: the default."""
    return None


@pytest.fixture
async def server(
    cluster: ScriptedCluster, tmp_path: Path, sharing: str | None
) -> AsyncIterator[GatewayServer]:
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text("".join(f"{key.line}\n" for key in KEYS))
    settings = CONFIG.model_dump()
    settings["listen"]["api_keys"] = str(path)
    if sharing is not None:
        settings["kv"]["cache_sharing"] = sharing
    config = ClusterConfig.model_validate(settings)
    gateway = await serve(
        cluster, config, cluster.tokenizer, model_info(cluster.tokenizer), local=f"unix:{tmp_path}/local"
    )
    yield gateway
    await gateway.stop(0)


@dataclass
class Asker:
    """Queries both servers, and returns everything that responses reveal about cached tokens."""

    generation: Any
    http: httpx.AsyncClient

    async def over_grpc(self, key: str, text: str = SECRET, salt: str = "") -> int:
        message = pb.GenerateRequest(
            prompt=pb.Prompt(text=text), sampling=pb.SamplingParams(max_tokens=1), cache_salt=salt
        )
        answer = await self.generation.Generate(message, metadata=(("authorization", f"Bearer {key}"),))
        (attempt,) = answer.timeline.attempts
        assert attempt.prefill.num_cached_tokens == answer.usage.cached_tokens
        return int(answer.usage.cached_tokens)

    async def over_http(self, key: str, text: str = SECRET, salt: str = "") -> int:
        body = {"prompt": text, "max_tokens": 1, "cache_salt": salt}
        answer = await self.http.post(
            "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
        )
        details = json.loads(answer.text)["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"])


@pytest.fixture
async def ask(server: GatewayServer, generation: Any) -> AsyncIterator[Asker]:
    async with httpx.AsyncClient(
        base_url=f"http://{server.http_address}", trust_env=False, timeout=WAIT_S
    ) as http:
        yield Asker(generation, http)


async def test_a_key_hits_only_its_own_cached_prompts(ask: Asker) -> None:
    assert await ask.over_grpc(ALICE) == 0
    for other in (BOB, CAROL):
        assert await ask.over_grpc(other) == 0
    assert await ask.over_http(ALICE) > 0
    assert await ask.over_grpc(ALICES_OTHER) > 0, "two keys of one name are one client"


async def test_a_key_learns_nothing_of_anothers_prompt_over_http(ask: Asker) -> None:
    assert await ask.over_http(ALICE) == 0
    for other in (BOB, CAROL):
        assert await ask.over_http(other) == 0
    assert await ask.over_http(ALICE) > 0


@pytest.mark.parametrize(
    "salt", ["key:alice/", "alice/", "/key:alice/", "key:alice", "all/", "group:lab/", "../key:alice/"]
)
async def test_no_clients_salt_reaches_anothers_prefixes(ask: Asker, salt: str) -> None:
    await ask.over_grpc(ALICE)
    assert await ask.over_grpc(BOB, salt=salt) == 0
    assert await ask.over_http(CAROL, salt=salt) == 0


async def test_a_clients_salt_still_separates_its_own_requests(ask: Asker) -> None:
    assert await ask.over_grpc(ALICE, salt="a") == 0
    assert await ask.over_grpc(ALICE, salt="b") == 0
    assert await ask.over_grpc(ALICE, salt="a") > 0


@pytest.mark.parametrize("sharing", ["group"])
async def test_keys_of_one_group_share_and_those_without_are_alone(ask: Asker) -> None:
    assert await ask.over_grpc(ALICE) == 0
    assert await ask.over_grpc(BOB) > 0
    assert await ask.over_http(CAROL) == 0
    assert await ask.over_http(CAROL) > 0


@pytest.mark.parametrize("sharing", ["all"])
async def test_all_keys_share_if_configured(ask: Asker) -> None:
    assert await ask.over_grpc(ALICE) == 0
    assert await ask.over_http(BOB) > 0
    assert await ask.over_grpc(CAROL) > 0


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
CALLERS = st.builds(lambda name, group: Caller(ApiKey(name, b"", group=group)), NAMES, st.none() | NAMES)


@given(
    st.none() | CALLERS,
    st.none() | CALLERS,
    st.text(max_size=20),
    st.text(max_size=20),
    st.sampled_from(["key", "group", "all"]),
)
def test_internal_salts_are_equal_only_if_scope_and_salt_are(
    one: Caller | None, other: Caller | None, salt: str, other_salt: str, sharing: Any
) -> None:
    scopes = cache_scope(one, sharing), cache_scope(other, sharing)
    is_same = scopes[0] == scopes[1] and salt == other_salt
    assert (scoped_salt(scopes[0], salt) == scoped_salt(scopes[1], other_salt)) is is_same
