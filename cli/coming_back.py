"""A stream that survives the death of the router: the client reconnects for the rest, its reader sees a
pause."""

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator

import grpc

from ..proto import pdserve_pb2 as pb
from .client import Client, is_unreachable

PATIENCE_S = 30.0  # the time for which workers keep the output of a disconnected client


class _Given:
    """The output that a stream's reader has received, so that nothing is delivered twice."""

    def __init__(self) -> None:
        self._num_tokens: defaultdict[int, int] = defaultdict(int)
        self._ended: set[int] = set()
        self._held: dict[
            int, pb.GenerateEvent
        ] = {}  # text without tokens: it comes again with the end of its choice

    def num_tokens(self, num_choices: int) -> list[int]:
        return [self._num_tokens[choice] for choice in range(num_choices)]

    def take(self, event: pb.GenerateEvent) -> Iterator[pb.GenerateEvent]:
        """Returns the new part of it, and of the output held back."""
        match event.WhichOneof("event"):
            case "tokens" if not event.tokens.token_ids:
                self._held[event.tokens.choice] = event
            case "tokens":
                self._num_tokens[event.tokens.choice] += len(event.tokens.token_ids)
                yield event
            case "choice_end":
                choice = event.choice_end.choice
                held = self._held.pop(choice, None)
                if choice not in self._ended:
                    self._ended.add(choice)
                    yield from (event,) if held is None else (held, event)
            case _:
                yield event


def resuming_stream(
    client: Client, request: pb.GenerateRequest, timeout: float | None = None
) -> Iterator[pb.GenerateEvent]:
    """The events of `GenerateStream`, over as many connections as it takes.

    Raises grpc.RpcError when the request fails, when no server answers its first call, and when none is back
    within half a minute, or `timeout` seconds from now."""
    ends_s = None if timeout is None else time.monotonic() + timeout
    mine = pb.GenerateRequest()
    mine.CopyFrom(request)
    mine.request_id = request.request_id or uuid.uuid4().hex
    given, has_begun = _Given(), False
    while True:
        left_s = None if ends_s is None else max(0.0, ends_s - time.monotonic())
        try:
            for event in client.generation.GenerateStream(mine, timeout=left_s):
                has_begun = True
                yield from given.take(event)
            return
        except grpc.RpcError as error:
            patience_s = PATIENCE_S if left_s is None else min(PATIENCE_S, left_s)
            if not (has_begun and is_unreachable(error) and client.is_answered(patience_s)):
                raise
        mine.resume_from[:] = given.num_tokens(max(1, request.sampling.n))
