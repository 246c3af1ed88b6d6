"""The intake process: jobs on its standard input, results on its standard output, until the input ends.

A job that takes too much processor time or memory ends the process; its parent refuses that job and starts a
new process."""

import os
import sys
import traceback
from collections.abc import Iterator

from ...core import limited_process
from ...core.codec import FrameDecoder, FrameEncoder
from ...core.errors import InvalidRequest
from ...core.limited_process import cpu_limit, limit_memory, write_all
from ..translate import UnknownModel
from .messages import DataPart, Done, FromProcess, IntakeJob, IntakeSetup, JobRefused, ToProcess, parts
from .work import IntakeWorker

JOB_S = 10.0  # processor time; a request within bounds takes a few seconds at most
MEMORY_BYTES = 3 << 30  # address space beyond the process's use when it is ready
NICENESS = 5  # the head has priority
READ_BYTES = 1 << 18


def main() -> None:
    limited_process.set_up(NICENESS)
    try:
        _serve()
    except MemoryError:
        os.abort()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _serve() -> None:
    messages = _messages()
    encoder = FrameEncoder()
    setup = next(messages, None)
    if setup is None:
        return
    assert isinstance(setup, IntakeSetup), "Setup comes first"
    worker = IntakeWorker(setup, _payload(messages, setup.size))
    limit_memory(MEMORY_BYTES)
    _write(encoder.encode(Done(())))  # ready
    for job in messages:
        assert isinstance(job, IntakeJob), "a part of nothing"
        data = _payload(messages, job.size)
        with cpu_limit(JOB_S):
            answer, results = _answer(worker, job, data)
        _write(encoder.encode(answer))
        for result in results:
            for part in parts(result):
                _write(encoder.encode(part))


def _answer(worker: IntakeWorker, job: IntakeJob, data: bytes) -> tuple[FromProcess, list[bytes]]:
    try:
        results, rest = worker.do(job, data)
    except InvalidRequest as error:
        return JobRefused(str(error), error.field, error.expected), []
    except UnknownModel as error:
        return JobRefused(str(error), unknown_model=(error.asked, error.served)), []
    return Done(tuple(map(len, results)), rest), list(results)


def _messages() -> Iterator[ToProcess]:
    decoder: FrameDecoder[ToProcess] = FrameDecoder(ToProcess)
    while data := os.read(sys.stdin.fileno(), READ_BYTES):
        yield from decoder.feed(data)


def _payload(messages: Iterator[ToProcess], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = next(messages, None)
        if part is None:
            os._exit(0)  # the parent process has ended
        assert isinstance(part, DataPart), "not the next part"
        data += part.data
    return bytes(data)


def _write(data: bytes) -> None:
    write_all(sys.stdout.fileno(), data)


if __name__ == "__main__":
    main()
