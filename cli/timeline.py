"""Draws a request's time: one line per leg, to scale.

queue                 █                                         0.4 ms
prefill   worker-1     ███████                                   41 ms  18 tokens
transfer                   ░░░▓                                  12 ms  1.2 MiB in 3 chunks, 75 % hidden
decode    worker-0             █████████████████████████████    760 ms  64 tokens, 11.9 ms each
"""

from collections.abc import Iterator

from ..core.config_types import format_size
from ..proto import pdserve_pb2 as pb

WIDTH = 48  # characters for the whole request


def timeline_lines(end: pb.RequestEnd) -> Iterator[str]:
    """The picture of one request, line by line."""
    timeline, usage = end.timeline, end.usage
    first = f", first token after {_ms(timeline.first_token_s)}" if timeline.HasField("first_token_s") else ""
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    yield (
        f"{usage.prompt_tokens}{cached} + {usage.completion_tokens} tokens in {_ms(timeline.ended_s)}{first}"
    )
    scale = WIDTH / timeline.ended_s if timeline.ended_s > 0 else 0.0
    for attempt in timeline.attempts:
        if len(timeline.attempts) > 1:
            yield f"attempt {attempt.attempt}"
        yield from _attempt_lines(attempt, usage.completion_tokens, scale)


def _attempt_lines(attempt: pb.Attempt, num_tokens: int, scale: float) -> Iterator[str]:
    prefill, transfer, decode = attempt.prefill, attempt.transfer, attempt.decode
    dispatched_s = attempt.dispatched_s
    yield _line("queue", "", _bar(attempt.queued_s, dispatched_s, scale), dispatched_s - attempt.queued_s)
    first_s = attempt.first_token_s if attempt.HasField("first_token_s") else dispatched_s
    compute_s = prefill.compute_s if prefill.HasField("compute_s") else first_s - dispatched_s
    note = f"{prefill.num_tokens} tokens"
    yield _line(
        "prefill",
        prefill.worker,
        _bar(max(first_s - compute_s, dispatched_s), first_s, scale),
        compute_s,
        note,
    )
    if attempt.HasField("transfer"):
        note = (
            f"{format_size(transfer.num_bytes)} in {_chunks(transfer.num_chunks)},"
            f" {transfer.hidden_share:.0%} hidden"
        )
        yield _line("transfer", "", _transfer_bar(transfer, first_s, scale), transfer.duration_s, note)
    if attempt.HasField("decode"):
        note = (
            f"{num_tokens} tokens, {_ms(decode.duration_s / (num_tokens - 1))} each" if num_tokens > 1 else ""
        )
        yield _line(
            "decode",
            decode.worker,
            _bar(first_s, first_s + decode.duration_s, scale),
            decode.duration_s,
            note,
        )


def _bar(start_s: float, end_s: float, scale: float) -> str:
    start = min(round(start_s * scale), WIDTH - 1)
    return " " * start + "█" * max(1, min(round(end_s * scale), WIDTH) - start)


def _transfer_bar(transfer: pb.TransferLeg, first_s: float, scale: float) -> str:
    """Light while the prefill was computing, dark after it."""
    end_s = first_s + transfer.exposed_s
    end = min(max(round(end_s * scale), 1), WIDTH)
    start = min(max(round((end_s - transfer.duration_s) * scale), 0), end - 1)
    prefilled = min(max(round(first_s * scale), start), end)
    return " " * start + "░" * (prefilled - start) + "▓" * (end - prefilled)


def _line(leg: str, worker: str, bar: str, duration_s: float, note: str = "") -> str:
    return f"{leg:<9} {worker:<12} {bar:<{WIDTH}}  {_ms(duration_s):>8}  {note}".rstrip()


def _ms(duration_s: float) -> str:
    duration_ms = duration_s * 1e3
    return f"{duration_ms:.0f} ms" if duration_ms >= 10 else f"{duration_ms:.1f} ms"


def _chunks(count: int) -> str:
    return "1 chunk" if count == 1 else f"{count} chunks"
