"""The operator's description of the cluster: the `metadata.pdserve` part of cluster.yaml, parsed once and
immutable.

`core.config_file` reads it from a file; `planner.plan` decides whether a machine can hold it. The docstring
under a field is also its description in the JSON schema."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from .config_listen import ListenSection
from .config_types import (
    MAX_INSTANCES as MAX_INSTANCES,
    AutoBlockSize,
    AutoPositiveInt,
    AutoSize,
    ConfigSection,
    Dtype,
    InstanceRange,
    Instances,
    expected,
)
from .devices import DeviceKind, KernelChoice
from .hosts import ExpectedHosts
from .messages import Role

BLOCK_SIZES = {"cpu": 16, "cuda": 64}
# 15 bytes each: they go from worker to worker in the message that hands a request over
MAX_PROMPT_LOGPROBS = 1 << 18

LEAST_HORIZON_S = 10.0  # of the planner

_NUMBERS_OF_RANKS = (1, 2, 4, 8)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class ModelSection(ConfigSection):
    """The model that is served."""

    path: str = Field(default="embedded", min_length=1)
    """A Hugging Face checkpoint directory, a GGUF file, or `embedded` for the small model that comes with
    pdserve."""
    dtype: Dtype = "auto"
    """The type that weights and KV are held in (bf16, fp16 and fp32 for short); auto: that of the checkpoint,
    and float32 for a GGUF file of quantised weights, which holds their exact values."""
    max_model_len: AutoPositiveInt = "auto"
    """Tokens of prompt and output together, at most; auto: as many positions as the model was made for."""
    generation_config: Literal["auto", "none"] = "auto"
    """Whether the sampling defaults of the checkpoint's generation_config.json (temperature, top_k, top_p,
    min_p, repetition_penalty) apply to requests that leave these fields unset (auto, where there is such a
    file), or those of OpenAI's interface alone (none)."""
    served_name: str | None = Field(default=None, min_length=1)
    """The name by which clients ask for the model; by default the last part of `path`, without `.gguf`."""

    @property
    def name(self) -> str:
        return self.served_name or self.path.rstrip("/").rpartition("/")[2].removesuffix(".gguf") or self.path


