"""`pdserve serve`: a cluster from a model's path and a few options, without a file."""

from collections.abc import Iterator

from ..core.config import ClusterConfig
from ..core.config_file import ConfigSource, Override
from ..core.config_types import LOOPBACK, format_host_port
from ..engine.gpu import probe_node
from .models import model_path
from .plan import located
from .up import say, up


def serve(model: str, prefill: int, decode: int, port: int | None, sets: list[str]) -> None:
    """Serves until it is asked to end. Raises ConfigError, or CommandFailed where a model cannot be
    downloaded."""
    overrides = [*_settings(model, prefill, decode, port), *map(Override.parse, sets)]
    source = ConfigSource(None, tuple(overrides))
    config = source.config()
    with located(source):
        up(config)


def _settings(model: str, prefill: int, decode: int, port: int | None) -> Iterator[Override]:
    path = model_path(model)
    yield Override(("model", "path"), path, "MODEL")
    share = core_share(prefill + decode)
    for pool, instances in {"prefill": prefill, "decode": decode}.items():
        yield Override.parse(f"pools.{pool}.instances={instances}", f"--{pool} {instances}")
        if share is not None:
            yield Override.parse(f"pools.{pool}.cpus_per_instance={share}")
    if port is not None:
        yield Override.parse(f"listen.http={format_host_port(LOOPBACK, port)}", f"--port {port}")


def core_share(num_instances: int) -> float | None:
    """Returns the part of a core that each instance takes where there are more instances than cores, and says
    so; None where each has a core of its own."""
    num_cores = len(probe_node().cores)
    if num_instances <= num_cores:
        return None
    say(f"{num_instances} instances share {num_cores} core{'s' * (num_cores != 1)}")
    return int(100 * num_cores / num_instances) / 100


def private_config(model: str) -> ClusterConfig:
    """Returns the configuration of a cluster for one command: an instance of each pool, and a free port."""
    share = core_share(2)
    pool = {} if share is None else {"cpus_per_instance": share}
    listen = {"grpc": f"{LOOPBACK}:0", "http": None}
    pools = {"prefill": pool, "decode": pool}
    return ClusterConfig.model_validate(
        {"model": {"path": model_path(model)}, "pools": pools, "listen": listen}
    )
