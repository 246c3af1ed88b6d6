"""The part of a model that each rank of an instance holds. Pure arithmetic for `planner.plan`."""

import math
from collections.abc import Iterator

from ..core.config import PoolSection
from ..core.errors import ConfigError
from ..core.messages import Role
from ..engine.model_config import ModelConfig
from ..engine.parallel.shard import Shard
from ..engine.tensor_names import expected_tensors
from .packing import Finding

SHARED_BYTES = 16 << 20  # in which the ranks of an instance exchange sums and messages


def rank_findings(role: Role, pool: PoolSection, model: ModelConfig) -> Iterator[Finding]:
    """Reports why the ranks of the pool's instances cannot share the model."""
    try:
        Shard(0, pool.tensor_parallel).of(model)
    except ConfigError as error:
        yield Finding(ConfigError, f"pools.{role.value}.{error}")


def num_sharing(model: ModelConfig, pool: PoolSection) -> int:
    """Returns the ranks of an instance, as sizes count them: 1 where ranks cannot share the model, which is
    reported."""
    return pool.tensor_parallel if not list(rank_findings(Role.PREFILL, pool, model)) else 1


def rank_model(model: ModelConfig, num_ranks: int) -> ModelConfig:
    """Returns the shape of the largest part that a rank holds."""
    return Shard(num_ranks - 1, num_ranks).of(model)


def num_parameters_of(model: ModelConfig) -> int:
    """Returns the number of parameters of a model, or of a rank's part."""
    return sum(math.prod(shape) for shape in expected_tensors(model).values())


def num_kv_copies(model: ModelConfig, num_ranks: int) -> int:
    """Returns how many ranks hold each KV head."""
    return max(1, num_ranks // model.num_kv_heads)