class PoolSection(ConfigSection):
    """All instances of one role. An instance is one replica of the model."""

    instances: Instances = 1
    """How many instances, at most 4,096; may be changed while the cluster runs. Or a range for `planner` to
    choose from, such as {min: 1, max: 4}; `start`, by default `min`, is how many the cluster starts with."""
    tensor_parallel: Literal[1, 2, 4, 8] = 1
    """Ranks of one instance: processes on one host that compute each layer together, each with its part of
    the weights and of the KV heads. On GPUs 1."""
    devices_per_instance: Positive = 1
    """CPU cores of one instance, divided among its ranks; by default one for each rank. On GPUs 1, as an
    instance computes on one."""
    gpus_per_instance: Share | None = None
    """On GPUs: how much of its GPU one instance takes; a fraction such as 0.5 lets instances share one. By
    default 1."""
    cpus_per_instance: PositiveFloat | None = None
    """Cores to reserve for one instance; a fraction such as 0.5 lets instances share a core. By default
    `devices_per_instance`. On GPUs these are the cores of the instance's host process."""
    threads: AutoPositiveInt = "auto"
    """Compute threads of one instance, divided among its ranks; auto: `devices_per_instance`."""
    max_batch_size: Positive = 256
    """Sequences in one step, at most."""
    max_batch_tokens: Positive = Field(default=2048, validate_default=True)
    """Tokens in one step, at most; longer prompts are prefilled in chunks of this size."""
    kv_cache_bytes: AutoSize = "auto"
    """Memory for the KV cache of one instance, as bytes or a size such as 512MiB or 4GB; auto: by free
    memory, on GPUs what the instance's share of the GPU leaves."""

    @model_validator(mode="before")
    @classmethod
    def _a_core_for_each_rank(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "devices_per_instance" not in values:
            num_ranks = values.get("tensor_parallel")
            if num_ranks in _NUMBERS_OF_RANKS and not isinstance(num_ranks, bool):
                return {**values, "devices_per_instance": num_ranks}
        return values

    @field_validator("devices_per_instance", "threads")
    @classmethod
    def _divides_among_ranks(cls, value: int | Literal["auto"], info: Any) -> int | Literal["auto"]:
        num_ranks = info.data.get("tensor_parallel", 1)
        if value != "auto" and value % num_ranks:
            raise expected(f"a multiple of tensor_parallel ({num_ranks})")
        return value

    @field_validator("max_batch_tokens")
    @classmethod
    def _holds_a_batch(cls, value: int, info: Any) -> int:
        max_batch_size = info.data.get("max_batch_size", 0)
        if value < max_batch_size:
            raise expected(
                f"at least max_batch_size ({max_batch_size}), as every sequence of a batch takes a token"
            )
        return value

    @property
    def num_instances(self) -> int:
        """The number of instances in force."""
        return self.instances if isinstance(self.instances, int) else self.instances.start

    @property
    def allowed_instances(self) -> InstanceRange:
        """The numbers that a planner, or an operator who scales, may choose; a number alone binds the planner
        only."""
        if isinstance(self.instances, int):
            return InstanceRange(self.instances, self.instances, self.instances)
        return self.instances

    def with_instances(self, num_instances: int) -> "PoolSection":
        """Returns a copy with another number in force; a range stays as it is."""
        if isinstance(self.instances, int):
            return self.model_copy(update={"instances": num_instances})
        return self.model_copy(update={"instances": replace(self.instances, start=num_instances)})

    @property
    def num_cpus(self) -> float:
        """The cores that one instance reserves."""
        return self.devices_per_instance if self.cpus_per_instance is None else self.cpus_per_instance

    @property
    def num_host_cores(self) -> int:
        """Cores that an instance on a GPU runs on."""
        return ceil(self.num_cpus)

    @property
    def gpu_share(self) -> float:
        """The share of its GPU that one instance takes, where it computes on one."""
        return 1.0 if self.gpus_per_instance is None else self.gpus_per_instance

    @property
    def num_threads(self) -> int:
        return self.devices_per_instance if self.threads == "auto" else self.threads

    @property
    def num_threads_per_rank(self) -> int:
        return self.num_threads // self.tensor_parallel


class PoolsSection(ConfigSection):
    """The two pools; the ratio of their instances is the prefill:decode ratio."""

    prefill: PoolSection = PoolSection()
    decode: PoolSection = PoolSection()

    @model_validator(mode="after")
    def _some_instance(self) -> "PoolsSection":
        if self.prefill.num_instances + self.decode.num_instances == 0:
            raise expected("at least one instance in prefill or decode", got="0 in each")
        return self

    def items(self) -> tuple[tuple[Role, PoolSection], ...]:
        return ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode))

    def sized(self, sizes: Mapping[Role, int]) -> "PoolsSection":
        """Returns a copy with other numbers of instances in force."""
        return self.model_copy(
            update={role.value: pool.with_instances(sizes[role]) for role, pool in self.items()}
        )


class SloSection(ConfigSection):
    """The latency objectives: placement keeps to them, goodput is measured against them."""

    ttft_ms: PositiveFloat = 200.0
    """Time to the first token."""
    itl_ms: PositiveFloat = 50.0
    """Time between tokens."""
    enforce: bool = False
    """Refuse a request, with a retry delay, for which every worker is predicted to exceed `itl_ms`. By
    default it is served nevertheless, where the excess is least."""


class KvSection(ConfigSection):
    """The paged KV cache and its transfer from prefill to decode."""

    block_size: AutoBlockSize = "auto"
    """Tokens a block, a multiple of 8; auto: 16 on CPU, 64 on GPUs."""
    transport: Literal["auto", "shm", "gloo", "cuda_ipc", "nccl"] = "auto"
    """auto: within the GPU (cuda_ipc) between workers that share one, nccl between two GPUs, else shared
    memory within a host and gloo between hosts; the KV of GPUs goes through host memory there."""
    wire: Literal["raw", "int8"] = "raw"
    """The format of KV between workers. int8 takes about half of bfloat16's bytes, and rounds each head's
    keys, and values, to 127 steps of the largest; on CPU, packing costs more than memory moves, so it is for
    slow networks."""
    cache_sharing: Literal["key", "group", "all"] = "key"
    """Whose requests may use each other's cached prefixes: those of keys of one name (key), of one `group=`
    in the file of keys (group), or all. Who shares can find out, by `usage` and by time, whether another sent
    the same beginning. Without keys all share. May be changed while the cluster runs."""

    def num_tokens_per_block(self, device: DeviceKind) -> int:
        return BLOCK_SIZES[device] if self.block_size == "auto" else self.block_size


