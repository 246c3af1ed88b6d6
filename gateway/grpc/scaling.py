"""A change of pools' sizes: by how much, and to which configuration it leads."""

from collections.abc import Iterable

from ...core.config import MAX_INSTANCES, ClusterConfig
from ...core.errors import InvalidRequest
from ...proto import pdserve_pb2 as pb


def scaled(config: ClusterConfig, changes: Iterable[pb.PoolScale]) -> ClusterConfig:
    """Returns the configuration with other numbers of instances. Raises InvalidRequest."""
    sizes = {role.value: pool.instances for role, pool in config.pools.items()}
    seen: set[str] = set()
    for index, change in enumerate(changes):
        field = f"pools[{index}]"
        if change.role not in sizes or change.role in seen:
            raise InvalidRequest(f"{field}.role", change.role, f"one of {', '.join(sizes)}, each once")
        seen.add(change.role)
        kind = change.WhichOneof("change")
        if kind is None:
            raise InvalidRequest(f"{field}.instances", None, "instances, or delta")
        before, given = sizes[change.role], getattr(change, kind)
        after = before + given if kind == "delta" else given
        if not 0 <= after <= MAX_INSTANCES:
            low, high = (-before, MAX_INSTANCES - before) if kind == "delta" else (0, MAX_INSTANCES)
            raise InvalidRequest(f"{field}.{kind}", given, f"{low} to {high}")
        sizes[change.role] = after
    if not seen:
        raise InvalidRequest("pools", "none", f"at least one of {', '.join(sizes)}")
    if not any(sizes.values()):
        raise InvalidRequest("pools", "0 instances in each", "at least one instance in prefill or decode")
    pools = config.pools
    updated = {
        role.value: pool.model_copy(update={"instances": sizes[role.value]}) for role, pool in pools.items()
    }
    return config.model_copy(update={"pools": pools.model_copy(update=updated)})
