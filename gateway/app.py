"""The gRPC server: both services, health and reflection on one port. The head opens it; everything inside runs on its loop."""

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..core.config import ClusterConfig
from ..core.errors import ConfigError
from ..engine.checkpoint import open_checkpoint, resolve_model_path
from ..proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from .admin import ClusterService
from .frontend import Frontend
from .generation import GenerationService, Shared
from .intake import ModelInfo
from .tokenizer import Tokenizer

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())


class GatewayServer:
    """A running server. It says NOT_SERVING to health checks until told otherwise; calls are answered all the same."""

    def __init__(self, server: grpc.aio.Server, port: int, admin: ClusterService) -> None:
        self.port = port
        self._server = server
        self._admin = admin
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._updates: set[asyncio.Task[None]] = set()

    async def _start(self) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._set_health(False)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._server.start()

    def set_serving(self, serving: bool) -> None:
        """What health checks are told from now on."""
        update = asyncio.get_running_loop().create_task(self._set_health(serving))
        self._updates.add(update)
        update.add_done_callback(self._updates.discard)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, give running ones `grace_s` to end, then end them; idempotent."""
        await self._health.enter_graceful_shutdown()
        await self._admin.close()
        await self._server.stop(grace_s)

    async def _set_health(self, serving: bool) -> None:
        kinds = health_pb2.HealthCheckResponse
        for service in ("", *SERVICES):
            await self._health.set(service, kinds.SERVING if serving else kinds.NOT_SERVING)


async def serve(
    frontend: Frontend, config: ClusterConfig, tokenizer: Tokenizer, model: ModelInfo, address: str | None = None
) -> GatewayServer:
    """Open `address`, by default `config.listen.grpc`. Raises ConfigError when it is taken."""
    address = address or config.listen.grpc
    max_bytes = config.limits.max_message_bytes
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", max_bytes),
            ("grpc.max_send_message_length", -1),  # answers have limits of their own
            ("grpc.so_reuseport", 0),  # else two servers could share a port without knowing
        ),
        maximum_concurrent_rpcs=config.limits.max_open_calls,
    )
    shared = Shared(config)
    admin = ClusterService(frontend, shared)
    pdserve_pb2_grpc.add_GenerationServicer_to_server(GenerationService(frontend, shared, tokenizer, model), server)
    pdserve_pb2_grpc.add_ClusterServicer_to_server(admin, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"listen.grpc: cannot listen on {address}: is the port in use?") from error
    gateway = GatewayServer(server, port, admin)
    await gateway._start()
    return gateway


async def open_door(frontend: Frontend, config: ClusterConfig, address: str | None = None) -> GatewayServer:
    """`serve` for the checkpoint that `config` names. Raises ConfigError or CheckpointError."""
    tokenizer, model = await asyncio.to_thread(_load, config)
    return await serve(frontend, config, tokenizer, model, address=address)


def _load(config: ClusterConfig) -> tuple[Tokenizer, ModelInfo]:
    path = resolve_model_path(config.model.path)
    return Tokenizer.load(path), model_info(config)


def model_info(config: ClusterConfig) -> ModelInfo:
    """What config and checkpoint say of the model that is served."""
    checkpoint = open_checkpoint(resolve_model_path(config.model.path))
    asked_len, asked_dtype = config.model.max_model_len, config.model.dtype
    return ModelInfo(
        name=config.model.name,
        architecture=checkpoint.config.architecture,
        dtype=checkpoint.dtype if asked_dtype == "auto" else asked_dtype,
        max_model_len=checkpoint.config.max_position_embeddings if asked_len == "auto" else asked_len,
        vocab_size=checkpoint.config.vocab_size,
        eos_token_ids=checkpoint.config.eos_token_ids,
    )
