"""Both servers, in front of a model that calls tools."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import cast

import openai
import pytest

from pdserve.gateway.app import GatewayServer, serve
from tests.gateway.conftest import CONFIG
from tests.gateway.support import Built, ScriptedCluster, byte_level, model_info
from tests.gateway.tools.asking import CALLS, saying
from tests.gateway.tools.models import eos_of


@pytest.fixture
def model() -> str:
    return "qwen"


@pytest.fixture
def cluster(model: str) -> ScriptedCluster:
    """Answers with two calls."""
    return ScriptedCluster(byte_level()) if model == "without tools" else saying(model, CALLS, "Let me see.")


@pytest.fixture
async def server(cluster: ScriptedCluster) -> AsyncIterator[GatewayServer]:
    info = replace(
        model_info(cluster.tokenizer),
        max_model_len=2048,
        eos_token_ids=(eos_of(cast(Built, cluster.tokenizer)),),
    )
    config = CONFIG.model_copy(update={"limits": CONFIG.limits.model_copy(update={"max_tool_bytes": 20_000})})
    gateway = await serve(cluster, config, cluster.tokenizer, info)
    yield gateway
    await gateway.stop(0)


@pytest.fixture
async def client(server: GatewayServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=0
    ) as client:
        yield client
