"""KV on its way between instances: each has one port out and one port in, and its transfers share both.

A fluid model: at any time a flow moves at the smaller of its equal shares of both ports. Shares change when a
flow starts or ends, and with them the predicted ends of those that use the same ports."""

from collections.abc import Iterable, Mapping


class Flow:
    """Bytes on their way from one instance to another."""

    __slots__ = ("_left_bytes", "_rate", "_since_s", "source", "target", "version")

    def __init__(self, source: str, target: str, num_bytes: float) -> None:
        self.source = source
        self.target = target
        self.version = 0  # of its predicted end
        self._left_bytes = num_bytes
        self._rate = 0.0
        self._since_s = 0.0

    def left_bytes(self, now_s: float) -> float:
        """Returns how many bytes have yet to arrive."""
        return max(0.0, self._left_bytes - self._rate * (now_s - self._since_s))

    @property
    def end_s(self) -> float:
        """Returns when the last byte arrives, if nothing changes."""
        return self._since_s + self._left_bytes / self._rate

    def move(self, rate: float, now_s: float, more_bytes: float = 0.0) -> None:
        """Goes on at `rate`, with more bytes behind those that are left."""
        self._left_bytes = self.left_bytes(now_s) + more_bytes
        self._since_s, self._rate = now_s, rate
        self.version += 1

    @property
    def rate(self) -> float:
        return self._rate


class SharedLinks:
    """The flows under way. Each call returns those whose predicted end has moved."""

    def __init__(self, bytes_per_s: Mapping[str, float]) -> None:
        """`bytes_per_s`: of each instance's port, in either direction."""
        self._bytes_per_s: dict[str, float] = {}
        self._out: dict[str, dict[Flow, None]] = {}
        self._in: dict[str, dict[Flow, None]] = {}
        for name, rate in bytes_per_s.items():
            self.add(name, rate)

    def add(self, name: str, bytes_per_s: float) -> None:
        self._bytes_per_s[name] = bytes_per_s
        self._out[name], self._in[name] = {}, {}

    def start(self, flow: Flow, now_s: float) -> list[Flow]:
        self._out[flow.source][flow] = None
        self._in[flow.target][flow] = None
        return self._share_again(flow, now_s)

    def extend(self, flow: Flow, num_bytes: float, now_s: float) -> list[Flow]:
        """More bytes of a flow under way are ready to be moved."""
        flow.move(flow.rate, now_s, num_bytes)
        return [flow]

    def end(self, flow: Flow, now_s: float) -> list[Flow]:
        del self._out[flow.source][flow], self._in[flow.target][flow]
        return self._share_again(flow, now_s)

    def _share_again(self, changed: Flow, now_s: float) -> list[Flow]:
        return list(self._moved({**self._out[changed.source], **self._in[changed.target]}, now_s))

    def _moved(self, flows: Iterable[Flow], now_s: float) -> Iterable[Flow]:
        for flow in flows:
            rate = min(
                self._bytes_per_s[flow.source] / len(self._out[flow.source]),
                self._bytes_per_s[flow.target] / len(self._in[flow.target]),
            )
            if rate != flow.rate:
                flow.move(rate, now_s)
                yield flow
