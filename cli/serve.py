"""`pdserve serve`: a cluster from a model's path and a few options, without a file."""

from collections.abc import Iterator, Mapping

from ..core.config import ClusterConfig
from ..core.config_file import ConfigSource, Override
from ..core.config_types import LOOPBACK, format_host_port
from ..engine.gpu import probe_node
from .models import model_path
from .plan import located
from .up import say, up


def serve(
    model: str, instances: Mapping[str, int], tensor_parallel: int, port: int | None, sets: list[str]
) -> None:
    """Serves until it is asked to end; `instances` by pool. Raises ConfigError, or CommandFailed where a
    model cannot be downloaded."""
    overrides = [*_settings(model, instances, tensor_parallel, port), *map(Override.parse, sets)]
    source = ConfigSource(None, tuple(overrides))
    config = source.config()
    with located(source):
        up(config)


def _settings(
    model: str, instances: Mapping[str, int], tensor_parallel: int, port: int | None
) -> Iterator[Override]:
    path = model_path(model)
    yield Override(("model", "path"), path, "MODEL")
    share = core_share(sum(instances.values()), tensor_parallel)
    for pool, number in instances.items():
        yield Override.parse(f"pools.{pool}.instances={number}", f"--{pool} {number}")
        if tensor_parallel != 1:
            option = f"--tensor-parallel {tensor_parallel}"
            yield Override.parse(f"pools.{pool}.tensor_parallel={tensor_parallel}", option)
        if share is not None:
            yield Override.parse(f"pools.{pool}.cpus_per_instance={share}")
    if port is not None:
        yield Override.parse(f"listen.http={format_host_port(LOOPBACK, port)}", f"--port {port}")


def core_share(num_instances: int, num_ranks: int = 1) -> float | None:
    """Returns the cores that each instance reserves where its ranks and those of the others are more than the
    cores, and says so; None where each rank has a core of its own."""
    num_cores, num_processes = len(probe_node().cores), num_instances * num_ranks
    if num_processes <= num_cores:
        return None
    ranks = f" of {num_ranks} ranks" if num_ranks > 1 else ""
    say(f"{num_instances} instances{ranks} share {num_cores} core{'s' * (num_cores != 1)}")
    return num_ranks * int(100 * num_cores / num_processes) / 100


def private_config(model: str) -> ClusterConfig:
    """Returns the configuration of a cluster for one command: an instance of each pool, and a free port."""
    share = core_share(2)
    pool = {} if share is None else {"cpus_per_instance": share}
    listen = {"grpc": f"{LOOPBACK}:0", "http": None}
    pools = {"prefill": pool, "decode": pool}
    return ClusterConfig.model_validate(
        {"model": {"path": model_path(model)}, "pools": pools, "listen": listen}
    )
