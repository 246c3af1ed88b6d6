"""Simulated devices: how long their steps take, and how much KV they hold."""

from dataclasses import dataclass, replace

from pdserve.core.messages import KVLayout, Role
from pdserve.loadgen.slo import Slo
from pdserve.planner.durations import DecodeSeconds, Durations
from pdserve.planner.virtual_cluster import VirtualCluster, replaying
from pdserve.planner.virtual_instance import InstanceShape
from pdserve.router.config import RouterConfig

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Profile:
    """A model on one kind of device."""

    durations: Durations
    layout: KVLayout
    kv_bytes: int
    max_model_len: int
    max_batch_tokens: int = 2048
    max_batch_size: int = 256

    def shape(self, role: Role) -> InstanceShape:
        return InstanceShape(
            role=role,
            durations=self.durations,
            num_blocks=self.kv_bytes // (self.layout.block_size * self.layout.bytes_per_token),
            max_model_len=self.max_model_len,
            max_batch_tokens=self.max_batch_tokens,
            max_batch_size=self.max_batch_size,
        )

    def cluster(
        self, num_prefill: int, num_decode: int, itl_slo_s: float, prefills_on_decode: bool = False
    ) -> VirtualCluster:
        """Returns such instances. Without prefill instances the others serve both phases."""
        roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode
        config = replaying(RouterConfig(itl_slo_s=itl_slo_s), prefills_on_decode)
        return VirtualCluster([self.shape(role) for role in roles], self.layout, config)


def _layout(num_layers: int, num_kv_heads: int, head_dim: int) -> KVLayout:
    return KVLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype="float16",
        block_size=BLOCK_TOKENS,
        model_fingerprint="m",
    )


# OPT-13B on an A100 of 80 GB: the profile in DistServe's artifact (Zhong et al., OSDI 2024)
OPT_13B_A100 = Profile(
    Durations(
        prefill_step_s=18.10e-3,
        prefill_token_s=0.1019e-3,
        prefill_square_s=7.12e-9,
        decode=DecodeSeconds(19.93e-3, 6.27e-7, 0.0385e-3),
        decode_large=DecodeSeconds(7.17e-3, 5.80e-7, 0.158e-3),
        large_batch=95,
        transfer_s=1e-3,
        link_bytes_per_s=25e9,
    ),
    _layout(40, 40, 128),
    kv_bytes=46 << 30,
    max_model_len=16_384,
)
# the same by vLLM's kernels, as the artifact has it too
OPT_13B_VLLM = replace(
    OPT_13B_A100,
    durations=replace(
        OPT_13B_A100.durations,
        prefill_step_s=23.63e-3,
        prefill_token_s=0.1505e-3,
        prefill_square_s=8.65e-9,
        decode=DecodeSeconds(19.56e-3, 4.94e-7, 0.0506e-3),
        decode_large=DecodeSeconds(16.84e-3, 4.39e-7, 0.140e-3),
    ),
)
# a Llama of 8 billion parameters on an H200: the roofline at 80 % of its products and 90 % of its bandwidth
_LLAMA_DECODE = DecodeSeconds(3.7e-3, 3.0e-8, 2.5e-5)
LLAMA_8B_H200 = Profile(
    Durations(
        prefill_step_s=3.7e-3,
        prefill_token_s=2.0e-5,
        prefill_square_s=6.6e-10,
        decode=_LLAMA_DECODE,
        decode_large=_LLAMA_DECODE,
        large_batch=1,
        transfer_s=1e-3,
        link_bytes_per_s=45e9,
    ),
    _layout(32, 8, 128),
    kv_bytes=100 << 30,
    max_model_len=131_072,
)
# slow steps of few tokens: a load that fills such devices is cheap to serve in virtual time
_SLOW_DECODE = DecodeSeconds(0.2, 1e-5, 4e-3)
SLOW_DEVICE = Profile(
    Durations(
        prefill_step_s=50e-3,
        prefill_token_s=4e-3,
        prefill_square_s=1e-7,
        decode=_SLOW_DECODE,
        decode_large=_SLOW_DECODE,
        large_batch=1,
        transfer_s=1e-3,
        link_bytes_per_s=1e9,
    ),
    _layout(4, 4, 64),
    kv_bytes=64 << 20,
    max_model_len=4096,
    max_batch_tokens=512,
    max_batch_size=32,
)


@dataclass(frozen=True)
class Service:
    """The devices of a comparison, and what clients expect of them."""

    profile: Profile
    num_devices: int
    slo: Slo  # of TTFT and TPOT


AZURE = Service(OPT_13B_A100, 8, Slo(ttft=2000.0, tpot=100.0))
MOONCAKE = Service(LLAMA_8B_H200, 8, Slo(ttft=10_000.0, tpot=25.0))
SLOW = Service(SLOW_DEVICE, 8, Slo(ttft=4000.0, tpot=800.0))
