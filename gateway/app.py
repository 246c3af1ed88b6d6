"""Both doors: the gRPC server with its services, health and reflection, and the HTTP server. The head opens them; everything
inside runs on its loop."""

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
from .generation import GenerationService
from .http.app import http_app
from .http.server import HttpServer
from .intake import ModelInfo
from .serving import Serving, Shared
from .tokenizer import Tokenizer

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())


class GatewayServer:
    """Running doors. gRPC says NOT_SERVING to health checks until told otherwise; calls are answered all the same."""

    def __init__(self, server: grpc.aio.Server, grpc_address: str, admin: ClusterService) -> None:
        self.grpc_address = grpc_address
        self.http_address: str | None = None
        self._server = server
        self._http: HttpServer | None = None
        self._admin = admin
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._updates: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """Of gRPC."""
        return int(self.grpc_address.rpartition(":")[2])

    async def _start(self, serving: Serving, http_address: str | None) -> None:
        limits = serving.shared.config.limits
        if http_address is not None:
            self._http = await HttpServer.open(http_app(serving), http_address, 2 * limits.max_open_calls)
            self.http_address = _with_port(http_address, self._http.port)
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
        async with asyncio.TaskGroup() as both:
            both.create_task(self._server.stop(grace_s))
            if self._http is not None:
                both.create_task(self._http.stop(grace_s))

    async def _set_health(self, serving: bool) -> None:
        kinds = health_pb2.HealthCheckResponse
        for service in ("", *SERVICES):
            await self._health.set(service, kinds.SERVING if serving else kinds.NOT_SERVING)


async def serve(
    frontend: Frontend,
    config: ClusterConfig,
    tokenizer: Tokenizer,
    model: ModelInfo,
    grpc_address: str | None = None,
    http_address: str | None = None,
) -> GatewayServer:
    """Open both doors, by default where `config.listen` says. Raises ConfigError when an address is taken."""
    grpc_address, http_address = grpc_address or config.listen.grpc, http_address or config.listen.http
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", config.limits.max_message_bytes),
            ("grpc.max_send_message_length", -1),  # answers have limits of their own
            ("grpc.so_reuseport", 0),  # else two servers could share a port without knowing
        ),
        maximum_concurrent_rpcs=config.limits.max_open_calls,
    )
    shared = Shared(config)
    admin = ClusterService(frontend, shared)
    serving = Serving(frontend, shared, tokenizer, model)
    pdserve_pb2_grpc.add_GenerationServicer_to_server(GenerationService(serving), server)
    pdserve_pb2_grpc.add_ClusterServicer_to_server(admin, server)
    try:
        port = server.add_insecure_port(grpc_address)
    except RuntimeError as error:
        raise ConfigError(f"listen.grpc: cannot listen on {grpc_address}: is the port in use?") from error
    gateway = GatewayServer(server, _with_port(grpc_address, port), admin)
    await gateway._start(serving, http_address)
    return gateway


def _with_port(address: str, port: int) -> str:
    """The address with the port that was found where it asks for a free one."""
    return f"{address.rpartition(':')[0]}:{port}"


async def open_door(
    frontend: Frontend, config: ClusterConfig, grpc_address: str | None = None, http_address: str | None = None
) -> GatewayServer:
    """`serve` for the checkpoint that `config` names. Raises ConfigError or CheckpointError."""
    tokenizer, model = await asyncio.to_thread(_load, config)
    return await serve(frontend, config, tokenizer, model, grpc_address, http_address)


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
