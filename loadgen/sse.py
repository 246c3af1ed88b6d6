"""Server-sent events, parsed as their bytes arrive (WHATWG HTML, section 9.2), under any fragmentation."""

from collections.abc import Iterator


class SseParser:
    """A parser of server-sent events that keeps only `data`; names, ids, retry times and comments are
    dropped."""

    def __init__(self) -> None:
        self._rest = b""  # an incomplete line
        self._data: list[bytes] = []
        self._skip_newline = False  # the last line ended with a CR: a LF that follows belongs to it
        self._at_start = True

    def feed(self, data: bytes) -> Iterator[str]:
        """The data of each event that is complete now."""
        for line in self._lines(data):
            if not line:
                if self._data:
                    yield self._take()
            elif line == b"data" or line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))

    def finish(self) -> str | None:
        """The data of an event that the end of the stream left without its blank line. The standard drops it;
        a last `[DONE]` is better heard."""
        line, self._rest = self._rest, b""
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        return self._take() if self._data else None

    def _take(self) -> str:
        data, self._data = b"\n".join(self._data), []
        return data.decode("utf-8", errors="replace")

    def _lines(self, data: bytes) -> Iterator[bytes]:
        """Lines end with LF, CR or both; splitting by bytes never cuts a character."""
        if not data:
            return
        if self._skip_newline:
            data = data.removeprefix(b"\n")
        self._rest += data
        if self._at_start:
            if len(self._rest) < 3 and b"\xef\xbb\xbf".startswith(self._rest):
                return  # perhaps a byte order mark
            self._rest, self._at_start = self._rest.removeprefix(b"\xef\xbb\xbf"), False
        self._skip_newline = self._rest.endswith(b"\r")
        *lines, self._rest = self._rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        yield from lines
