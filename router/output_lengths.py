"""How many tokens outputs will have: as many as recent ones of the same client, or else of all clients, that
asked for about as many at most. Placement and admission count with it. Pure; no more classes than a bound."""

from collections import OrderedDict

from ..core.request import Request

UNKNOWN_TOKENS = 256  # of outputs that may be longer, before any of their class has ended
FEW = 8  # outputs of one client; before that many, those of all clients count
MAX_CLASSES = 4096
SMOOTHING = 0.05  # weight of the newest output, once 20 of its class have ended


class _Mean:
    """The mean of the latest lengths."""

    __slots__ = ("num", "tokens")

    def __init__(self) -> None:
        self.num = 0
        self.tokens = 0.0

    def add(self, num_tokens: int) -> None:
        self.num += 1
        self.tokens += max(SMOOTHING, 1.0 / self.num) * (num_tokens - self.tokens)


class OutputLengths:
    """The mean output of each class of requests: a client, or all clients (None), and the magnitude of
    `max_tokens`."""

    def __init__(self) -> None:
        self._means: OrderedDict[tuple[str | None, int], _Mean] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._means)

    def expected(self, request: Request) -> int:
        """Returns the number of tokens that each choice is expected to have, at least 1."""
        max_tokens = request.sampling.max_tokens
        magnitude = max_tokens.bit_length()
        of_client = self._means.get((request.client, magnitude))
        of_all = self._means.get((None, magnitude))
        if of_client is not None and of_client.num >= FEW:
            num_tokens = of_client.tokens
        elif of_all is not None:
            num_tokens = of_all.tokens
        else:
            num_tokens = UNKNOWN_TOKENS
        return max(1, min(round(num_tokens), max_tokens))

    def note(self, request: Request, num_tokens: int) -> None:
        """Learns from a choice that has ended by itself, or with a stop string."""
        magnitude = request.sampling.max_tokens.bit_length()
        for client in (request.client, None):
            self._mean_of((client, magnitude)).add(num_tokens)
        if len(self._means) > MAX_CLASSES:
            self._means.popitem(last=False)

    def _mean_of(self, key: tuple[str | None, int]) -> _Mean:
        mean = self._means.setdefault(key, _Mean())
        self._means.move_to_end(key)
        return mean
