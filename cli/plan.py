"""`pdserve validate` and `pdserve plan`: the requirements of a cluster.yaml, before anything starts."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from ..core.config import ClusterConfig
from ..core.config_file import load_cluster_config
from ..core.config_listen import ListenSection
from ..core.config_types import format_size
from ..core.errors import CapacityError
from ..engine.checkpoint import resolve_model_path
from ..planner.plan import TYPICAL_TOKENS, GpuPlan, Plan, PoolPlan, plan

DEFAULT_FILE = Path("cluster.yaml")


def read_config(file: Path | None) -> ClusterConfig:
    """The configuration in `file`; without one that of ./cluster.yaml, or else the defaults."""
    if file is None and not DEFAULT_FILE.exists():
        return ClusterConfig()
    return load_cluster_config(file or DEFAULT_FILE)


def validate(file: Path | None) -> None:
    """Raises for errors that hold on any machine; reports those that hold only for this one because it is too
    small."""
    from ..gateway.text.tokenizer import Tokenizer

    config = read_config(file)
    findings = check(config).findings
    Tokenizer.load(resolve_model_path(config.model.path))
    for finding in findings:
        print(f"on this machine: {finding.message}", file=sys.stderr)
    print(f"{file or (DEFAULT_FILE if DEFAULT_FILE.exists() else 'defaults')}: valid")


def check(config: ClusterConfig) -> Plan:
    """The plan for this machine. Raises for what no machine could serve, and leaves what needs a larger one
    in it."""
    _check_files(config.listen)
    planned = plan(config)
    if any(finding.error is not CapacityError for finding in planned.findings):
        planned.check()
    return planned


def _check_files(listen: ListenSection) -> None:
    """Raises ConfigError for what a server could not use."""
    from ..gateway.auth.access import Access
    from ..gateway.auth.tls import ServerTls

    if listen.tls.is_on:
        ServerTls(listen.tls)
    if listen.api_keys is not None:
        Access(listen.api_keys)


def show_plan(file: Path | None, output: str) -> None:
    """Print the plan; raises when something does not fit."""
    planned = plan(read_config(file))
    print(plan_json(planned) if output == "json" else plan_text(planned))
    planned.check()


def plan_json(planned: Plan) -> str:
    values = asdict(planned)
    values["pools"] = [asdict(pool) | {"role": pool.role.value} for pool in planned.pools]
    values["gpus"] = [
        asdict(gpu) | {"instances": [role.value for role in gpu.instances]} for gpu in planned.gpus
    ]
    values["findings"] = [finding.message for finding in planned.findings]
    return json.dumps(values, indent=2)


def plan_text(planned: Plan) -> str:
    lines = [
        (
            f"model     {planned.model}: {planned.architecture}, {planned.num_parameters / 1e6:.4g} M"
            f" parameters, {planned.dtype}"
        ),
        f"weights   {format_size(planned.weights_bytes)} an instance",
        f"KV cache  {format_size(planned.kv_bytes_per_token)} a token, blocks of {planned.block_size} tokens",
        f"length    {planned.max_model_len} tokens of prompt and output",
        f"device    {planned.device} ({planned.why_device})",
        *map(_gpu_line, planned.gpus),
    ]
    return "\n".join(
        [*lines, *(line for pool in planned.pools for line in _pool_lines(pool, planned.max_model_len))]
    )


def _gpu_line(gpu: GpuPlan) -> str:
    counts = Counter(role.value for role in gpu.instances)
    holds = " and ".join(f"{count} {role}" for role, count in counts.items()) or "nothing"
    return (
        f"GPU {gpu.index:<5} {gpu.name} of {gpu.node}: {format_size(gpu.total_bytes)},"
        f" {format_size(gpu.free_bytes)} free now; planned: {holds}, {format_size(gpu.planned_bytes)}"
    )


def _pool_lines(pool: PoolPlan, max_model_len: int) -> list[str]:
    instances = f"{pool.instances} instance{'s' * (pool.instances != 1)}"
    sequences = f"{pool.num_max_len_sequences} of {max_model_len} tokens"
    if max_model_len > TYPICAL_TOKENS:
        sequences += f", or {pool.num_typical_sequences} of {TYPICAL_TOKENS}"
    gpu = "" if pool.gpu_share is None else f"{pool.gpu_share:g} GPU and "
    kind = "memory    " if pool.gpu_share is None else "GPU memory"
    measured = " (about: workers take what they find)" if pool.is_measured else ""
    return [
        "",
        (
            f"{pool.role.value}: {instances} of {gpu}{pool.num_cpus:g} core{'s' * (pool.num_cpus != 1)},"
            f" {pool.num_threads} thread{'s' * (pool.num_threads != 1)}"
        ),
        (
            f"  {kind} {format_size(pool.instance_bytes)} an instance, {format_size(pool.kv_cache_bytes)} of"
            f" it KV cache{measured}"
        ),
        f"  sequences  {sequences} fit into {pool.num_blocks} blocks",
    ]
