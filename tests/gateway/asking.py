"""Requests for tests, and the answers to them."""

from typing import Any, TypeAlias

from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc

Stub: TypeAlias = "pdserve_pb2_grpc.GenerationAsyncStub"


def ask(text: str = "hello", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=pb.Prompt(text=text), sampling=pb.SamplingParams(**sampling))


async def stream(stub: Stub, request: pb.GenerateRequest) -> list[pb.GenerateEvent]:
    return [event async for event in stub.GenerateStream(request)]


def text_of(events: list[pb.GenerateEvent], choice: int = 0) -> str:
    return "".join(
        event.tokens.text for event in events if event.HasField("tokens") and event.tokens.choice == choice
    )
