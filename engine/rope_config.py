"""Rotary position scaling as a checkpoint's config.json states it, in the spelling of transformers 4 or 5."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..core.checkpoint_files import shown
from ..core.errors import CheckpointError
from .json_fields import JsonFields

RopeKind = Literal["default", "linear", "llama3", "yarn"]
SUPPORTED_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")
DEFAULT_THETA = 10_000.0
MIN_THETA = 2.0  # YaRN divides by its logarithm


@dataclass(frozen=True)
class RopeConfig:
    """The mapping from positions to angles; the fields are named as in transformers' `modeling_rope_utils`.

    Fields that a kind does not use keep their neutral defaults. `attention_factor` multiplies cos and sin.
    """

    kind: RopeKind = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0  # linear, llama3, yarn
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn
    divisors: tuple[float, ...] = ()  # of each frequency, where the checkpoint stores the scaling itself


def parse_rope(config: Mapping[str, Any], max_position_embeddings: int, source: str) -> RopeConfig:
    """Returns the rope of `config` (the whole config.json). Raises CheckpointError for unsupported kinds."""
    fields = _scaling_fields(config, source)
    kind = fields.optional_str("rope_type") or fields.optional_str("type") or "default"
    if kind not in SUPPORTED_ROPE_KINDS:
        supported = ", ".join(SUPPORTED_ROPE_KINDS)
        raise CheckpointError(
            f"{source}: rope type {shown(kind)} is not supported; supported are {supported}"
        )
    theta = _theta(fields) or _theta(JsonFields(config, source)) or DEFAULT_THETA
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=fields.positive_float("factor"))
    # A value beside the rope's own fields wins over one among them, as in transformers.
    original = JsonFields(config, source).optional_int("original_max_position_embeddings")
    original = original or fields.optional_int("original_max_position_embeddings") or max_position_embeddings
    return (
        _llama3(fields, theta, original)
        if kind == "llama3"
        else _yarn(fields, theta, original, max_position_embeddings)
    )


def _theta(fields: JsonFields) -> float | None:
    theta = fields.optional_float("rope_theta")
    if theta and theta < MIN_THETA:
        raise fields.refuse("rope_theta", f"a number from {MIN_THETA:g}")
    return theta


def _scaling_fields(config: Mapping[str, Any], source: str) -> JsonFields:
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(name) or {}
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{source}: {name}: got {shown(values)}, expected a mapping")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise CheckpointError(f"{source}: {name}: different rope parameters per layer type are not supported")
    for holder in (values, config):
        if holder.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise CheckpointError(f"{source}: partial_rotary_factor below 1 is not supported")
    return JsonFields(values, f"{source}: {name}")


def _llama3(fields: JsonFields, theta: float, original: int) -> RopeConfig:
    low, high = fields.positive_float("low_freq_factor"), fields.positive_float("high_freq_factor")
    if high <= low:
        raise CheckpointError(
            f"{fields.source}: high_freq_factor {high} must be greater than low_freq_factor {low}"
        )
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=fields.positive_float("factor"),
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(fields: JsonFields, theta: float, original: int, max_position_embeddings: int) -> RopeConfig:
    factor = _not_negative(fields, "factor") or max_position_embeddings / original
    attention_factor = fields.optional_float("attention_factor")
    if attention_factor is None:
        attention_factor = _yarn_attention_factor(
            factor, _not_negative(fields, "mscale"), _not_negative(fields, "mscale_all_dim")
        )
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=_not_negative(fields, "beta_fast") or 32.0,
        beta_slow=_not_negative(fields, "beta_slow") or 1.0,
        truncate=fields.flag("truncate", True),
        attention_factor=attention_factor,
    )


def _not_negative(fields: JsonFields, name: str) -> float | None:
    """Treats zero as absent, as in transformers."""
    return fields.positive_float(name) if fields.values.get(name) else None


def _yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """YaRN (arXiv 2309.00071), section 3.4; the two mscale fields are DeepSeek's extension."""

    def scaled(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scaled(mscale) / scaled(mscale_all_dim) if mscale and mscale_all_dim else scaled(1.0)
