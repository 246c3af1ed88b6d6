"""The cluster as its operator describes it: the `metadata.pdserve` part of cluster.yaml, parsed once and never changed.

`core.config_file` reads it from a file; `engine.plan` says whether a machine can hold it. The docstring under a field
is also its description in the JSON schema.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .config_types import (
    AbsolutePath,
    AutoBlockSize,
    AutoPositiveInt,
    AutoSize,
    HostPort,
    expected,
    is_loopback,
    parse_host_port,
)
from .messages import Role

CPU_BLOCK_SIZE = 16
MAX_PROMPT_LOGPROBS = 1 << 18  # 15 bytes each: they go from worker to worker in the message that hands a request over

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelSection(_Part):
    """The model that is served."""

    path: str = Field(default="embedded", min_length=1)
    """A Hugging Face checkpoint directory, or `embedded` for the small model that comes with pdserve."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type that weights and KV are held in; auto: that of the checkpoint."""
    max_model_len: AutoPositiveInt = "auto"
    """Tokens of prompt and output together, at most; auto: as many positions as the model was made for."""
    served_name: str | None = Field(default=None, min_length=1)
    """The name by which clients ask for the model; by default the last part of `path`."""

    @property
    def name(self) -> str:
        return self.served_name or self.path.rstrip("/").rpartition("/")[2] or self.path


class PoolSection(_Part):
    """All instances of one role. An instance is one replica of the model."""

    instances: NotNegative = 1
    """How many instances; may be changed while the cluster runs."""
    devices_per_instance: Positive = 1
    """CPU cores (on GPU machines: GPUs) of one instance."""
    cpus_per_instance: PositiveFloat | None = None
    """Cores to reserve for one instance; a fraction such as 0.5 lets instances share a core. By default
    `devices_per_instance`."""
    threads: AutoPositiveInt = "auto"
    """Compute threads of one instance; auto: `devices_per_instance`."""
    max_batch_size: Positive = 256
    """Sequences in one step, at most."""
    max_batch_tokens: Positive = Field(default=2048, validate_default=True)
    """Tokens in one step, at most; longer prompts are prefilled in chunks of this size."""
    kv_cache_bytes: AutoSize = "auto"
    """Memory for the KV cache of one instance, as bytes or a size such as 512MiB; auto: by free memory."""

    @field_validator("max_batch_tokens")
    @classmethod
    def _holds_a_batch(cls, value: int, info: Any) -> int:
        max_batch_size = info.data.get("max_batch_size", 0)
        if value < max_batch_size:
            raise expected(f"at least max_batch_size ({max_batch_size}), as every sequence of a batch takes a token")
        return value

    @property
    def num_cpus(self) -> float:
        """Cores that one instance reserves."""
        return self.devices_per_instance if self.cpus_per_instance is None else self.cpus_per_instance

    @property
    def num_threads(self) -> int:
        return self.devices_per_instance if self.threads == "auto" else self.threads


class PoolsSection(_Part):
    """The two pools; the ratio of their instances is the prefill:decode ratio."""

    prefill: PoolSection = PoolSection()
    decode: PoolSection = PoolSection()

    @model_validator(mode="after")
    def _some_instance(self) -> "PoolsSection":
        if self.prefill.instances + self.decode.instances == 0:
            raise expected("at least one instance in prefill or decode", got="0 in each")
        return self

    def items(self) -> tuple[tuple[Role, PoolSection], ...]:
        return ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode))


class SloSection(_Part):
    """What latency counts as good: placement keeps to it, goodput is measured against it."""

    ttft_ms: PositiveFloat = 200.0
    """Time to the first token."""
    itl_ms: PositiveFloat = 50.0
    """Time between tokens."""


class KvSection(_Part):
    """The paged KV cache and its way from prefill to decode."""

    block_size: AutoBlockSize = "auto"
    """Tokens a block, a multiple of 8; auto: 16 on CPU."""
    transport: Literal["auto", "shm", "gloo", "cuda_ipc"] = "auto"
    """auto: within a GPU (cuda_ipc) between workers that share one, else shared memory between workers of one host, and gloo
    between hosts; the KV of GPUs goes through host memory there."""
    wire: Literal["raw", "int8"] = "raw"
    """The format of KV between workers. int8 takes about half of bfloat16's bytes, and rounds each head's keys, and values, to
    127 steps of the largest; on CPU, packing costs more than memory moves, so it is for slow networks."""

    @property
    def num_tokens_per_block(self) -> int:
        return CPU_BLOCK_SIZE if self.block_size == "auto" else self.block_size


class RoutingSection(_Part):
    """How requests are given to workers."""

    prefill_on_decode: Literal["auto", "never"] = "auto"
    """auto: a decode worker computes a prompt itself when that is predicted to be sooner, as for short or cached prompts."""


