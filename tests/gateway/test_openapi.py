"""/openapi.json describes the HTTP server, and every request made from it, however wrong, gets a response
that it describes."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pdserve.core.status import WorkerState
from pdserve.gateway.app import GatewayServer, serve
from tests.gateway.conftest import CONFIG
from tests.gateway.support import ScriptedCluster, byte_level, model_info

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server on a separate thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> GatewayServer:
        cluster = ScriptedCluster(byte_level())
        cluster.change(
            workers=tuple(replace(worker, state=WorkerState.READY) for worker in cluster.state.workers)
        )
        return await serve(cluster, CONFIG, cluster.tokenizer, model_info(cluster.tokenizer))

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield f"http://{server.http_address}"
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def description(address: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_operation_answers_as_it_is_described(
    description: schemathesis.BaseSchema, mode: GenerationMode
) -> None:
    names = []
    for result in description.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # there is nothing to get wrong
        names.append(f"{operation.method.upper()} {operation.path}")

        @hypothesis.seed(1)
        @hypothesis.settings(
            max_examples=40, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, headers={"accept-encoding": "identity"})

        check()
    assert "POST /v1/chat/completions" in names
