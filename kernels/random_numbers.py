"""The random number of a token: a function of (seed, choice, token index) alone, so that every worker, in
every batch, draws the same token."""

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, choice: int, index: int) -> float:
    """Returns a number in [0, 1) with 53 random bits."""
    state = _mix(seed & _MASK)
    state = _mix(state ^ choice)
    return (_mix(state ^ index) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 16)."""
    value = (value + _GOLDEN_GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
