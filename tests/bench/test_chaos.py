"""`python -m bench.chaos` classifies streams as lost or altered, over one connection or several, and finds
the cause."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from bench.chaos.accidents import InjectedAccident, Victim
from bench.chaos.account import Account
from bench.chaos.streams import ObservedStream, Template, run_stream
from bench.chaos.watch import Watch
from pdserve.proto import pdserve_pb2 as pb

TEMPLATE = Template((1, 2, 3), {"max_tokens": 3})
CHOICE_END = pb.GenerateEvent(choice_end=pb.ChoiceEnd(finish_reason=pb.FINISH_REASON_LENGTH))
END = pb.GenerateEvent(end=pb.RequestEnd())
KILL = {"is_whole_pool": False, "duration_s": 0.0, "delay_s": 0.0, "aftermath_s": 0.0, "progress": 0.5}


def tokens(index: int, *token_ids: int) -> pb.GenerateEvent:
    return pb.GenerateEvent(tokens=pb.TokenDelta(index=index, token_ids=token_ids, text="x" * len(token_ids)))


def stream(*events: pb.GenerateEvent) -> ObservedStream:
    taken = ObservedStream(TEMPLATE, start_s=0.0)
    for event in events:
        taken.take(event)
    return taken


UNDISTURBED = stream(tokens(0, 7), tokens(1, 8, 9), CHOICE_END, END)


def test_the_same_tokens_in_other_pieces_are_the_same_stream() -> None:
    assert stream(tokens(0, 7, 8), tokens(2, 9), CHOICE_END, END).outcome(UNDISTURBED) == "whole"


@pytest.mark.parametrize(
    "events",
    [
        [tokens(0, 7), tokens(2, 9), CHOICE_END, END],  # a gap
        [tokens(0, 7), tokens(0, 7), tokens(1, 8, 9), CHOICE_END, END],  # a repetition
        [tokens(0, 7, 8, 6), CHOICE_END, END],  # another token
        [tokens(0, 7, 8), CHOICE_END, END],  # too few
        [tokens(0, 7, 8, 9), CHOICE_END, CHOICE_END, END],  # two endings
        [tokens(0, 7, 8, 9), END],  # no ending of the choice
        [tokens(0, 7, 8, 9), CHOICE_END, END, END],
    ],
)
def test_any_difference_is_an_altered_stream(events: list[pb.GenerateEvent]) -> None:
    assert stream(*events).outcome(UNDISTURBED) == "altered"


def test_a_stream_without_its_end_is_lost() -> None:
    assert stream(tokens(0, 7, 8, 9), CHOICE_END).outcome(UNDISTURBED) == "lost"


def test_a_resumption_is_measured_from_the_accident_to_the_next_token() -> None:
    """Two tokens had come when the decode worker was killed; the third is the first of the second attempt."""
    resumed = stream(tokens(0, 7), tokens(1, 8, 9), CHOICE_END, END)
    resumed.choices[0].arrivals_s = [1.0, 1.1, 2.5]
    attempts = [
        pb.Attempt(
            attempt=0, choices=[0], queued_s=0.0, prefill=pb.PrefillLeg(worker="prefill-0", num_tokens=3)
        ),
        pb.Attempt(
            attempt=1, choices=[0], queued_s=2.1, prefill=pb.PrefillLeg(worker="prefill-1", num_tokens=5)
        ),
    ]
    attempts[0].decode.worker = "decode-0"
    resumed.attempts = attempts
    kill = killed("decode", 2.0)
    account = Account()
    assert account.add_round([kill], [resumed], [UNDISTURBED]) == []
    assert account.resumed_s == {"kill, decode": [0.5]}
    assert account.hits == {"in decode": 1}


# over several connections


class Unavailable(grpc.RpcError):
    """The router is gone, or says itself that it cannot serve."""

    def __init__(self, is_said: bool = False) -> None:
        status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message=self.details())
        self._trailers = (("grpc-status-details-bin", status.SerializeToString()),) if is_said else ()

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "unavailable"

    def trailing_metadata(self) -> Any:
        return self._trailers


class ScriptedStub:
    """Stands for a stub: plays one connection after the other."""

    def __init__(self, *connections: list[pb.GenerateEvent | grpc.RpcError]) -> None:
        self._connections = iter(connections)
        self.requests: list[pb.GenerateRequest] = []

    def GenerateStream(
        self, request: pb.GenerateRequest, timeout: float, wait_for_ready: bool
    ) -> Iterator[pb.GenerateEvent]:
        self.requests.append(request)
        for event in next(self._connections):
            if isinstance(event, grpc.RpcError):
                raise event
            yield event


def run(
    *connections: list[pb.GenerateEvent | grpc.RpcError], num_choices: int = 1
) -> tuple[ObservedStream, list[list[int]]]:
    """The stream, and from where its client asked for it each time."""
    router = ScriptedStub(*connections)
    template = Template(TEMPLATE.prompt, TEMPLATE.sampling | {"n": num_choices})
    stream = run_stream(router, ObservedStream(template, start_s=0.0), "a stream")  # type: ignore[arg-type]
    assert {request.request_id for request in router.requests} == {"a stream"}
    return stream, [list(request.resume_from) for request in router.requests]


def test_a_client_reconnects_for_missing_tokens_until_complete() -> None:
    resumed, asked = run(
        [Unavailable()],
        [tokens(0, 7), Unavailable()],
        [tokens(1, 8), Unavailable()],
        [tokens(2, 9), CHOICE_END, END],
    )
    assert asked == [[], [0], [1], [2]]
    assert resumed.outcome(UNDISTURBED) == "whole"


def test_repeated_endings_count_their_text_once() -> None:
    last_text = pb.GenerateEvent(tokens=pb.TokenDelta(index=3, text="!"))
    other = pb.GenerateEvent(tokens=pb.TokenDelta(choice=1, token_ids=[5]))
    other_end = pb.GenerateEvent(choice_end=pb.ChoiceEnd(choice=1, finish_reason=pb.FINISH_REASON_LENGTH))
    undisturbed, _ = run([tokens(0, 7, 8, 9), last_text, CHOICE_END, other, other_end, END], num_choices=2)
    resumed, asked = run(
        [tokens(0, 7, 8, 9), last_text, Unavailable()],
        [last_text, CHOICE_END, Unavailable()],
        [other, other_end, last_text, CHOICE_END, END],
        num_choices=2,
    )
    assert asked == [[], [3, 0], [3, 0]]
    assert resumed.choices[0].text == "xxx!"
    assert resumed.outcome(undisturbed) == "whole"


def test_a_stream_that_broke_off_behind_its_end_is_whole() -> None:
    resumed, asked = run([tokens(0, 7, 8, 9), CHOICE_END, END, Unavailable()])
    assert asked == [[]]
    assert resumed.outcome(UNDISTURBED) == "whole"


STOPPED = pb.GenerateEvent(choice_end=pb.ChoiceEnd(finish_reason=pb.FINISH_REASON_STOP))


@pytest.mark.parametrize(
    "rest",
    [
        [tokens(0, 7), tokens(1, 8, 9), CHOICE_END, END],  # a repetition
        [tokens(2, 9), CHOICE_END, END],  # a gap
        [tokens(1, 8, 6), CHOICE_END, END],  # another token
        [tokens(1, 8, 9), END],  # no ending of the choice
    ],
)
def test_any_difference_after_a_client_came_back_is_an_altered_stream(rest: list[pb.GenerateEvent]) -> None:
    assert run([tokens(0, 7), Unavailable()], list(rest))[0].outcome(UNDISTURBED) == "altered"


@pytest.mark.parametrize("rest", [[STOPPED, END], [tokens(3, 6), CHOICE_END, END], [END]])
def test_an_ended_choice_ends_the_same_way_after_a_reconnect(
    rest: list[pb.GenerateEvent],
) -> None:
    ended: list[pb.GenerateEvent | grpc.RpcError] = [tokens(0, 7, 8, 9), STOPPED, Unavailable()]
    assert run(ended, [CHOICE_END, END])[0].outcome(UNDISTURBED) == "altered"
    ended[1] = CHOICE_END
    assert run(ended, [CHOICE_END, END])[0].outcome(UNDISTURBED) == "whole"
    assert run(ended, list(rest))[0].outcome(UNDISTURBED) == "altered"


def test_a_stream_that_the_router_itself_gave_up_is_lost() -> None:
    lost, asked = run([tokens(0, 7), Unavailable(is_said=True)])
    assert asked == [[]]
    assert lost.outcome(UNDISTURBED) == "lost"


def killed(role: str, at_s: float) -> InjectedAccident:
    name = "router" if role == "router" else f"{role}-0"
    return InjectedAccident("kill", role, "mid decode", **KILL, at_s=at_s, victims=[Victim(name, 1)])  # type: ignore[arg-type]


def came_back(broken_s: list[float], arrivals_s: list[float]) -> ObservedStream:
    taken = stream(tokens(0, 7), tokens(1, 8, 9), CHOICE_END, END)
    taken.breaks_s, taken.choices[0].arrivals_s = broken_s, arrivals_s
    return taken


def test_recovery_is_measured_from_router_death_to_next_token() -> None:
    """The next router died as well, before it had brought a token."""
    account = Account()
    streams = [came_back([2.1], [1.0, 2.05, 5.0]), came_back([2.1, 4.1, 4.2], [1.0, 6.0, 6.1])]
    assert account.add_round([killed("router", 2.0), killed("router", 4.0)], streams, [UNDISTURBED] * 2) == []
    assert account.num_returned == 2
    assert sorted(account.returned_s) == [2.0, 3.0, 4.0]


def test_a_connection_broken_under_a_running_router_is_a_lost_stream() -> None:
    account = Account()
    account.add_round([killed("decode", 2.0)], [came_back([2.1], [1.0, 1.1, 2.5])], [UNDISTURBED])
    assert account.outcomes == {"lost": 1}


def test_worker_recovery_is_not_measured_during_router_faults() -> None:
    account = Account()
    resumed = came_back([], [1.0, 1.1, 2.5])
    resumed.attempts = [pb.Attempt(choices=[0]), pb.Attempt(attempt=1, choices=[0])]
    assert account.add_round([killed("decode", 2.0), killed("router", 2.0)], [resumed], [UNDISTURBED]) == []
    assert not account.hits


def test_a_worker_replaced_without_an_accident_is_reported_once() -> None:
    account = Account()
    account.add_round([killed("decode", 2.0)], [], [])
    watch: Any = SimpleNamespace(replaced_workers=lambda: {1: "decode-0", 2: "prefill-0"})
    assert account.add_replaced(watch) == ["replaced for no accident: prefill-0"]
    assert account.add_replaced(watch) == []


class StatusCall:
    """One status; then the router dies, or says nothing more until the call is cancelled."""

    def __init__(self, pid: int, is_last: bool) -> None:
        worker = pb.WorkerStatus(worker_id="decode-0", role="decode", pid=pid, state=pb.WORKER_STATE_READY)
        self._status = pb.ClusterStatus(workers=[worker])
        self._is_last = is_last
        self._cancelled = threading.Event()
        self.was_taken = threading.Event()

    def __iter__(self) -> Iterator[pb.ClusterStatus]:
        yield self._status
        self.was_taken.set()
        if self._is_last:
            self._cancelled.wait()
        raise Unavailable

    def cancel(self) -> None:
        self._cancelled.set()


def test_the_watch_goes_on_with_the_next_router() -> None:
    first, second = StatusCall(1, is_last=False), StatusCall(2, is_last=True)
    calls = iter([first, second, StatusCall(3, is_last=True)])
    stub: Any = SimpleNamespace(WatchStatus=lambda *_, **__: next(calls))
    watch = Watch(stub, {"decode": 1})
    second.was_taken.wait()
    assert [worker.pid for worker in watch.ready_workers("decode")] == [2]
    assert watch.replaced_workers() == {1: "decode-0"}
    assert watch.served_again_after(0.0) is not None
    watch.close()