class RoutingSection(ConfigSection):
    """How requests are assigned to workers."""

    prefill_on_decode: Literal["auto", "never"] = "auto"
    """auto: a decode worker computes a prompt itself when that is predicted to be sooner, as for short or
    cached prompts."""


class LimitsSection(ConfigSection):
    """The limits on one client's requests, and on those of all clients together."""

    max_queued_requests: Positive = 1024
    """Requests that wait for a worker; more are refused with a retry delay. One place in eight is kept for
    clients that have nothing waiting."""
    max_running_per_client: Positive | None = None
    """Choices of one client that workers hold at a time; its other requests wait, and those of others pass.
    By default as many as there is room for."""
    max_wait_for_worker_s: PositiveFloat = 300.0
    """How long a request waits while workers start or are replaced and none of the others could ever serve
    it, or may, as it is likely to end the last one's process; then it ends with UNAVAILABLE."""
    max_unread_tokens: Positive = 1024
    """Tokens that a client may leave unread beside what its connection holds; then its stream pauses and
    leaves the workers until the client has read half of them."""
    max_unread_s: PositiveFloat = 60.0
    """How long a client may leave its stream unread altogether; then the stream ends."""
    max_open_calls: Positive = 8192
    """Calls that each server works on, of one client half at most, and less the more others have; more are
    refused. Fixed while the cluster runs."""
    max_connections: Annotated[int, Field(ge=16)] = 4096
    """Connections that each server holds, half of them from one address; a newcomer takes the place of the
    oldest that has no call, or of an address with more than its part in use. Fewer where the process may not
    open so many descriptors. Fixed while the cluster runs."""
    max_held_bytes: Annotated[int, Field(ge=1 << 20)] = 512 << 20
    """Bytes of messages and bodies that are being received or worked on, of one client a quarter at most, and
    less the more others hold; more are refused. As many again of answers that wait to be complete or to be
    read. At least 8 messages of `max_message_bytes`. Fixed while the cluster runs."""
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
    """Log probabilities of prompt tokens that one request gets: tokens of the prompt, times alternatives and
    one."""
    max_logit_bias: NotNegative = 1024
    """Tokens whose logits one request shifts."""
    max_constraint_bytes: NotNegative = 1 << 16
    """Bytes of a JSON schema, regular expression or grammar that an output has to follow; 0: constraints are
    refused."""
    max_tools: NotNegative = 128
    """Tools that one request may offer to the model; 0: tools are refused."""
    max_tool_bytes: NotNegative = 1 << 18
    """Bytes of the JSON schemas of all tools of one request."""
    max_stop_strings: NotNegative = 16
    """Stop strings of one request."""
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    """How an HTTP body with unknown fields is handled: refuse names them; ignore, as in vLLM, serves the rest
    of the request."""
    max_message_bytes: Positive = 16 << 20
    """Bytes of one gRPC message, or of the body of an HTTP request; fixed while the cluster runs."""

    @model_validator(mode="after")
    def _one_client_may_send_a_message(self) -> "LimitsSection":
        if self.max_held_bytes < 8 * self.max_message_bytes:
            got = f"{self.max_held_bytes} beside max_message_bytes: {self.max_message_bytes}"
            raise expected("max_held_bytes of at least 8 times max_message_bytes", got=got)
        return self


class PlannerSection(ConfigSection):
    """The planner, which chooses the ratio of pools whose `instances` are ranges."""

    mode: Literal["off", "advise", "auto"] = "off"
    """advise: report which ratio is best, and change nothing; auto: change to it."""
    horizon_s: Annotated[float, Field(ge=LEAST_HORIZON_S, le=86_400.0)] = 120.0
    """How far a change has to pay for itself, and how much of the past it rests on: at least 10 s, as a flip
    takes up to one and has to be checked."""
    objective: Literal["goodput", "cost"] = "goodput"
    """goodput: requests per second within the objectives of `slo`; cost: the same, where an instance counts
    as much as 3 % of the requests."""


