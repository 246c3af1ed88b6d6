"""The share of a model that one rank of an instance holds, as ranges. Pure, no torch.

As in Megatron-LM (Shoeybi et al., 2019, section 3): the rows of q, k, v, gate and up are divided, by whole
heads, and the columns of o and down, so that each block of a layer ends with one sum over ranks. Embedding
and head are divided by tokens of the vocabulary."""

import dataclasses
from dataclasses import dataclass

from ...core.errors import ConfigError
from ..model_config import ModelConfig

NUMS_OF_RANKS = (1, 2, 4, 8)
FIELD = "tensor_parallel"


@dataclass(frozen=True)
class Part:
    """The elements of one tensor that a rank holds: `span` along dimension `dim`, all of the others."""

    dim: int
    span: range


@dataclass(frozen=True)
class Shard:
    """The place of a rank among those of its instance. Raises ConfigError for a number of ranks other than 1,
    2, 4 or 8."""

    rank: int
    num_ranks: int

    def __post_init__(self) -> None:
        if self.num_ranks not in NUMS_OF_RANKS:
            raise ConfigError(f"{FIELD}: got {self.num_ranks}, expected 1, 2, 4 or 8")
        if not 0 <= self.rank < self.num_ranks:
            raise ConfigError(f"rank: got {self.rank}, expected 0 to {self.num_ranks - 1}")

    def all(self) -> list["Shard"]:
        """Returns the shares of all ranks, in their order."""
        return [Shard(rank, self.num_ranks) for rank in range(self.num_ranks)]

    def query_heads(self, num_heads: int) -> range:
        """Returns the rank's query heads, of `num_heads`. Raises ConfigError where they do not divide."""
        return self._even("num_attention_heads", num_heads)

    def kv_heads(self, num_kv_heads: int) -> range:
        """Returns the rank's KV heads, of `num_kv_heads`; where these are fewer than ranks, several ranks
        hold the same one. Raises ConfigError where neither number divides the other."""
        if num_kv_heads >= self.num_ranks:
            return self._even("num_key_value_heads", num_kv_heads)
        if num_kv_heads < 1 or self.num_ranks % num_kv_heads:
            expected = f"a divisor or a multiple of {self.num_ranks}"
            raise self._indivisible("num_key_value_heads", num_kv_heads, expected)
        head = self.rank * num_kv_heads // self.num_ranks
        return range(head, head + 1)

    def mlp(self, intermediate_size: int) -> range:
        """Returns the rank's inner features of the MLP. Raises ConfigError where they do not divide."""
        return self._even("intermediate_size", intermediate_size)

    def vocabulary(self, vocab_size: int) -> range:
        """Returns the rank's tokens. The numbers of two ranks differ by one at most: fine-tuned models add a
        few tokens to a vocabulary that was divisible. Raises ConfigError for fewer tokens than ranks."""
        if vocab_size < self.num_ranks:
            raise self._indivisible("vocab_size", vocab_size, "at least one each")
        return range(vocab_size * self.rank // self.num_ranks, vocab_size * (self.rank + 1) // self.num_ranks)

    def of(self, config: ModelConfig) -> ModelConfig:
        """Returns the shape of the rank's part of a model. Raises ConfigError for a model that does not
        divide."""
        return dataclasses.replace(
            config,
            num_heads=len(self.query_heads(config.num_heads)),
            num_kv_heads=len(self.kv_heads(config.num_kv_heads)),
            intermediate_size=len(self.mlp(config.intermediate_size)),
            vocab_size=len(self.vocabulary(config.vocab_size)),
        )

    def part(self, name: str, config: ModelConfig) -> Part | None:
        """Returns the rank's part of the tensor `name` of the whole model `config`; None: all of it. A bias
        that follows a sum over ranks is rank 0's alone, and an empty part of others."""
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return Part(0, self.vocabulary(config.vocab_size))
        linear, _, kind = name.rpartition(".")
        leaf = linear.rpartition(".")[2]
        if leaf in ("o_proj", "down_proj") and kind == "bias":
            return None if self.rank == 0 else Part(0, range(0))
        match leaf:
            case "q_proj":
                return Part(0, _scaled(self.query_heads(config.num_heads), config.head_dim))
            case "k_proj" | "v_proj":
                return Part(0, _scaled(self.kv_heads(config.num_kv_heads), config.head_dim))
            case "o_proj":
                return Part(1, _scaled(self.query_heads(config.num_heads), config.head_dim))
            case "gate_proj" | "up_proj":
                return Part(0, self.mlp(config.intermediate_size))
            case "down_proj":
                return Part(1, self.mlp(config.intermediate_size))
        return None

    def _even(self, field: str, count: int) -> range:
        if count < 1 or count % self.num_ranks:
            raise self._indivisible(field, count, f"a multiple of {self.num_ranks}")
        each = count // self.num_ranks
        return range(self.rank * each, (self.rank + 1) * each)

    def _indivisible(self, field: str, value: int, expected: str) -> ConfigError:
        return ConfigError(
            f"{FIELD}: {self.num_ranks} ranks cannot share {field} {value}, expected {expected}"
        )


WHOLE = Shard(0, 1)


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
