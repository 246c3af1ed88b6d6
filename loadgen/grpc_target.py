"""pdserve's gRPC server as a target. Its streams end with a timeline, from which the legs of TTFT come."""

import grpc

from ..proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc
from .errors import LoadRequestFailed
from .records import CompletedRequest, Legs
from .target import LoadRequest, ModelFacts, OnTokens

_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class GrpcTarget:
    """All requests share one connection: with TLS, if there are credentials for it."""

    def __init__(
        self,
        address: str,
        model: str = "",
        api_key: str = "",
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self._shown = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._stub: rpc.GenerationAsyncStub = rpc.GenerationStub(self._channel)
        self._model = model

    async def facts(self) -> ModelFacts:
        try:
            info = await self._stub.GetModelInfo(
                pb.GetModelInfoRequest(model=self._model), metadata=self._shown
            )
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error
        return ModelFacts(
            info.name, info.vocab_size or None, info.max_model_len or None, tuple(info.eos_token_ids)
        )

    async def send(self, request: LoadRequest, on_tokens: OnTokens) -> CompletedRequest:
        sampling = pb.SamplingParams(
            max_tokens=request.max_tokens, temperature=request.temperature, ignore_eos=request.ignore_eos
        )
        prompt = pb.Prompt(token_ids=pb.TokenIds(ids=request.token_ids))
        message = pb.GenerateRequest(model=self._model, prompt=prompt, sampling=sampling)
        end: pb.RequestEnd | None = None
        try:
            async for event in self._stub.GenerateStream(message, metadata=self._shown):
                if event.HasField("tokens") and event.tokens.token_ids:
                    on_tokens(len(event.tokens.token_ids))
                elif event.HasField("end"):
                    end = event.end
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from error
        if end is None:
            raise LoadRequestFailed("cut off", "the stream ended without its ending")
        usage = end.usage
        return CompletedRequest(
            usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, legs_of(end.timeline)
        )

    async def close(self) -> None:
        await self._channel.close(None)


def _failed(error: grpc.aio.AioRpcError) -> LoadRequestFailed:
    return LoadRequestFailed(error.code().name.lower().replace("_", " "), error.details() or "")


def legs_of(timeline: pb.Timeline) -> Legs | None:
    """The legs of the attempt that produced the first token; None when none did."""
    attempt = next((attempt for attempt in timeline.attempts if attempt.HasField("first_token_s")), None)
    if attempt is None:
        return None
    prefill, transfer = attempt.prefill, attempt.transfer if attempt.HasField("transfer") else None
    return Legs(
        queue_s=attempt.dispatched_s,
        worker_queue_s=prefill.queue_s if prefill.HasField("queue_s") else None,
        prefill_s=prefill.compute_s if prefill.HasField("compute_s") else None,
        first_token_s=attempt.first_token_s,
        transfer_s=None if transfer is None else transfer.duration_s,
        exposed_s=None if transfer is None else transfer.exposed_s,
    )
