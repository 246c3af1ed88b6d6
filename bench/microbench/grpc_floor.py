"""The cost of a streamed message in grpc.aio alone: a server that sends the same bytes over and over.

    python -m bench.microbench.grpc_floor [--streams 256] [--messages 200] [--tokens-a-message 1]

No message is built or serialised, and nothing is computed. In each turn every stream sends one message, by
`context.write` or by yielding it. The server runs on the first core, its client on the second: the one of
`streaming.py`, whose figures for gRPC contain this floor."""

import argparse
import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import grpc

from bench.microbench.stream_clients import Count, over_grpc
from pdserve.proto import pdserve_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]


def unchanged(message: bytes) -> bytes:
    return message


def message_of(num_tokens: int) -> bytes:
    delta = pb.TokenDelta(choice=0, index=100, token_ids=[1234] * num_tokens, text=" word" * num_tokens)
    return pb.GenerateEvent(tokens=delta).SerializeToString()


class Cost(NamedTuple):
    """The server's CPU time."""

    start_us: float  # of a call
    message_us: float


def used_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Turns:
    """Lets all streams send one message, then the next."""

    def __init__(self, num_streams: int, num_messages: int, message: bytes) -> None:
        self._num_streams, self._num_messages, self._message = num_streams, num_messages, message
        self._waiting: list[asyncio.Future[None]] = []
        self._are_all_there = asyncio.Event()

    async def _come(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if len(self._waiting) == self._num_streams:
            self._are_all_there.set()
        await turn

    async def write(self, request: bytes, context: Context) -> None:
        for _ in range(self._num_messages):
            await self._come()
            await context.write(self._message)

    async def give(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        for _ in range(self._num_messages):
            await self._come()
            yield self._message

    async def take(self) -> Cost:
        """Returns the cost, once all streams have ended."""
        server_s = used_s()
        await self._are_all_there.wait()
        started_s = used_s()
        for _ in range(self._num_messages):
            await self._are_all_there.wait()
            self._are_all_there.clear()
            turn, self._waiting = self._waiting, []
            for one in turn:
                one.set_result(None)
        per_message_s = (used_s() - started_s) / (self._num_streams * self._num_messages)
        return Cost((started_s - server_s) / self._num_streams * 1e6, per_message_s * 1e6)


async def serve(how: str, num_streams: int, num_messages: int, num_tokens: int) -> None:
    turns = Turns(num_streams, num_messages, message_of(num_tokens))
    handler = grpc.unary_stream_rpc_method_handler(
        turns.write if how == "write" else turns.give, unchanged, unchanged
    )
    server = grpc.aio.server()
    service = grpc.method_handlers_generic_handler("pdserve.v1.Generation", {"GenerateStream": handler})
    server.add_generic_rpc_handlers((service,))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    print(*await turns.take(), flush=True)
    await server.stop(5.0)


def measure(how: str, num_streams: int, num_messages: int, num_tokens: int) -> Cost:
    arguments = [f"--serve={how}", f"--streams={num_streams}", f"--messages={num_messages}"]
    arguments.append(f"--tokens-a-message={num_tokens}")
    server = subprocess.Popen(
        [sys.executable, "-m", "bench.microbench.grpc_floor", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(server.pid, {cores[0]})
    os.sched_setaffinity(0, {cores[-1]})
    port = int(server.stdout.readline())
    asyncio.run(over_grpc([pb.GenerateRequest()] * num_streams, port, Count()))
    cost = Cost(*map(float, server.stdout.readline().split()))
    server.wait()
    os.sched_setaffinity(0, set(cores))
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument("--tokens-a-message", type=int, default=1)
    parser.add_argument("--serve", choices=("write", "yield"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.serve, args.streams, args.messages, args.tokens_a_message))
        return
    for how in ("write", "yield"):
        cost = measure(how, args.streams, args.messages, args.tokens_a_message)
        print(f"{how}: a call's start {cost.start_us:.0f} us CPU, a message {cost.message_us:.1f} us CPU")


if __name__ == "__main__":
    main()
