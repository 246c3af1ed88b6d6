"""Floods a server on loopback, and reports the effect on new clients.

    pdserve up & python -m bench.microbench.floods [KIND ...] [--seconds 8] [--grpc 127.0.0.1:50051] [--http
    127.0.0.1:8000] python -m bench.microbench.floods unread --flood-key FILE ... --key FILE

grpc, http: connections that say nothing, as many as this process can hold and then new ones for the oldest.
chunks: 40 HTTP bodies at a time, in chunks of one byte. cancels: 8 HTTP requests at a time, whose clients
hang up at once. calls: 50 gRPC connections at a time, each of which sends 20,000 calls of 17 bytes as fast as
--megabytes a second allow, reads nothing and hangs up. headers: the same with calls of 4,000 references to
one header. unread: 1,000 gRPC streams of --max-tokens each for each key in the files of --flood-key, on one
connection each, which read nothing; the server needs keys, and --key names a file with the newcomers'.
Meanwhile newcomers connect one after the other and ask for one token (unread: 8, which takes a place where
streams are decoded); each line has their times. Only for a server on this machine, the others one without
keys, and for a bounded time."""

import argparse
import json
import resource
import selectors
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import grpc
import httpx

from pdserve.core.config_types import is_loopback
from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

KINDS = ("grpc", "http", "chunks", "cancels", "calls", "headers")  # and "unread", which needs keys
MAX_HELD = 15_000
CHUNKS = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"1\r\n \r\n" * 45_000
)
CANCELLED = b'{"prompt": "with", "max_tokens": 1000, "ignore_eos": true, "stream": true}'
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(CANCELLED), CANCELLED)
)
NUM_CALLERS = 50
NUM_UNREAD = 1000  # the limit of one connection
STREAM = b"/pdserve.v1.Generation/GenerateStream"
Address = tuple[str, int]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def field(name: bytes, value: bytes) -> bytes:
    """A header that enters the connection's table (RFC 7541, 6.2.1)."""
    return bytes([0x40, len(name)]) + name + bytes([len(value)]) + value


def calls(num_calls: int, num_references: int) -> bytes:
    """A connection's calls, whose headers refer to those of the first."""
    names = {b":method": b"POST", b":scheme": b"http", b":path": b"/a.B/C", b":authority": b"localhost"}
    names |= {b"te": b"trailers", b"content-type": b"application/grpc", b"x": b"y" * 100}
    first = b"".join(field(name, value) for name, value in names.items())
    again = bytes(0x80 | 62 + index for index in reversed(range(len(names)))) + b"\xbe" * num_references
    sent = (frame(1, 5, 1 + 2 * index, again if index else first) for index in range(num_calls))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + b"".join(sent)


def calling(address: Address, until_s: float, data: bytes, bytes_per_s: float) -> int:
    """Connections that send `data` and hang up, `NUM_CALLERS` at a time; how many there were."""
    selector, count, num_bytes, began_s = selectors.DefaultSelector(), 0, 0, time.monotonic()

    def open_one() -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(address)
        selector.register(sock, selectors.EVENT_WRITE, [data])

    for _ in range(NUM_CALLERS):
        open_one()
    while (now_s := time.monotonic()) < until_s:
        if num_bytes > bytes_per_s * (now_s - began_s):
            time.sleep(0.005)
            continue
        for key, _ in selector.select(0.1):
            sock, left = key.fileobj, key.data
            assert isinstance(sock, socket.socket)
            try:
                num_sent = sock.send(left[0][: 1 << 16])
                num_bytes += num_sent
                left[0] = left[0][num_sent:]
            except BlockingIOError:
                continue
            except OSError:
                left[0] = b""
            if not left[0]:
                selector.unregister(sock)
                sock.close()
                count += 1
                open_one()
    for key in list(selector.get_map().values()):
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()
    return count


def unread(address: Address, until_s: float, keys: Sequence[str], max_tokens: int) -> int:
    """Streams of a connection for each key, which reads nothing; how many there were."""
    with ExitStack() as connections:
        for key in keys:
            sock = connections.enter_context(socket.create_connection(address))
            sock.sendall(streams(key, max_tokens))
        time.sleep(max(0.0, until_s - time.monotonic()))
    return NUM_UNREAD * len(keys)


def streams(key: str, max_tokens: int) -> bytes:
    names = {b":method": b"POST", b":scheme": b"http", b":path": STREAM, b":authority": b"localhost"}
    names |= {
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        b"authorization": b"Bearer " + key.encode(),
    }
    headers = b"".join(field(name, value) for name, value in names.items())
    again = bytes(0x80 | 62 + index for index in reversed(range(len(names))))
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    text = pb.GenerateRequest(prompt=pb.Prompt(text="with"), sampling=sampling).SerializeToString()
    message = b"\0" + len(text).to_bytes(4) + text
    sent = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(4, 0, 0), frame(4, 1, 0)]
    for index in range(NUM_UNREAD):
        sent += [frame(1, 4, 1 + 2 * index, again if index else headers), frame(0, 1, 1 + 2 * index, message)]
    return b"".join(sent)


