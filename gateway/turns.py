"""Whose turn it is, among groups that each have many waiting: one from every group in turn. Pure."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Items in order within their group."""

    def __init__(self) -> None:
        self._groups: OrderedDict[str, deque[T]] = OrderedDict()  # in order of turns, none empty

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, group: str, item: T) -> None:
        self._groups.setdefault(group, deque()).append(item)

    def next(self) -> T:
        """Takes out the first item of the group whose turn it is. Raises KeyError when there is none."""
        group, items = self._groups.popitem(last=False)
        item = items.popleft()
        if items:
            self._groups[group] = items
        return item
