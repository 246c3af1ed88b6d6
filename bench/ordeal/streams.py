"""Clients' streams: what to ask, what came and when, and whether it is what an undisturbed run brings."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

STREAM_TIMEOUT_S = 180.0
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}


@dataclass(frozen=True)
class Template:
    """A request that is made again and again, each time with another salt, so that its prompt is computed and sent anew."""

    prompt: tuple[int, ...]
    sampling: dict[str, Any]

    def request(self, salt: str) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            prompt=pb.Prompt(token_ids=pb.TokenIds(ids=self.prompt)),
            sampling=pb.SamplingParams(**self.sampling),
            cache_salt=salt,
        )


@dataclass
class Choice:
    """Tokens of one choice and when each came; its text."""

    token_ids: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: int | None = None


@dataclass
class Stream:
    """One answer, as its client saw it. `error`: why it is not a stream as promised."""

    template: Template
    start_s: float
    choices: dict[int, Choice] = field(default_factory=lambda: defaultdict(Choice))
    attempts: Sequence[pb.Attempt] = ()
    error: str | None = None
    is_ended: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in list(self.choices.values()))

    def outcome(self, undisturbed: "Stream") -> str:
        """ "whole", "lost" (no ending of its own) or "altered" (other tokens, text or endings than the undisturbed run)."""
        if not self.is_ended:
            return "lost"
        if self.error is not None:
            return "altered"
        same = self.choices.keys() == undisturbed.choices.keys() and all(
            (mine.token_ids, mine.text, mine.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
            for mine, theirs in ((self.choices[number], undisturbed.choices[number]) for number in undisturbed.choices)
        )
        return "whole" if same else "altered"

    def take(self, event: pb.GenerateEvent) -> None:
        """One message; a gap, a repetition or a second ending is an error."""
        if self.is_ended:
            self.error = "a message after the end"
        match event.WhichOneof("event"):
            case "tokens":
                delta, choice = event.tokens, self.choices[event.tokens.choice]
                if choice.finish_reason is not None or (delta.token_ids and delta.index != len(choice.token_ids)):
                    self.error = f"choice {delta.choice}: index {delta.index} after {len(choice.token_ids)} tokens"
                choice.token_ids += delta.token_ids
                choice.arrivals_s += [time.monotonic()] * len(delta.token_ids)
                choice.text += delta.text
            case "choice_end":
                choice = self.choices[event.choice_end.choice]
                if choice.finish_reason is not None:
                    self.error = f"choice {event.choice_end.choice} ended twice"
                choice.finish_reason = event.choice_end.finish_reason
            case "end":
                self.is_ended = True
                self.attempts = event.end.timeline.attempts
                if any(choice.finish_reason is None for choice in self.choices.values()):
                    self.error = "the request ended before its choices"


def make_templates(rng: random.Random, count: int) -> list[Template]:
    """Short and long prompts, greedy and seeded, some with two choices."""
    templates = []
    for number in range(count):
        prompt = tuple(rng.randrange(10, 4000) for _ in range(rng.choice((12, 200, 700, 1300))))
        sampling: dict[str, Any] = {"max_tokens": rng.randrange(200, 700), "ignore_eos": True, "temperature": 0.0}
        if number % 2:
            sampling |= SAMPLED | {"seed": rng.randrange(1 << 32), "n": rng.choice((1, 1, 2))}
        templates.append(Template(prompt, sampling))
    return templates


def run_stream(stub: rpc.GenerationStub, stream: Stream, salt: str) -> Stream:
    """To its end, whatever that is."""
    stream.start_s = time.monotonic()
    try:
        for event in stub.GenerateStream(stream.template.request(salt), timeout=STREAM_TIMEOUT_S):
            stream.take(event)
    except grpc.RpcError as error:
        stream.error, stream.is_ended = f"{error.code().name}: {error.details()}", False
    return stream


def run_streams(
    stub: rpc.GenerationStub, templates: Sequence[Template], salt: str, meanwhile: Callable[[list[Stream]], None] | None = None
) -> list[Stream]:
    """All at once; `meanwhile` runs beside them and may look at them. Returns when each has ended."""
    streams = [Stream(template, time.monotonic()) for template in templates]
    with ThreadPoolExecutor(max_workers=len(streams)) as pool:
        running = [pool.submit(run_stream, stub, stream, f"{salt}/{number}") for number, stream in enumerate(streams)]
        if meanwhile is not None:
            meanwhile(streams)
        return [future.result() for future in running]
