"""Rotary position tables, computed once when a model is loaded; equal to those of transformers'
`modeling_rope_utils`."""

import math

import torch

from .rope_config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int) -> torch.Tensor:
    """Returns float32 [num_positions, head_dim]: per position head_dim / 2 cosines, then as many sines."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Returns float32 [head_dim / 2], highest frequency first."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    wavelengths = rope.theta**exponents
    if rope.divisors:
        return 1.0 / wavelengths / torch.tensor(rope.divisors)
    if rope.kind == "linear":
        return 1.0 / wavelengths / rope.factor
    if rope.kind == "llama3":
        return _llama3(1.0 / wavelengths, rope)
    if rope.kind == "yarn":
        return _yarn(wavelengths, rope)
    return 1.0 / wavelengths


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    original = rope.original_max_position_embeddings
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / rope.low_freq_factor, frequencies / rope.factor, between)
    return torch.where(wavelengths < original / rope.high_freq_factor, frequencies, scaled)


def _yarn(wavelengths: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """YaRN (arXiv 2309.00071), section 3.2: dimensions that rotate often keep their frequency, slow ones are
    interpolated."""
    half = wavelengths.numel()
    low = _yarn_dimension(rope.beta_fast, 2 * half, rope)
    high = _yarn_dimension(rope.beta_slow, 2 * half, rope)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_dimension(num_rotations: float, head_dim: int, rope: RopeConfig) -> float:
    """Returns the dimension that turns `num_rotations` times within the original context."""
    turns = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.theta))