class LimitsSection(_Part):
    """What one client, or all of them together, may ask for."""

    max_queued_requests: Positive = 1024
    """Requests that wait for a worker; more are refused with a retry delay. One place in eight is kept for clients that
    have nothing waiting."""
    max_unread_tokens: Positive = 1024
    """Tokens that a client may leave unread beside what its connection holds; then its stream pauses and leaves the workers
    until the client has read half of them."""
    max_unread_s: PositiveFloat = 60.0
    """How long a client may leave its stream unread altogether; then the stream ends."""
    max_open_calls: Positive = 8192
    """Calls that each server works on; more are refused. Fixed while the cluster runs."""
    max_prompts: Positive = 64
    """Prompts of one HTTP request; a gRPC request has one."""
    max_prompt_tokens: Positive | None = None
    """Tokens of one prompt; by default only `max_model_len` limits it."""
    max_tokens: Positive = 4096
    """Output tokens of one choice."""
    max_n: Positive = 16
    """Choices of one request."""
    max_logprobs: NotNegative = 20
    """Alternatives reported beside each token."""
    max_prompt_logprobs: Annotated[int, Field(gt=0, le=MAX_PROMPT_LOGPROBS)] = 1 << 17
    """Log probabilities of prompt tokens that one request gets: tokens of the prompt, times alternatives and one."""
    max_logit_bias: NotNegative = 1024
    """Tokens whose logits one request shifts."""
    max_constraint_bytes: NotNegative = 1 << 16
    """Bytes of a JSON schema, regular expression or grammar that an output has to follow; 0: constraints are refused."""
    max_tools: NotNegative = 128
    """Tools that one request may offer to the model; 0: tools are refused."""
    max_tool_bytes: NotNegative = 1 << 18
    """Bytes of the JSON schemas of all tools of one request."""
    max_stop_strings: NotNegative = 16
    """Stop strings of one request."""
    max_message_bytes: Positive = 16 << 20
    """Bytes of one gRPC message, or of the body of an HTTP request; fixed while the cluster runs."""


class TlsSection(_Part):
    """TLS of what clients connect to; off without a certificate. Files that change are read again, without a restart."""

    certificate: AbsolutePath | None = None
    """The server's certificate and its intermediate ones (PEM)."""
    key: AbsolutePath | None = None
    """The certificate's private key (PEM, without a passphrase)."""
    client_ca: AbsolutePath | None = None
    """Certificates of the authorities that clients' certificates must come from (PEM); without it clients need none."""

    @model_validator(mode="after")
    def _whole(self) -> "TlsSection":
        if (self.certificate is None) != (self.key is None):
            raise expected("certificate and key together", got="one without the other")
        if self.client_ca is not None and self.certificate is None:
            raise expected("certificate and key beside client_ca", got="client_ca alone")
        return self

    @property
    def is_on(self) -> bool:
        return self.certificate is not None


class ListenSection(_Part):
    """Where clients connect, and by what they are let in. Other hosts reach only what is protected by TLS."""

    tls: TlsSection = TlsSection()
    api_keys: AbsolutePath | None = None
    """The file of the keys that clients must have, a line a key, as `pdserve key new` makes them; without it they need none."""
    allow_insecure: bool = False
    """Listen to other hosts without TLS, or without knowing clients: for a network that keeps strangers out by itself."""
    grpc: HostPort = "127.0.0.1:50051"
    """HOST:PORT of the gRPC server; port 0 takes a free one. Addresses other than loopback need `tls`, and `api_keys` or
    `tls.client_ca`; or `allow_insecure`."""
    http: HostPort | None = "127.0.0.1:8000"
    """HOST:PORT of the OpenAI-compatible HTTP server, protected in the same way; null: there is none."""

    @field_validator("grpc", "http")
    @classmethod
    def _protected(cls, value: str | None, info: Any) -> str | None:
        host, _ = parse_host_port(value) or ("127.0.0.1", 0)
        tls, api_keys = info.data.get("tls"), info.data.get("api_keys", "")  # missing when they are wrong themselves
        if is_loopback(host) or info.data.get("allow_insecure", True) or tls is None:
            return value
        if not tls.is_on:
            raise expected("a loopback address such as 127.0.0.1:50051, or listen.tls, or listen.allow_insecure: true")
        if api_keys is None and tls.client_ca is None:
            raise expected("listen.api_keys or listen.tls.client_ca, to know clients by, or listen.allow_insecure: true")
        return value

    @property
    def grpc_host_port(self) -> tuple[str, int]:
        return _host_port(self.grpc)

    @property
    def http_host_port(self) -> tuple[str, int] | None:
        return None if self.http is None else _host_port(self.http)


def _host_port(address: str) -> tuple[str, int]:
    host_port = parse_host_port(address)
    assert host_port is not None, address
    return host_port


class ObservabilitySection(_Part):
    """What is told of requests and processes. Metrics are always there."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: text where `pdserve up` writes to a terminal, else one JSON object a line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged; debug has a line for each request."""
    otlp_endpoint: str | None = Field(default=None, min_length=1)
    """Where traces go, over OTLP/gRPC, such as http://127.0.0.1:4317; by default the environment's OTEL_EXPORTER_OTLP_ENDPOINT.
    Without either there are no traces."""


class ClusterConfig(_Part):
    """One pdserve cluster. Every key has a default that works on a laptop with two cores."""

    model: ModelSection = ModelSection()
    pools: PoolsSection = PoolsSection()
    slo: SloSection = SloSection()
    kv: KvSection = KvSection()
    routing: RoutingSection = RoutingSection()
    limits: LimitsSection = LimitsSection()
    listen: ListenSection = ListenSection()
    observability: ObservabilitySection = ObservabilitySection()
    kernels: Literal["auto", "native", "torch"] = "auto"
    """Compute kernels: the compiled ones, or torch only; auto: the compiled ones where they are there."""
    device: Literal["auto", "cpu"] = "auto"
    """What instances compute on."""
    drain_timeout_s: PositiveFloat = 120.0
    """How long running requests may take to end when an instance is removed or the cluster stops."""

    def changes_needing_restart(self, new: "ClusterConfig") -> list[str]:
        """The keys in which `new` differs and that a running cluster cannot take over."""
        mine, theirs = dict(_leaves(self.model_dump())), dict(_leaves(new.model_dump()))
        return [key for key in mine if mine[key] != theirs[key] and not _changes_while_running(key)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _changes_while_running(key: str) -> bool:
    if key in ("limits.max_message_bytes", "limits.max_open_calls"):  # gRPC fixes them when the server starts
        return False
    return key in ("pools.prefill.instances", "pools.decode.instances") or key.startswith(("slo.", "routing.", "limits."))
