"""The latency of rendering a short conversation: in the process for it, as the head does, and on a thread of
the head, which would need no process but has no bounds.

    python -m bench.microbench.templates              # the embedded model's template, 4 messages
    python -m bench.microbench.templates --messages 50

Both take turns, so that other work on the machine meets both. The process includes the conversation's way
there and back; the head's own processor time is the time that its loop does not have for streams."""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

from pdserve.core.config import LimitsSection
from pdserve.embedded import MODEL_DIR
from pdserve.gateway.offload.offload import Offload
from pdserve.gateway.text.tokenizer import Tokenizer
from pdserve.gateway.tools.conversation import template_messages
from pdserve.proto import pdserve_pb2 as pb

WARM_UP = 20


async def measure(num_messages: int, num_renders: int) -> None:
    tokenizer = Tokenizer.load(MODEL_DIR)
    tokenizer.templates.compile()
    offload, limits = Offload(tokenizer, "embedded", 131_072), LimitsSection()
    roles = ("user", "assistant")
    messages = [
        pb.ChatMessage(role=roles[i % 2], content="how does it work? " * 5) for i in range(num_messages)
    ]
    chat = pb.Chat(messages=messages)

    def here() -> str:
        return tokenizer.templates.render(template_messages(chat, takes_calls=True))

    ways: dict[str, Callable[[], Awaitable[str]]] = {
        "in the process": lambda: offload.render(chat, limits, "client"),
        "on a thread": lambda: offload.threads.run("client", here),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    assert len({await render() for render in ways.values()}) == 1
    for _ in range(WARM_UP + num_renders):
        for name, render in ways.items():
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            await render()
            times[name].append((time.perf_counter() - began_s, time.process_time() - began_cpu_s))
    await offload.stop()
    print(f"{num_messages} messages, {chat.ByteSize()} bytes, {num_renders} renders each")
    print(f"{'':16}{'median':>10}{'p99':>10}{'head CPU':>12}")
    for name, taken in times.items():
        latencies_ms = sorted(1000 * wall_s for wall_s, _ in taken[WARM_UP:])
        cpu_ms = 1000 * statistics.median(cpu_s for _, cpu_s in taken[WARM_UP:])
        p99_ms = latencies_ms[len(latencies_ms) * 99 // 100]
        print(f"{name:16}{statistics.median(latencies_ms):7.2f} ms{p99_ms:7.2f} ms{cpu_ms:9.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=4)
    parser.add_argument("--renders", type=int, default=500)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.messages, arguments.renders))


if __name__ == "__main__":
    main()
