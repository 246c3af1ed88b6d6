"""Gray faults of `python -m bench.chaos`: the hook obeys its switches, and a deadly request is held to its
promises."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from bench.chaos.accidents import DEADLY, ClusterUnderTest, InjectedAccident, draw_gray, strike
from bench.chaos.account import Account
from bench.chaos.gray import GrayFaults, hooked, send_deadly
from bench.chaos.gray_hook import FOLDER, deadly_name, is_deadly
from bench.chaos.streams import ObservedStream, Template
from pdserve.proto import pdserve_pb2 as pb

STORE = """
import sys
import pdserve.worker.process
from pdserve.engine.kv_cache import KVCache
from pdserve.kv_transfer.shm import ShmLink
print("ready", flush=True)
gather, send = lambda: KVCache.gather(None), lambda: ShmLink.send(None, 0, 0, 0)
for method in (gather, send, gather):
    sys.stdin.readline()
    try:
        method()
    except Exception as error:
        print(type(error).__name__, flush=True)
    else:
        print("worked", flush=True)
"""


def test_a_worker_fails_only_while_its_switch_is_on() -> None:
    with hooked() as gray:
        worker = subprocess.Popen(
            [sys.executable, "-c", STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert worker.stdin is not None and worker.stdout is not None

        def answer() -> str:
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            return worker.stdout.readline().strip()

        with worker:
            assert worker.stdout.readline() == "ready\n"
            end = gray.fail_sends([worker.pid], "gather")
            assert answer() == "OSError"
            assert answer() == "worked"  # a link's send: it has a switch of its own
            assert gray.num_failed_sends() == 1
            end()
            assert answer() == "TypeError"  # a gather: it is called
    assert FOLDER not in os.environ


def test_a_request_is_deadly_from_its_nth_token_on() -> None:
    name = deadly_name(3, "0")
    assert [is_deadly(name, num_tokens) for num_tokens in (0, 2, 3, 4)] == [False, False, True, True]
    assert not is_deadly("round 3/0", 100)


class Ended(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


class EndingStub:
    """Stands for a stub: ends each stream with the next code. `None`: as if nothing was wrong."""

    def __init__(self, *codes: grpc.StatusCode | None) -> None:
        self._codes = iter(codes)

    def GenerateStream(self, request: pb.GenerateRequest, **_: Any) -> Iterator[pb.GenerateEvent]:
        yield pb.GenerateEvent(tokens=pb.TokenDelta(token_ids=[1]))
        if (code := next(self._codes)) is not None:
            raise Ended(code)


INTERNAL, UNAVAILABLE = grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("codes", "problem"),
    [
        ([INTERNAL] * 3, None),
        ([INTERNAL, UNAVAILABLE, INTERNAL], "a deadly request ended with INTERNAL, UNAVAILABLE, INTERNAL"),
        ([INTERNAL, INTERNAL, None], "a deadly request ended with INTERNAL, INTERNAL, OK"),
    ],
)
def test_a_deadly_request_ends_with_internal_each_time(
    codes: list[grpc.StatusCode | None], problem: str | None
) -> None:
    stub: Any = EndingStub(*codes)
    assert send_deadly(stub, random.Random(0), "deadly")() == problem


def deadly_round(folder: Path, num_deaths: int, monkeypatch: pytest.MonkeyPatch) -> InjectedAccident:
    """A round whose only accident is a deadly request."""
    monkeypatch.setattr("bench.chaos.accidents._deadly_numbers", iter([0]))
    rng = next(r for r in map(random.Random, range(1000)) if _draws_deadly_prefill(r.getstate()))
    for pid in range(num_deaths):
        (folder / f"death.{pid}").write_text(f"{10.0 + pid} {deadly_name(0, '0')}")
    (folder / "death.9").write_text(f"5.0 {deadly_name(0, '7')}")  # of another round
    accident = draw_gray(rng)
    watch: Any = SimpleNamespace(name_of=lambda pid: f"prefill-{pid}")
    stub: Any = EndingStub(INTERNAL, INTERNAL, INTERNAL)
    strike(accident, [], ClusterUnderTest(stub, watch, None, GrayFaults(folder)), rng)
    assert accident.ended is not None
    accident.ended.join()
    return accident


def _draws_deadly_prefill(state: Any) -> bool:
    rng = random.Random()
    rng.setstate(state)
    accident = draw_gray(rng)
    return (accident.kind, accident.role, accident.moment) == (DEADLY, "prefill", "before the first token")


def test_the_victims_of_a_deadly_request_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accident = deadly_round(tmp_path, 2, monkeypatch)
    assert [victim.worker_id for victim in accident.victims] == ["prefill-0", "prefill-1"]
    assert (accident.at_s, accident.problem) == (10.0, None)


@pytest.mark.parametrize("num_deaths", [0, 3])
def test_a_deadly_request_kills_one_or_two_workers(
    num_deaths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = Account()
    problems = account.add_round([deadly_round(tmp_path, num_deaths, monkeypatch)], [], [])
    assert account.num_broken_promises == 1
    assert f"{num_deaths} workers died" in problems[0]


def test_gray_rounds_count_resumptions_and_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = ObservedStream(Template((1, 2, 3), {"max_tokens": 3}), start_s=0.0)
    for index, token_id in enumerate((7, 8, 9)):
        resumed.take(pb.GenerateEvent(tokens=pb.TokenDelta(index=index, token_ids=[token_id])))
    resumed.take(pb.GenerateEvent(choice_end=pb.ChoiceEnd(finish_reason=pb.FINISH_REASON_LENGTH)))
    resumed.take(pb.GenerateEvent(end=pb.RequestEnd()))
    resumed.choices[0].arrivals_s = [1.0, 1.5, 4.0]
    resumed.attempts = [
        pb.Attempt(
            attempt=number, choices=[0], prefill=pb.PrefillLeg(worker="prefill-0", num_tokens=num_tokens)
        )
        for number, num_tokens in enumerate((3, 5))
    ]
    account = Account()
    assert account.add_round([deadly_round(tmp_path, 1, monkeypatch)], [resumed], [resumed]) == []
    assert account.hits == {"in decode": 1}
    assert account.paused_s == {"deadly request, prefill": [2.5]}
    assert not account.acted_s and not account.unexplained  # what followed from what is not clear
    assert account.accidents == {"deadly request, prefill": 1, "workers that died of a request": 1}