def silent(address: Address, until_s: float) -> int:
    """Connections that say nothing; how many there were."""
    held: deque[socket.socket] = deque()
    count = 0
    while time.monotonic() < until_s:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(address)
        held.append(sock)
        count += 1
        if len(held) > MAX_HELD:
            held.popleft().close()
        if count % 50 == 0:
            time.sleep(0.002)
    for sock in held:
        sock.close()
    return count


def sending(address: Address, until_s: float, data: bytes, num_at_once: int) -> int:
    """Sends requests, each on a connection of its own, and reads nothing; how many there were."""
    counts = [0] * num_at_once

    def send(index: int) -> None:
        while time.monotonic() < until_s:
            try:
                with socket.create_connection(address, timeout=max(0.1, until_s - time.monotonic())) as sock:
                    sock.sendall(data)
                    counts[index] += 1
            except OSError:
                pass

    threads = [threading.Thread(target=send, args=(index,)) for index in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


def over_grpc(address: str, key: str = "", max_tokens: int = 1) -> None:
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    request = pb.GenerateRequest(prompt=pb.Prompt(text="with"), sampling=sampling)
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    with grpc.insecure_channel(address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        rpc.GenerationStub(channel).Generate(request, timeout=10, wait_for_ready=True, metadata=metadata)


def over_http(address: str) -> None:
    with httpx.Client(trust_env=False, timeout=10) as client:
        client.post(
            f"http://{address}/v1/completions", json={"prompt": "with", "max_tokens": 1}
        ).raise_for_status()


def newcomers(ask: Callable[[str], None], address: str, until_s: float) -> tuple[list[float], int]:
    """Milliseconds of those that were served, and how many were not."""
    times, num_failed = [], 0
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        try:
            ask(address)
            times.append((time.monotonic() - began_s) * 1e3)
        except (grpc.RpcError, httpx.HTTPError):
            num_failed += 1
    return times, num_failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("floods", nargs="*", metavar="KIND", default=KINDS)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--megabytes", type=float, default=20.0, help="of calls or headers, a second")
    parser.add_argument("--max-tokens", type=int, default=2000, help="of each stream that is not read")
    parser.add_argument(
        "--flood-key", type=Path, nargs="+", metavar="FILE", help="whose streams are not read"
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="of the newcomers")
    parser.add_argument("--grpc", default="127.0.0.1:50051")
    parser.add_argument("--http", default="127.0.0.1:8000")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    key = args.key.read_text().strip() if args.key else ""
    flood_keys = [path.read_text().strip() for path in args.flood_key or ()]
    for flood in args.floods:
        if flood not in (*KINDS, "unread"):
            parser.error(f"{flood!r} is no kind of flood, expected one of {', '.join((*KINDS, 'unread'))}")
        if flood == "unread" and not (args.flood_key and args.key):
            parser.error(
                "unread: expected --flood-key and --key, as clients of one address are one client without"
                " keys"
            )
        address, ask = (
            (args.http, over_http)
            if flood in ("http", "chunks", "cancels")
            else (args.grpc, partial(over_grpc, key=key))
        )
        if flood == "unread":
            ask = partial(over_grpc, key=key, max_tokens=8)
        host, _, port = address.rpartition(":")
        if not is_loopback(host):
            parser.error(f"{address}: only a server on this machine is flooded")
        ask(address)
        until_s = time.monotonic() + min(args.seconds, 60.0)
        sent: list[int] = []
        attack = {
            "unread": partial(unread, keys=flood_keys, max_tokens=args.max_tokens),
            "chunks": partial(sending, data=CHUNKS, num_at_once=40),
            "cancels": partial(sending, data=REQUEST, num_at_once=8),
            "calls": partial(calling, data=calls(20_000, 0), bytes_per_s=args.megabytes * 1e6),
            "headers": partial(calling, data=calls(100, 4000), bytes_per_s=args.megabytes * 1e6),
        }.get(flood, silent)
        thread = threading.Thread(
            target=lambda attack=attack: sent.append(attack((host, int(port)), until_s))  # noqa: B023
        )
        thread.start()
        times, num_failed = newcomers(ask, address, until_s)
        thread.join()
        figures: dict[str, float] = {"served": len(times), "not served": num_failed}
        if times:
            figures |= {"median ms": round(statistics.median(times), 1), "slowest ms": round(max(times), 1)}
        print(f"{flood:7} {sent[0]:6} sent, newcomers {json.dumps(figures)}", flush=True)


if __name__ == "__main__":
    main()
