"""The messages between router and workers, one frame each: commands to workers, reports to the router.

    router --Prefill(spec, target)--> P      P --StepReport(first token), LegEnded--> router
    router --Reserve(spec)---------> D      D --StepReport(all tokens), LegEnded--> router
    router --Serve(spec)-----------> any    (both phases on one worker)
    router --Abort(transfer)-------> both   (of one choice: D)
    router --Probe(target)---------> any     any --Probed--> router  (whether it reaches another worker)
    router --Heartbeat-------------> all

D repeats the first token, which came with the KV: its leg reports the whole request, also to a router that
received nothing from P. Every report names the (worker_id, incarnation) it comes from, so that reports of a
replaced worker are recognisable as stale."""

import enum
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from . import token_ids
from .failures import FailureKind
from .request import FinishReason, HeldSpec, SequenceSpec, TransferId


class Role(enum.Enum):
    """The phases that a worker serves. Every worker can do both; the role determines the work that the router
    sends it."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class Leg(enum.Enum):
    """The part of a dispatch that one worker carries out."""

    PREFILL = "prefill"
    DECODE = "decode"


class KVLayout(msgspec.Struct, frozen=True):
    """The shape of one token's KV, and its format between workers. Two can exchange KV when all but
    `block_size` agree."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # "float32", "bfloat16", "float16"
    block_size: int  # tokens a block; may differ between workers
    model_fingerprint: str  # distinguishes weights of the same shape
    wire: Literal["raw", "int8"] = "raw"  # `kernels.wire` has the formats

    @property
    def bytes_per_token(self) -> int:
        """The bytes of one token in the cache."""
        item = 4 if self.dtype == "float32" else 2
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * item

    @property
    def wire_bytes_per_token(self) -> int:
        return self.num_layers * self.wire_bytes_per_cell

    @property
    def wire_bytes_per_cell(self) -> int:
        """The bytes of one layer of one token. In int8 each row of keys, and of values, carries a float32
        scale."""
        if self.wire == "int8":
            return 2 * self.num_kv_heads * (self.head_dim + 4)
        return self.bytes_per_token // self.num_layers

    def mismatch(self, other: "KVLayout") -> str | None:
        """The first field in which two layouts cannot exchange KV, in words; None when they can."""
        for name in ("num_layers", "num_kv_heads", "head_dim", "dtype", "model_fingerprint", "wire"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: {mine!r} here, {theirs!r} there"
        return None


class TransferAddress(msgspec.Struct, frozen=True):
    """The address at which a worker accepts KV. It comes from the workers' registry, never from a client."""

    worker_id: str
    incarnation: int
    host_id: str  # equal on workers that can share memory
    unix_path: str  # path of a Unix socket, for peers on the same host
    tcp_host: str
    tcp_port: int
    gpu: str = ""  # the UUID of the GPU that holds its KV; empty on a processor
    rank: int = 0  # of the instance's `num_ranks`, each of which has an address of its own
    num_ranks: int = 1
    others: tuple["TransferAddress", ...] = ()  # with rank 0's: those of ranks 1, 2, ...

    def of_rank(self, rank: int) -> "TransferAddress":
        """Returns the address of another rank, given rank 0's."""
        return self.others[rank - 1] if rank else self


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's description of itself when it is ready."""

    worker_id: str
    incarnation: int
    role: Role
    layout: KVLayout
    num_blocks: int
    max_model_len: int
    max_batch_tokens: int
    max_batch_size: int
    address: TransferAddress
    devices: tuple[str, ...]  # "cpu:3", or "cuda:" and the GPU's UUID
    node: str
    pid: int  # of rank 0
    rank_pids: tuple[int, ...] = ()  # of ranks 1, 2, ..., where the instance has several
    kernels: str  # the implementation chosen at start


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's state after a step."""

    num_running: int = 0  # sequences that take part in steps
    num_waiting: int = 0  # sequences that wait for blocks, for KV or for their first step
    num_queued_tokens: int = 0  # prompt tokens accepted and not yet computed
    num_context_tokens: int = 0  # sum of the contexts of the running sequences
    num_free_blocks: int = 0  # free now, or cached and evictable
    num_preemptions: int = 0  # since the start
    # cached, and not reported to this router: after a greeting they follow in slices
    num_unreported_blocks: int = 0


class StepTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Shape and duration of one step, for the latency model."""

    num_prefill_tokens: int
    sum_prefill_squares: int  # sum over chunks of new_tokens * (context + new_tokens)
    num_decode_sequences: int
    num_context_tokens: int  # sum over the decoding sequences
    duration_s: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the model's own distribution."""

    logprob: float  # log probability of the token at that position
    top: tuple[tuple[int, float], ...] = ()  # (token_id, logprob), best first


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One token of one choice. `index` counts the choice's output tokens from 0, across attempts. There are
    many, and none is ever in a cycle: the garbage collector passes them over."""

    transfer: TransferId
    choice: int
    index: int
    token_id: int
    finish_reason: FinishReason | None = None  # set on the last token of the choice
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token_id, logprob), best first
    prompt_logprobs: tuple[
        TokenLogprobs, ...
    ] = ()  # for prompt tokens 1, 2, ...: only with token 0 of choice 0, if requested

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing beside the token."""
        return (
            self.finish_reason is None
            and self.logprob is None
            and not self.top_logprobs
            and not self.prompt_logprobs
        )


class TransferStats(msgspec.Struct, frozen=True):
    """The cost of transferring one request's KV. Hidden bytes had been acknowledged before the prefill's last
    layer was done."""

    num_bytes: int
    num_chunks: int
    duration_s: float  # first chunk gathered to COMMITTED
    exposed_s: float  # prefill done to COMMITTED
    hidden_bytes: int


class LegEnded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A worker is done with its leg of a dispatch and holds nothing for it any more. `error` and its kind are
    None on success."""

    worker_id: str
    incarnation: int
    transfer: TransferId
    leg: Leg
    error: str | None = None
    kind: FailureKind | None = None  # kind of the error
    num_cached_tokens: int = 0
    queue_s: float = 0.0  # accepted to first step
    compute_s: float = 0.0  # first step to last token of this leg
    stats: TransferStats | None = None

    @property
    def is_invalid(self) -> bool:
        """Whether the request caused the error, so that it would fail on any worker."""
        return self.kind is FailureKind.INVALID


class GpuSample(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU's figures, for all its users together. None: the GPU does not report the figure."""

    index: int  # on its node
    uuid: str
    name: str
    memory_total_bytes: int
    memory_used_bytes: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature_celsius: float | None = None
    sm_clock_hertz: float | None = None
    memory_clock_hertz: float | None = None
    pcie_sent_bytes_per_s: float | None = None
    pcie_received_bytes_per_s: float | None = None
    nvlink_sent_bytes: int | None = None  # since its driver was loaded
    nvlink_received_bytes: int | None = None
    throttled_by: tuple[str, ...] | None = None  # some of power, temperature, hardware
    peak_flops_per_s: float | None = None  # bfloat16, dense; None: unknown for this GPU
    peak_bytes_per_s: float | None = None


class StepReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The results of one step. Sent without tokens every 0.5 s as a heartbeat."""

    worker_id: str
    incarnation: int
    load: WorkerLoad
    outputs: tuple[TokenOutput, ...] = ()
    timing: StepTiming | None = None
    blocks_added: tuple[bytes, ...] = ()  # hashes that entered the prefix cache
    blocks_evicted: tuple[bytes, ...] = ()
    gpu: GpuSample | None = None  # sample of the worker's GPU, with a heartbeat every few seconds
    rank_cpu_s: tuple[float, ...] = ()  # processor time of each rank since its start, with a heartbeat


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A worker's first frame: its identity."""

    worker_id: str
    incarnation: int


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The progress of a worker's start."""

    worker_id: str
    incarnation: int
    phase: str
    fraction: float


class HeldLeg(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A leg that a worker received from an earlier router, and its reports on it so far. A router that takes
    over reads those of all streams at once: tokens without anything beside them come packed."""

    spec: HeldSpec
    leg: Leg
    has_partner: bool  # its KV comes from, or goes to, another worker
    choice: int = 0  # of `packed_tokens`
    first_index: int = 0  # of the first of them
    packed_tokens: bytes = b""  # the first outputs, as in `core.token_ids`
    later_outputs: tuple[TokenOutput, ...] = ()
    ended: LegEnded | None = None  # while the worker carries it out

    def __post_init__(self) -> None:
        token_ids.check("packed_tokens", self.packed_tokens)

    @classmethod
    def of(
        cls,
        spec: SequenceSpec,
        leg: Leg,
        outputs: Sequence[TokenOutput] = (),
        *,
        has_partner: bool,
        ended: LegEnded | None = None,
    ) -> "HeldLeg":
        """Makes one of all `outputs` so far, in the order in which they were reported."""
        choice, first_index = (outputs[0].choice, outputs[0].index) if outputs else (0, 0)
        plain: list[int] = []
        for index, output in enumerate(outputs, first_index):
            if output.index != index or output.choice != choice or not output.is_plain:
                break
            plain.append(output.token_id)
        return cls(
            spec=HeldSpec.of(spec),
            leg=leg,
            has_partner=has_partner,
            choice=choice,
            first_index=first_index,
            packed_tokens=token_ids.packed(plain),
            later_outputs=tuple(outputs[len(plain) :]),
            ended=ended,
        )

    @property
    def num_outputs(self) -> int:
        return len(self.packed_tokens) // token_ids.ITEM_BYTES + len(self.later_outputs)

    @property
    def token_ids(self) -> "array[int]":
        """The first outputs."""
        return token_ids.unpacked(self.packed_tokens)

    def outputs(self) -> list[TokenOutput]:
        """Returns all outputs, in the order in which they were reported."""
        first = [
            TokenOutput(self.spec.transfer, self.choice, index, token_id)
            for index, token_id in enumerate(self.token_ids, self.first_index)
        ]
        return first + list(self.later_outputs)


class Holds(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A part of the legs that `Ready` reports, sent before it: together they may exceed a frame."""

    held: tuple[HeldLeg, ...]


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker serves from now on. `held` is not empty when it served under another router before, or was
    away."""

    info: WorkerInfo
    held: tuple[HeldLeg, ...] = ()
    num_cached_blocks: int = 0  # which later reports name


class Prefill(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Compute the prompt, sample the first token and push the KV to `target`; without one the request ends
    here."""

    spec: SequenceSpec
    target: TransferAddress | None


class Reserve(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Reserve blocks for KV that `source` will push, then decode from the token that comes with it on."""

    spec: SequenceSpec
    source_worker_id: str
    source_incarnation: int
    num_source_ranks: int = 1


class Serve(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Prefill and decode on this worker."""

    spec: SequenceSpec


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop both legs of a dispatch on this worker, or one `choice` of it, and free what it holds. Unknown
    ones are ignored."""

    transfer: TransferId
    choice: int | None = None


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Try to reach another worker, as KV would; answered by `Probed`."""

    target: TransferAddress


class Probed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The result of a `Probe`. `error` is empty when the worker has reached the other one."""

    worker_id: str
    incarnation: int
    target_worker_id: str
    target_incarnation: int
    error: str


class HostFull(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker's host has no space left. Repeated every second while that holds."""

    worker_id: str
    incarnation: int
    full: tuple[tuple[str, int], ...]  # its memory, or a folder; and the size of either in bytes


class Failing(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker cannot continue, and ends: its last message. Nothing that it holds will be finished."""

    worker_id: str
    incarnation: int
    reason: str


HEARTBEAT_S = 0.5  # the longest interval between messages of router and worker
ROUTER_SILENT_S = 10.0  # a worker hangs up on a router that is silent for longer


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """The router is running. Sent every `HEARTBEAT_S`; a worker that receives nothing for long has lost its
    router."""


WorkerCommand = Prefill | Reserve | Serve | Abort | Probe | Heartbeat
WorkerMessage = Hello | LoadProgress | Holds | Ready | StepReport | LegEnded | Probed | HostFull | Failing
