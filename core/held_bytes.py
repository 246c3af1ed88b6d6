"""Bounds what clients hold at a time: each gets its fair share, and leaves some for the next. Pure.

These are dynamic thresholds (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998) with a
floor. Thresholds alone leave geometrically little when clients fill their parts one after the other and give
nothing back."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import PdserveError

BYTES_SPARE = 3  # one client alone may hold a quarter
RETRY_S = 1.0


class Shares:
    """Counts what each client holds of a bounded amount, with `s` = `num_spare`.

    A client may take more while `s` times that, and `s` times the average of all who then hold as much or
    more, stays free. So N clients leave `s` parts in N + `s` of all, however they take turns to take. As they
    give back and take again, each comes to hold one such part, or all that it wants if that is less.

    One part in N + `s` of what the others leave may be had in any case. So a newcomer gets something also
    where clients have left who held little, and the N that remain leave less than above: the part squared at
    least, by all who ever took part."""

    def __init__(self, max_amount: int, num_spare: int) -> None:
        self._max_amount = max_amount
        self._num_spare = num_spare
        self._held: dict[str, int] = {}  # by client; never 0
        self._amounts: list[int] = []  # the values of `_held`, sorted
        self.total = 0

    def of(self, client: str) -> int:
        return self._held.get(client, 0)

    def take(self, client: str, amount: int) -> bool:
        """Returns False, and takes nothing, if the client would then hold too much."""
        if amount and not self._may_hold(client, self.of(client) + amount):
            return False
        self._set(client, self.of(client) + amount)
        return True

    def give_back(self, client: str, amount: int) -> None:
        self._set(client, self.of(client) - amount)

    def _may_hold(self, client: str, amount: int) -> bool:
        """`amount` is more than what the client holds now."""
        room = self._max_amount - self.total + self.of(client)
        num_clients = len(self._held) + (client not in self._held)
        if amount <= max(1, room // (num_clients + self._num_spare)):
            return amount <= room
        free = room - amount
        if amount * self._num_spare > free:
            return False
        larger = self._amounts[bisect_left(self._amounts, amount) :]
        return (sum(larger) + amount) * self._num_spare <= free * (len(larger) + 1)

    def _set(self, client: str, amount: int) -> None:
        assert amount >= 0, client
        before = self._held.pop(client, 0)
        if before:
            del self._amounts[bisect_left(self._amounts, before)]
        if amount:
            self._held[client] = amount
            insort(self._amounts, amount)
        self.total += amount - before


class TooManyBytes(PdserveError):
    """A client's part of the memory is used up."""

    def __init__(self, what: str, num_held: int) -> None:
        self.retry_after_s = RETRY_S
        super().__init__(
            f"{num_held} bytes of {what} are held for one client, more has to be left to others:"
            f" retry in {RETRY_S:.1f} s"
        )


class TooLarge(PdserveError):
    """One use wants more than any client may ever hold: a retry cannot help."""

    def __init__(self, what: str, limit: int) -> None:
        self.limit = limit
        super().__init__(
            f"the {what} of this call take more than {limit} bytes (limits.max_held_bytes):"
            " ask for fewer prompts, choices or log probabilities in one call"
        )


class HeldBytes:
    """The bytes that are held for clients, from their receipt to their release."""

    def __init__(self, max_bytes: int, what: str = "messages") -> None:
        self._what = what
        self._shares = Shares(max_bytes, BYTES_SPARE)
        self._largest = max_bytes // (1 + BYTES_SPARE)  # that one use may ever hold

    @property
    def total(self) -> int:
        return self._shares.total

    def take(self, client: str, num_bytes: int) -> None:
        """Raises TooManyBytes, and then takes nothing."""
        if not self._shares.take(client, num_bytes):
            raise TooManyBytes(self._what, self._shares.of(client))

    def check_size(self, num_bytes: int) -> None:
        """Raises TooLarge for what a client could not hold if it were alone."""
        if num_bytes > self._largest:
            raise TooLarge(self._what, self._largest)

    def give_back(self, client: str, num_bytes: int) -> None:
        self._shares.give_back(client, num_bytes)

    @contextmanager
    def hold(self, client: str, num_bytes: int = 0) -> Iterator["Holding"]:
        """Wraps a use of bytes, to which more may be added. Raises TooManyBytes."""
        holding = Holding(self, client)
        holding.take(num_bytes)
        try:
            yield holding
        finally:
            holding.release(holding.num_bytes)


class Holding:
    """The bytes that are held for one use, such as a call."""

    def __init__(self, held: HeldBytes, client: str) -> None:
        self._held = held
        self._client = client
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises TooLarge or TooManyBytes, and then takes nothing."""
        self._held.check_size(self.num_bytes + num_bytes)
        self._held.take(self._client, num_bytes)
        self.num_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        self._held.give_back(self._client, num_bytes)
        self.num_bytes -= num_bytes
