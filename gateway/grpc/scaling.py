"""A change of pools' sizes: by how much, and to which configuration it leads."""

from collections.abc import Iterable

from ...core.config import ClusterConfig
from ...core.config_types import MAX_INSTANCES, InstanceRange
from ...core.errors import InvalidRequest
from ...proto import pdserve_pb2 as pb


def scaled(config: ClusterConfig, changes: Iterable[pb.PoolScale]) -> ClusterConfig:
    """Returns the configuration with other numbers of instances. Raises InvalidRequest."""
    pools = {role.value: (role, pool) for role, pool in config.pools.items()}
    sizes = {role: pool.num_instances for role, pool in pools.values()}
    seen: set[str] = set()
    for index, change in enumerate(changes):
        field = f"pools[{index}]"
        if change.role not in pools or change.role in seen:
            raise InvalidRequest(f"{field}.role", change.role, f"one of {', '.join(pools)}, each once")
        seen.add(change.role)
        kind = change.WhichOneof("change")
        if kind is None:
            raise InvalidRequest(f"{field}.instances", None, "instances, or delta")
        role, pool = pools[change.role]
        least, most = 0, MAX_INSTANCES
        if isinstance(pool.instances, InstanceRange):
            least, most = pool.instances.min, pool.instances.max
        before, given = sizes[role], getattr(change, kind)
        after = before + given if kind == "delta" else given
        if not least <= after <= most:
            low, high = (least - before, most - before) if kind == "delta" else (least, most)
            raise InvalidRequest(f"{field}.{kind}", given, f"{low} to {high}")
        sizes[role] = after
    if not seen:
        raise InvalidRequest("pools", "none", f"at least one of {', '.join(pools)}")
    if not any(sizes.values()):
        raise InvalidRequest("pools", "0 instances in each", "at least one instance in prefill or decode")
    return config.sized(sizes)
