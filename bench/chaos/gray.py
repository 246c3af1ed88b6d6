"""Gray faults: workers that serve, but badly. `gray_hook.py` carries them out in the worker; sends that fail
last as long as a file exists, and a request kills the workers that compute it because of its name."""

import os
import random
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc as rpc

from . import gray_hook

THROTTLE_PERIOD_S = 0.1  # as that of the kernel's CPU quota
THROTTLE_SHARE = 0.1
MAX_DEATHS = 2  # of one request
NUM_RETRIES = 2  # of a client whose request was ended as deadly
DEADLY_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Death:
    """A worker's process that died of a request."""

    pid: int
    at_s: float


class GrayFaults:
    """Injects faults into the workers of a cluster that was started within `hooked`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fail_sends(self, pids: Sequence[int], fault: gray_hook.SendFault) -> Callable[[], None]:
        """Returns what ends it."""
        switches = [self._folder / f"{fault}.{pid}" for pid in pids]
        for switch in switches:
            switch.touch()

        def end() -> None:
            for switch in switches:
                switch.unlink(missing_ok=True)  # another fault of this kind and worker may have ended

        return end

    def num_failed_sends(self) -> int:
        """Returns how many calls have failed on purpose."""
        return sum(path.stat().st_size for path in self._folder.glob("failed.*"))

    def deaths(self, name: str) -> list[Death]:
        """Returns the processes that have died of the request of this name, in order."""
        deaths = []
        for report in self._folder.glob("death.*"):
            at_s, _, request_id = report.read_text().partition(" ")
            if request_id == name:
                deaths.append(Death(int(report.suffix[1:]), float(at_s)))
        return sorted(deaths, key=lambda death: death.at_s)


@contextmanager
def hooked() -> Iterator[GrayFaults]:
    """Has each Python process that is started meanwhile run the hook, by a `sitecustomize` of its own."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory(prefix="pdserve-gray-") as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text("from bench.chaos import gray_hook\ngray_hook.install()\n")
        before = os.environ.get("PYTHONPATH")
        path = [str(folder), str(root), *([before] if before else [])]
        os.environ |= {"PYTHONPATH": os.pathsep.join(path), gray_hook.FOLDER: str(folder)}
        try:
            yield GrayFaults(folder)
        finally:
            del os.environ[gray_hook.FOLDER], os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before


def throttle(processes: Sequence[int]) -> Callable[[], None]:
    """Lets processes, given by their descriptors, run a tenth of the time; returns what ends it and closes
    them."""
    is_over = threading.Event()

    def signal_all(number: int) -> None:
        for process in processes:
            with suppress(ProcessLookupError):  # it has died meanwhile
                signal.pidfd_send_signal(process, number)

    def alternate() -> None:
        while not is_over.is_set():
            signal_all(signal.SIGSTOP)
            is_over.wait(THROTTLE_PERIOD_S * (1.0 - THROTTLE_SHARE))
            signal_all(signal.SIGCONT)
            is_over.wait(THROTTLE_PERIOD_S * THROTTLE_SHARE)

    thread = threading.Thread(target=alternate, name="throttle")
    thread.start()

    def end() -> None:
        is_over.set()
        thread.join()
        for process in processes:
            os.close(process)

    return end


def send_deadly(stub: rpc.GenerationStub, rng: random.Random, name: str) -> Callable[[], str | None]:
    """Sends a request that kills its workers, again after it was ended. Returns what waits for the end of all
    that, and says what was wrong with an ending."""
    request = pb.GenerateRequest(
        request_id=name,
        # no other's: the router knows a deadly request by its prompt as well
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[rng.randrange(10, 4000) for _ in range(200)])),
        sampling=pb.SamplingParams(max_tokens=300, ignore_eos=True, temperature=0.0),
    )
    endings: list[str] = []

    def run() -> None:
        for _ in range(1 + NUM_RETRIES):
            try:
                for _event in stub.GenerateStream(request, timeout=DEADLY_TIMEOUT_S, wait_for_ready=True):
                    pass
                endings.append("OK")
            except grpc.RpcError as error:
                endings.append(error.code().name)

    client = threading.Thread(target=run, name="deadly")
    client.start()

    def wait() -> str | None:
        client.join()
        return None if set(endings) == {"INTERNAL"} else f"a deadly request ended with {', '.join(endings)}"

    return wait
