"""The parts of a model that each rank of an instance holds, and the reasons why ranks cannot share a model.
Pure arithmetic for `planner.plan`."""

from collections.abc import Iterator

from ..core.config import PoolSection
from ..core.errors import ConfigError
from ..core.messages import Role
from ..engine.model_config import ModelConfig
from .packing import Finding


def rank_findings(role: Role, pool: PoolSection, model: ModelConfig) -> Iterator[Finding]:
    """Reports the parts of the model that the pool's ranks cannot share."""
    num_ranks = pool.tensor_parallel
    sizes = {
        "attention heads": model.num_heads,
        "MLP columns": model.intermediate_size,
        "tokens of vocabulary": model.vocab_size,
    }
    reasons = [
        f"{size} {what}, which {num_ranks} does not divide"
        for what, size in sizes.items()
        if size % num_ranks
    ]
    if model.num_kv_heads % num_ranks and num_ranks % model.num_kv_heads:
        reasons.append(
            f"{model.num_kv_heads} KV heads, which neither divide {num_ranks} nor are divided by it"
        )
    if reasons:
        message = (
            f"pools.{role.value}.tensor_parallel: got {num_ranks}, expected a number of ranks that the model"
            f" can be divided among: it has {'; '.join(reasons)}"
        )
        yield Finding(ConfigError, message)


def num_kv_copies(model: ModelConfig, num_ranks: int) -> int:
    """Returns how many ranks hold each KV head."""
    return max(1, num_ranks // model.num_kv_heads)


def num_rank_parameters(model: ModelConfig, num_parameters: int, num_ranks: int) -> int:
    """Returns how many of the model's parameters one rank holds: its part of the matrices, its KV heads, its
    part of the vocabulary, and a copy of all that is small."""
    hidden = model.hidden_size
    in_layer = hidden * (2 * model.q_size + 3 * model.intermediate_size)
    kv = 2 * hidden * model.kv_size
    vocabulary = hidden * model.vocab_size * (1 if model.tie_word_embeddings else 2)
    divided = model.num_layers * in_layer + vocabulary
    small = num_parameters - divided - model.num_layers * kv
    kv_part = model.num_layers * kv * num_kv_copies(model, num_ranks) // num_ranks
    return small + -(-divided // num_ranks) + kv_part


def shared_bytes(model: ModelConfig, pool: PoolSection, item_bytes: int) -> int:
    """Returns the memory in which the ranks of one instance exchange sums and commands; none for one rank."""
    num_ranks = pool.tensor_parallel
    if num_ranks == 1:
        return 0
    hidden = pool.max_batch_tokens * model.hidden_size
    logits = pool.max_batch_size * model.vocab_size
    return max((num_ranks + 1) * hidden * item_bytes, logits * 4)
