"""`pdserve validate` and `pdserve plan`: the requirements of a cluster.yaml, before anything starts."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ..core.config import ClusterConfig
from ..core.config_file import ConfigSource, Override
from ..core.config_listen import ListenSection
from ..core.config_types import format_size
from ..core.errors import CapacityError, CheckpointError, ConfigError
from ..engine.checkpoint import open_checkpoint, resolve_model_path
from ..planner.plan import TYPICAL_TOKENS, GpuPlan, Plan, PoolPlan, plan
from .address import DEFAULT_FILE

_KEY = re.compile(r"([a-z_]+(?:\.[a-z_]+)*): ")

NO_DEFAULTS = "the defaults of OpenAI's interface"


def read_source(file: Path | None, sets: Sequence[str] = ()) -> ConfigSource:
    """Returns what `file` and `--set` say; without a file ./cluster.yaml does, where there is one. Raises
    ConfigError."""
    overrides = tuple(Override.parse(text) for text in sets)
    if file is None and not DEFAULT_FILE.exists():
        return ConfigSource(None, overrides)
    return ConfigSource.read(file or DEFAULT_FILE, overrides)


def read_config(file: Path | None, sets: Sequence[str] = ()) -> ClusterConfig:
    """Returns the configuration in `file`; without one that of ./cluster.yaml, or else the defaults. Raises
    ConfigError with every mistake, those about the model included."""
    source = read_source(file, sets)
    try:
        return source.config()
    except ConfigError as error:
        raise ConfigError("\n".join([str(error), *_model_problems(source)])) from None


def _model_problems(source: ConfigSource) -> Iterator[str]:
    """Yields what is wrong with the model of a configuration that has other mistakes."""
    values = source.values()
    model = values.get("model") if isinstance(values, Mapping) else None
    path = model.get("path") if isinstance(model, Mapping) else None
    if isinstance(path, str) and path:
        try:
            open_checkpoint(resolve_model_path(path))
        except CheckpointError as error:
            yield f"{source.located('model.path')}: {error}"


@contextmanager
def located(source: ConfigSource) -> Iterator[None]:
    """Says of errors in the block where their keys are set: of those about the model, and of findings."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(f"{source.located('model.path')}: {error}") from error
    except (ConfigError, CapacityError) as error:
        lines = [_located(source, line) for line in str(error).splitlines()]
        raise type(error)("\n".join(lines)) from error


def _located(source: ConfigSource, finding: str) -> str:
    match = _KEY.match(finding)
    if match is None or match[1].split(".")[0] not in ClusterConfig.model_fields:
        return finding
    return source.located(match[1]) + finding[match.end() - 2 :]


def validate(file: Path | None, sets: Sequence[str] = ()) -> None:
    """Raises for errors that hold on any machine; reports those that hold only for this one because it is too
    small."""
    from ..gateway.text.tokenizer import Tokenizer

    config, source = read_config(file, sets), read_source(file, sets)
    with located(source):
        findings = check(config).findings
        Tokenizer.load(resolve_model_path(config.model.path))
    for finding in findings:
        print(f"on this machine: {_located(source, finding.message)}", file=sys.stderr)
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


def show_plan(file: Path | None, output: str, sets: Sequence[str] = ()) -> None:
    """Print the plan; raises when something does not fit."""
    config = read_config(file, sets)
    with located(read_source(file, sets)):
        planned = plan(config)
        print(plan_json(planned) if output == "json" else plan_text(planned))
        planned.check()


def plan_json(planned: Plan) -> str:
    values = asdict(planned)
    values["default_sampling"] = planned.default_sampling.stated
    values["pools"] = [asdict(pool) | {"role": pool.role.value} for pool in planned.pools]
    values["gpus"] = [
        asdict(gpu) | {"instances": [role.value for role in gpu.instances]} for gpu in planned.gpus
    ]
    values["findings"] = [finding.message for finding in planned.findings]
    return json.dumps(values, indent=2)


def plan_text(planned: Plan) -> str:
    sampling = ", ".join(f"{name} {value:g}" for name, value in planned.default_sampling.stated.items())
    lines = [
        (
            f"model     {planned.model}: {planned.architecture}, {planned.num_parameters / 1e6:.4g} M"
            f" parameters, {planned.dtype}"
        ),
        f"weights   {format_size(planned.weights_bytes)} an instance",
        f"KV cache  {format_size(planned.kv_bytes_per_token)} a token, blocks of {planned.block_size} tokens",
        f"length    {planned.max_model_len} tokens of prompt and output",
        f"sampling  {sampling or NO_DEFAULTS} where a request leaves it unset",
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
    ranks = [] if pool.num_ranks == 1 else [_ranks_line(pool)]
    return [
        "",
        (
            f"{pool.role.value}: {instances} of {gpu}{pool.num_cpus:g} core{'s' * (pool.num_cpus != 1)},"
            f" {pool.num_threads} thread{'s' * (pool.num_threads != 1)}"
        ),
        *ranks,
        (
            f"  {kind} {format_size(pool.instance_bytes)} an instance, {format_size(pool.kv_cache_bytes)} of"
            f" it KV cache{measured}"
        ),
        f"  sequences  {sequences} fit into {pool.num_blocks} blocks",
    ]


def _ranks_line(pool: PoolPlan) -> str:
    copies = "" if pool.num_kv_copies == 1 else f", each KV head on {pool.num_kv_copies}"
    rank_bytes = pool.instance_bytes // pool.num_ranks
    return (
        f"  ranks      {pool.num_ranks} an instance, {format_size(pool.rank_weights_bytes)} of weights and"
        f" about {format_size(rank_bytes)} in all each{copies}"
    )
