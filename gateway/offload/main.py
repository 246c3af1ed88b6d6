"""The intake process: jobs on its standard input, results on its standard output, until the input ends.

A job that takes too much processor time or memory ends the process; its parent refuses that job and starts a
new process."""

import gc
import os
import sys
from collections.abc import Iterator

from ...core import limited_process
from ...core.codec import FrameDecoder, FrameEncoder
from ...core.errors import InvalidRequest
from ...core.limited_process import cpu_limit, limit_memory, write_all
from ..text.chat_template import TooCostly
from ..translate import UnknownModel
from .messages import (
    DataPart,
    Done,
    FromProcess,
    IntakeJob,
    IntakeSetup,
    JobRefused,
    TemplateSetup,
    ToProcess,
    parts,
)
from .work import IntakeWorker, TemplateWorker

JOB_S = 10.0  # processor time; a request within bounds takes a few seconds at most
RENDER_JOB_S = 1.0  # for a short conversation: most are ended before, in Python
MEMORY_BYTES = 3 << 30  # address space beyond the process's use when it is ready
NICENESS = 5  # the head has priority
READ_BYTES = 1 << 18

Worker = IntakeWorker | TemplateWorker


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    limited_process.set_up(NICENESS)
    limited_process.serve_or_die(_serve)


def _serve() -> None:
    messages = _messages()
    encoder = FrameEncoder()
    setup = next(messages, None)
    if setup is None:
        return
    assert isinstance(setup, IntakeSetup | TemplateSetup), "Setup comes first"
    data = _payload(messages, setup.size)
    worker: Worker = TemplateWorker(data) if isinstance(setup, TemplateSetup) else IntakeWorker(setup, data)
    job_s = RENDER_JOB_S if isinstance(setup, TemplateSetup) else JOB_S
    gc.freeze()  # so that collections are fast
    limit_memory(MEMORY_BYTES)
    _write(encoder.encode(Done(())))  # ready
    for job in messages:
        assert isinstance(job, IntakeJob), "a part of nothing"
        data = _payload(messages, job.size)
        with cpu_limit(job_s):
            answer, results = _answer(worker, job, data)
        _write(encoder.encode(answer))
        if isinstance(answer, JobRefused):
            gc.collect()  # a failed template's values are in reference cycles with its traceback
        for result in results:
            for part in parts(result):
                _write(encoder.encode(part))


def _answer(worker: Worker, job: IntakeJob, data: bytes) -> tuple[FromProcess, list[bytes]]:
    try:
        results, rest = worker.do(job, data)
    except InvalidRequest as error:
        return JobRefused(error.problems, error.reason, isinstance(error, TooCostly)), []
    except UnknownModel as error:
        return JobRefused(unknown_model=(error.asked, error.served)), []
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
