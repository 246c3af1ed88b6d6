"""The same request over both APIs, and the comparison of their refusals."""

import json
import re
from typing import Any, TypeAlias

import grpc
import httpx
import pytest

from pdserve.gateway.http.errors import STATUSES
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc

Stub: TypeAlias = "pdserve_pb2_grpc.GenerationAsyncStub"


async def over_http(http: httpx.AsyncClient, body: dict[str, Any], **headers: str) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    content = json.dumps(body)  # with NaN, which httpx would refuse to send
    return await http.post(path, content=content, headers={"content-type": "application/json"} | headers)


async def over_grpc(generation: Stub, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generation.Generate(request)
    return caught.value


GRPC_WORDS = re.compile(r"prompt[._]|constraint|client_id|token_ids")


def without_field(text: str) -> str:
    """Returns a refusal without the name of its first field, which may differ."""
    return text.partition(": ")[2] or text


def check_same(refusal: grpc.aio.AioRpcError, response: httpx.Response) -> None:
    error = response.json()["error"]
    assert without_field(error["message"]) == without_field(refusal.details() or "")
    assert error["param"] is None or (error["param"] and not GRPC_WORDS.match(error["param"]))
    assert response.status_code == STATUSES[refusal.code()]
