"""The gRPC server with its services, health and reflection, and the HTTP server. The head starts both;
everything inside runs on its loop.

gRPC also listens on a Unix socket, for the process that launched the cluster: access to its folder is the
only credential."""

import asyncio
import gc
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..core.config import ClusterConfig
from ..core.config_types import is_loopback
from ..core.errors import ConfigError
from ..core.held_bytes import HeldBytes
from ..engine.checkpoint import open_checkpoint, resolve_model_path
from ..engine.generation_config import default_sampling
from ..grammar.checker import GrammarChecker
from ..grammar.messages import GrammarSetup
from ..proto import pdserve_pb2 as pb, pdserve_pb2_grpc
from .auth.access import Access
from .auth.revocation import Revocation
from .auth.tls import ServerTls
from .connections import GrpcConnections, connections_of_each, raise_descriptor_limit
from .constraint import Constraints
from .frontend import Frontend
from .grpc.admin import ClusterService
from .grpc.auth_interceptor import AuthInterceptor, CallBounds
from .grpc.generation import GenerationService
from .http.app import http_app
from .http.hosts import AllowedHosts
from .http.server import HttpServer
from .intake import ModelInfo
from .offload.offload import Offload
from .serving import Serving, Shared
from .text.tokenizer import Tokenizer

HANDSHAKE_TIMEOUT_MS = 10_000  # for TLS, and for the first bytes of HTTP/2
# a connection silent for this long is pinged, and closed after the same time without an answer
KEEPALIVE_MS = 60_000
IDLE_MS = 900_000  # a connection without a call for this long is closed; clients reconnect by themselves
LOOKAHEAD_BYTES = 64 << 10
MAX_STREAMS = 1000  # concurrent, per connection; clients queue more on their side
MAX_PENDING_CALLS = 1000
MAX_REFUSALS = 1024  # calls that are being refused
SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())