class ObservabilitySection(ConfigSection):
    """The logs and traces of requests and processes. Metrics are always there."""

    log_format: Literal["auto", "json", "console"] = "auto"
    """auto: text where `pdserve up` writes to a terminal, else one JSON object a line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    request_lines_per_s: float = Field(default=10.0, ge=0.0, le=10_000.0)
    """At most so many lines a second, at level info, each about one request at its end; a line states how
    many requests before it got none. 0: only those that went wrong. Prompts and outputs are never logged."""
    otlp_endpoint: str | None = Field(default=None, min_length=1)
    """Where traces go, over OTLP/gRPC, such as http://127.0.0.1:4317; by default the environment's
    OTEL_EXPORTER_OTLP_ENDPOINT. Without either there are no traces."""


class ClusterConfig(ConfigSection):
    """One pdserve cluster. Every key has a default that works on a laptop with two cores."""

    model: ModelSection = ModelSection()
    pools: PoolsSection = PoolsSection()
    slo: SloSection = SloSection()
    kv: KvSection = KvSection()
    routing: RoutingSection = RoutingSection()
    limits: LimitsSection = LimitsSection()
    listen: ListenSection = ListenSection()
    planner: PlannerSection = PlannerSection()
    observability: ObservabilitySection = ObservabilitySection()
    kernels: KernelChoice = "auto"
    """Compute kernels: on CPU the compiled ones (native: the fastest kind that the processor runs; or one
    kind by name, which then every worker has to run, so that all compute the same bits), or torch only; on
    GPUs triton. auto: native where it is there, and triton."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device that instances compute on; auto: GPUs where the cluster has some that torch can use, else
    CPU. Decided when the cluster starts."""
    drain_timeout_s: PositiveFloat = 120.0
    """How long running requests may take to end when an instance is removed or the cluster stops."""
    join_timeout_s: PositiveFloat = 300.0
    """How long each host that `provider` names may take to join before it is reported as late. The cluster
    serves on those that are there from the start, and on each other one from when it joins, however late. May
    be changed while it runs."""
    _hosts: ExpectedHosts = PrivateAttr(default_factory=ExpectedHosts)

    @model_validator(mode="after")
    def _planner_has_a_choice(self) -> "ClusterConfig":
        ranges = [pool.allowed_instances for _, pool in self.pools.items()]
        if self.planner.mode != "off" and all(one.min == one.max for one in ranges):
            got = f"planner.mode: {self.planner.mode}, and instances: " + ", ".join(
                str(pool.num_instances) for _, pool in self.pools.items()
            )
            raise expected("a pool with a range, such as instances: {min: 1, max: 4}", got=got)
        return self

    @property
    def hosts(self) -> ExpectedHosts:
        """The hosts of the file's `provider`, besides the head's."""
        return self._hosts

    def expecting(self, hosts: ExpectedHosts) -> "ClusterConfig":
        """Returns a copy with these hosts."""
        copy = self.model_copy()
        copy._hosts = hosts
        return copy

    def on(self, device: DeviceKind) -> "ClusterConfig":
        """Returns a copy with `device: auto` resolved."""
        return self.model_copy(update={"device": device})

    def keeping(self, sizes: Mapping[Role, int]) -> "ClusterConfig":
        """Returns a copy in which each pool with a range keeps the size that it has, as far as the range
        allows; `start` is for the start."""
        kept = {
            role: min(max(sizes[role], pool.allowed_instances.min), pool.allowed_instances.max)
            for role, pool in self.pools.items()
        }
        return self if not any(kept.values()) else self.sized(kept)

    def sized(self, sizes: Mapping[Role, int]) -> "ClusterConfig":
        """Returns a copy with other numbers of instances in force."""
        return self.model_copy(update={"pools": self.pools.sized(sizes)})

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


_FIXED_LIMITS = {  # when the servers start
    f"limits.{name}" for name in ("max_message_bytes", "max_open_calls", "max_connections", "max_held_bytes")
}


def _changes_while_running(key: str) -> bool:
    if key in _FIXED_LIMITS:
        return False
    single = ("pools.prefill.instances", "pools.decode.instances", "kv.cache_sharing", "join_timeout_s")
    return key in single or key.startswith(("slo.", "routing.", "limits.", "planner."))
