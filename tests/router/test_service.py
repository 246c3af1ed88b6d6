"""The router's shell: commands are carried out in the order of their decision, also when one brings the next event."""

from types import SimpleNamespace
from typing import Any

from pdserve.core.messages import TokenOutput
from pdserve.core.request import Request, SamplingParams, TransferId
from pdserve.router.events import EmitEnd, EmitTokens, Submit, Timeline, WorkerIdle, WorkersExpected
from pdserve.router.service import RouterService

TOKENS = EmitTokens("r", 0, (TokenOutput(TransferId("r", 0), 0, 0, 7),))
END = EmitEnd("r", None, None, Timeline(submitted_s=0.0, first_token_s=None, ended_s=0.0, dispatches=()))


class ScriptedRouter:
    """A worker becomes idle before a token is out; the stream's end follows from what the observer says about that."""

    def handle(self, event: object, now_s: float) -> list[Any]:
        match event:
            case Submit():
                return [WorkerIdle("decode-0", 1), TOKENS]
            case WorkersExpected():
                return [END]
            case _:
                return []

    def next_tick_s(self) -> None:
        return None


async def test_what_an_observer_causes_is_carried_out_after_what_was_decided_before() -> None:
    service: RouterService
    observer = SimpleNamespace(worker_idle=lambda worker_id, incarnation: service.handle(WorkersExpected(0)))
    service = RouterService(ScriptedRouter(), observer, "token")  # type: ignore[arg-type]
    request = Request(request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=1), eos_token_ids=())
    assert [event async for event in service.generate(request)] == [TOKENS, END]
