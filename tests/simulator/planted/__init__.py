"""Planted bugs, by the decision that they break. Each module lists its own, with the seed that finds each first."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Planted = AbstractContextManager[Any]
Mutation = Callable[[], Planted]