class GatewayServer:
    """The running servers. gRPC health checks report NOT_SERVING until `set_serving`; calls are answered all
    the same."""

    def __init__(
        self,
        servers: Sequence[grpc.aio.Server],
        connections: GrpcConnections,
        grpc_address: str,
        admin: ClusterService,
        http: HttpServer | None,
        grammars: GrammarChecker,
        offload: Offload,
        revocation: Revocation,
    ) -> None:
        self.grpc_address = grpc_address
        self.http_address = None if http is None else http.address
        self._servers = servers
        self._connections = connections
        self._http = http
        self._admin = admin
        self._grammars = grammars
        self.offload = offload
        self._revocation = revocation
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._updates: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The gRPC port."""
        return int(self.grpc_address.rpartition(":")[2])

    async def _start(self) -> None:
        await self._set_health(False)
        self._revocation.start()
        for server in self._servers:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            reflection.enable_server_reflection(
                (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
            )
            await server.start()
        self._connections.start(self.port)

    def set_serving(self, serving: bool) -> None:
        """Sets the status that health checks report from now on."""
        update = asyncio.get_running_loop().create_task(self._set_health(serving))
        self._updates.add(update)
        update.add_done_callback(self._updates.discard)

    async def stop(self, grace_s: float) -> None:
        """Accepts no new calls, gives running ones `grace_s` to end, then ends them; idempotent."""
        self._connections.stop()
        await self._health.enter_graceful_shutdown()
        await self._admin.close()
        stopping = [server.stop(grace_s) for server in self._servers]
        if self._http is not None:
            stopping.append(self._http.stop(grace_s))
        await asyncio.gather(*stopping)
        self._revocation.stop()
        await self._grammars.stop()
        await self.offload.stop()

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
    local: str | None = None,
) -> GatewayServer:
    """Starts both servers, by default at the addresses in `config.listen`, and the Unix socket `local` if
    given. Raises ConfigError if an address is in use or TLS or key files are invalid."""
    address, http_address = grpc_address or config.listen.grpc, http_address or config.listen.http
    tls = ServerTls(config.listen.tls) if config.listen.tls.is_on else None
    access = Access(config.listen.api_keys) if config.listen.api_keys else None
    shared = Shared(config, access)
    admin = ClusterService(frontend, shared)
    grammars = GrammarChecker(
        lambda: GrammarSetup(tokenizer.to_json(), model.vocab_size, model.eos_token_ids)
    )
    offload = Offload(tokenizer, model.name, model.max_model_len)
    serving = Serving(frontend, shared, tokenizer, model, Constraints(grammars), offload)
    generation = GenerationService(serving)
    max_connections = connections_of_each(config.limits.max_connections, raise_descriptor_limit())
    connections = GrpcConnections(max_connections)
    bounds = CallBounds(config.limits, shared.held_bytes, shared.held_answers, connections)
    offers_admin = access is not None or config.listen.admin_without_key
    servers = [
        _server(
            config,
            generation,
            admin,
            AuthInterceptor(access, bounds, shared.revocation, serving.message, offers_admin),
        )
    ]
    if (
        local is not None
    ):  # separate bounds: whatever remote clients do, the operator of the cluster gets through
        own = CallBounds(
            config.limits,
            HeldBytes(config.limits.max_held_bytes),
            HeldBytes(config.limits.max_held_bytes, "answers"),
            GrpcConnections(max_connections),
        )
        servers.append(
            _server(
                config,
                generation,
                admin,
                AuthInterceptor(None, own, shared.revocation, serving.message, offers_admin=True),
            )
        )
    try:
        port = (
            servers[0].add_secure_port(address, tls.grpc_credentials())
            if tls
            else servers[0].add_insecure_port(address)
        )
    except RuntimeError as error:
        raise ConfigError(f"listen.grpc: cannot listen on {address}: is the port in use?") from error
    if local is not None:
        servers[1].add_insecure_port(local)
    http = None
    if http_address is not None:
        hosts = None
        if access is None and is_loopback(http_address.rpartition(":")[0].strip("[]")):
            hosts = AllowedHosts(config.listen.allowed_hosts)
        http = await HttpServer.open(http_app(serving, hosts), http_address, max_connections, tls)
    shown = f"{address.rpartition(':')[0]}:{port}"
    gateway = GatewayServer(servers, connections, shown, admin, http, grammars, offload, shared.revocation)
    await gateway._start()
    return gateway


def _server(
    config: ClusterConfig, generation: GenerationService, admin: ClusterService, interceptor: AuthInterceptor
) -> grpc.aio.Server:
    server = grpc.aio.server(
        interceptors=(interceptor,),
        options=(
            ("grpc.max_receive_message_length", config.limits.max_message_bytes),
            ("grpc.max_send_message_length", -1),  # responses have limits of their own
            ("grpc.so_reuseport", 0),  # else two servers could share a port unnoticed
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
            ("grpc.max_connection_idle_ms", IDLE_MS),
            (
                "grpc.max_concurrent_streams",
                MAX_STREAMS,
            ),  # the library holds the headers of each, refused ones included
            # calls waiting for the loop, with their headers; the library refuses more
            ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
            ("grpc.max_allowed_incoming_connections", interceptor.bounds.connections.max_accepted),
            # a stream that is not being read may receive at most this; by default gRPC would raise it with
            # the bandwidth
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
        ),
        # the interceptor's bounds are lower, and are kept per client
        maximum_concurrent_rpcs=2 * config.limits.max_open_calls + MAX_REFUSALS,
    )
    pdserve_pb2_grpc.add_GenerationServicer_to_server(generation, server)
    pdserve_pb2_grpc.add_ClusterServicer_to_server(admin, server)
    return server


async def open_gateway(
    frontend: Frontend,
    config: ClusterConfig,
    grpc_address: str | None = None,
    http_address: str | None = None,
    local: str | None = None,
) -> GatewayServer:
    """Calls `serve` for the checkpoint that `config` names. Raises ConfigError or CheckpointError."""
    tokenizer, model = await asyncio.to_thread(_load, config)
    gateway = await serve(frontend, config, tokenizer, model, grpc_address, http_address, local)
    gateway.offload.start()
    gc.collect()
    # these objects are permanent: a full collection would traverse them for 60 ms while streams wait
    gc.freeze()
    return gateway


def _load(config: ClusterConfig) -> tuple[Tokenizer, ModelInfo]:
    path = resolve_model_path(config.model.path)
    return Tokenizer.load(path), model_info(config)


def model_info(config: ClusterConfig) -> ModelInfo:
    """Describes the served model, from the configuration and the checkpoint."""
    checkpoint = open_checkpoint(resolve_model_path(config.model.path))
    asked_len, asked_dtype = config.model.max_model_len, config.model.dtype
    return ModelInfo(
        name=config.model.name,
        architecture=checkpoint.config.architecture,
        dtype=checkpoint.dtype if asked_dtype == "auto" else asked_dtype,
        max_model_len=checkpoint.config.max_position_embeddings if asked_len == "auto" else asked_len,
        vocab_size=checkpoint.config.vocab_size,
        eos_token_ids=checkpoint.config.eos_token_ids,
        default_sampling=default_sampling(config.model),
    )
