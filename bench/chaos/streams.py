"""Clients' streams: what to ask, what came and when, and whether it is what an undisturbed run brings.

A client whose router died reconnects under its request's name for the missing tokens. The requirement stays
the same: all connections together must return what a single one would."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
from grpc_status import rpc_status

from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

STREAM_TIMEOUT_S = 180.0
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}


@dataclass(frozen=True)
class Template:
    """A request that is made again and again, each time under another name, which is also its salt, so that
    its prompt is computed and sent anew."""

    prompt: tuple[int, ...]
    sampling: dict[str, Any]

    @property
    def num_choices(self) -> int:
        return int(self.sampling.get("n", 1))

    def request(self, name: str, resume_from: Sequence[int] = ()) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            request_id=name,
            prompt=pb.Prompt(token_ids=pb.TokenIds(ids=self.prompt)),
            sampling=pb.SamplingParams(**self.sampling),
            cache_salt=name,
            resume_from=resume_from,
        )


@dataclass
class Choice:
    """Tokens of one choice and when each came; its text and its ending."""

    token_ids: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    token_text: str = ""
    last_text: str = ""  # that came without tokens: it belongs to the ending
    finish_reason: int | None = None
    earlier_endings: set[tuple[str, int]] = field(default_factory=set)  # on connections that broke

    @property
    def text(self) -> str:
        return self.token_text + self.last_text

    @property
    def error(self) -> str | None:
        """The reason why it has not ended as promised."""
        if self.finish_reason is None:
            return "the request ended before its choices"
        if self.earlier_endings - {(self.last_text, self.finish_reason)}:
            return f"ended otherwise before its router died: {self.earlier_endings}"
        return None

    def take(self, delta: pb.TokenDelta) -> str | None:
        """Adds a part; returns the error in it, if any."""
        error = None
        if self.finish_reason is not None or self.last_text or delta.index != len(self.token_ids):
            error = f"choice {delta.choice}: index {delta.index} after {len(self.token_ids)} tokens"
        self.token_ids += delta.token_ids
        self.arrivals_s += [time.monotonic()] * len(delta.token_ids)
        if delta.token_ids:
            self.token_text += delta.text
        else:
            self.last_text += delta.text
        return error

    def forget_ending(self) -> None:
        """Forgets the ending, which the next connection repeats and which must be the same."""
        if self.finish_reason is not None:
            self.earlier_endings.add((self.last_text, self.finish_reason))
        self.last_text, self.finish_reason = "", None


@dataclass
class ObservedStream:
    """One answer, as its client saw it. `error`: why it is not a stream as promised."""

    template: Template
    start_s: float
    choices: dict[int, Choice] = field(default_factory=lambda: defaultdict(Choice))
    attempts: Sequence[pb.Attempt] = ()
    error: str | None = None
    is_ended: bool = False
    breaks_s: list[float] = field(default_factory=list)  # when its connection broke, and it came back

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in list(self.choices.values()))

    def longest_pause(self) -> tuple[float, float]:
        """The longest time without a token of a choice, in seconds, and when it began."""
        return max(
            (
                (later_s - earlier_s, earlier_s)
                for choice in self.choices.values()
                for earlier_s, later_s in pairwise([self.start_s, *choice.arrivals_s])
            ),
            default=(0.0, self.start_s),
        )

    def outcome(self, undisturbed: "ObservedStream") -> str:
        """ "whole", "lost" (no ending of its own) or "altered" (other tokens, text or endings than the
        undisturbed run)."""
        if not self.is_ended:
            return "lost"
        if self.error is not None:
            return "altered"
        same = self.choices.keys() == undisturbed.choices.keys() and all(
            (mine.token_ids, mine.text, mine.finish_reason)
            == (theirs.token_ids, theirs.text, theirs.finish_reason)
            for mine, theirs in (
                (self.choices[number], undisturbed.choices[number]) for number in undisturbed.choices
            )
        )
        return "whole" if same else "altered"

    def take(self, event: pb.GenerateEvent) -> None:
        """One message; a gap, a repetition or a second ending is an error."""
        if self.is_ended:
            self.error = "a message after the end"
        match event.WhichOneof("event"):
            case "tokens":
                self.error = self.choices[event.tokens.choice].take(event.tokens) or self.error
            case "choice_end":
                choice = self.choices[event.choice_end.choice]
                if choice.finish_reason is not None:
                    self.error = f"choice {event.choice_end.choice} ended twice"
                choice.finish_reason = event.choice_end.finish_reason
            case "end":
                self.is_ended = True
                self.attempts = event.end.timeline.attempts
                self.error = next(
                    filter(None, (choice.error for choice in self.choices.values())), self.error
                )

    def break_off(self) -> list[int]:
        """The connection broke. Returns how many tokens of each choice need not come again."""
        self.breaks_s.append(time.monotonic())
        for choice in self.choices.values():
            choice.forget_ending()
        have = {number: len(choice.token_ids) for number, choice in self.choices.items()}
        return [have.get(number, 0) for number in range(self.template.num_choices)]


def make_templates(rng: random.Random, count: int) -> list[Template]:
    """Short and long prompts, greedy and seeded, some with two choices."""
    templates = []
    for number in range(count):
        prompt = tuple(rng.randrange(10, 4000) for _ in range(rng.choice((12, 200, 700, 1300))))
        sampling: dict[str, Any] = {
            "max_tokens": rng.randrange(200, 700),
            "ignore_eos": True,
            "temperature": 0.0,
        }
        if number % 2:
            sampling |= SAMPLED | {"seed": rng.randrange(1 << 32), "n": rng.choice((1, 1, 2))}
        templates.append(Template(prompt, sampling))
    return templates


def run_stream(stub: rpc.GenerationStub, stream: ObservedStream, name: str) -> ObservedStream:
    """Runs a stream to its end, however it ends, over as many connections as it takes."""
    stream.start_s = time.monotonic()
    request = stream.template.request(name)
    while (error := _run_connection(stub, stream, request)) is not None and not stream.is_ended:
        if not _is_without_router(error):
            stream.error = f"{error.code().name}: {error.details()}"
            break
        request = stream.template.request(name, resume_from=stream.break_off())
    return stream


def _run_connection(
    stub: rpc.GenerationStub, stream: ObservedStream, request: pb.GenerateRequest
) -> grpc.RpcError | None:
    timeout_s = stream.start_s + STREAM_TIMEOUT_S - time.monotonic()
    try:
        for event in stub.GenerateStream(request, timeout=timeout_s, wait_for_ready=True):
            stream.take(event)
    except grpc.RpcError as error:
        return error
    return None


def _is_without_router(error: grpc.RpcError) -> bool:
    """Whether gRPC lost its peer; every error of pdserve's own has details."""
    # it is a call, too
    return error.code() is grpc.StatusCode.UNAVAILABLE and rpc_status.from_call(error) is None  # type: ignore[arg-type]


def run_streams(
    stub: rpc.GenerationStub,
    templates: Sequence[Template],
    name: str,
    meanwhile: Callable[[list[ObservedStream]], None] | None = None,
) -> list[ObservedStream]:
    """Runs all streams at once; `meanwhile` runs beside them and may inspect them. Returns when each has
    ended."""
    streams = [ObservedStream(template, time.monotonic()) for template in templates]
    with ThreadPoolExecutor(max_workers=len(streams)) as pool:
        running = [
            pool.submit(run_stream, stub, stream, f"{name}/{number}") for number, stream in enumerate(streams)
        ]
        if meanwhile is not None:
            meanwhile(streams)
        return [future.result() for future in running]
