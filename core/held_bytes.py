"""Bounds what clients hold at a time: each may hold a part of what the others leave. Pure.

These are dynamic thresholds (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998). A client
that is alone gets its part of all; each further one that fills its part leaves as large a share of the
rest for the next."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import PdserveError

BYTES_OF_ONE_CLIENT = 0.25  # of what the others leave
RETRY_S = 1.0


class Shares:
    """Counts what each client holds of a bounded amount."""

    def __init__(self, max_amount: int, part: float) -> None:
        """`part`: what one client may hold of that which the others leave."""
        self._max_amount = max_amount
        self._part = part
        self._held: Counter[str] = Counter()  # by client; none is 0
        self.total = 0

    def limit_of(self, client: str) -> int:
        """Returns what the client may hold now."""
        return max(1, int((self._max_amount - self.total + self._held[client]) * self._part))

    def take(self, client: str, amount: int) -> bool:
        """Returns False, and takes nothing, if the client would then hold too much."""
        if self._held[client] + amount > self.limit_of(client) or self.total + amount > self._max_amount:
            return False
        self._held[client] += amount
        self.total += amount
        return True

    def give_back(self, client: str, amount: int) -> None:
        self._held[client] -= amount
        self.total -= amount
        assert self._held[client] >= 0, client
        if not self._held[client]:
            del self._held[client]


class TooManyBytes(PdserveError):
    """A client's part of the memory is used up."""

    def __init__(self, what: str, limit: int) -> None:
        self.limit = limit
        self.retry_after_s = RETRY_S
        super().__init__(f"at most {limit} bytes of {what} are held for one client, retry in {RETRY_S:.1f} s")


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
        self._shares = Shares(max_bytes, BYTES_OF_ONE_CLIENT)
        self._largest = int(max_bytes * BYTES_OF_ONE_CLIENT)  # that one use may ever hold

    @property
    def total(self) -> int:
        return self._shares.total

    def take(self, client: str, num_bytes: int) -> None:
        """Raises TooManyBytes, and then takes nothing."""
        if not self._shares.take(client, num_bytes):
            raise TooManyBytes(self._what, self._shares.limit_of(client))

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
