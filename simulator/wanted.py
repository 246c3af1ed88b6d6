"""The workers of each request, as an observer of the head's connections knows them: none for a request that
has ended."""

from collections.abc import Iterable, Set as AbstractSet
from dataclasses import dataclass, field

from ..core.messages import Abort, HeldLeg, LegEnded, Prefill, Reserve, Serve, StepReport, WorkerCommand
from ..core.request import TransferId
from ..router.cores import Key


@dataclass(slots=True)
class _Wanted:
    """One dispatch: choices whose last token no worker has sent, and workers that received no abort."""

    choices: set[int]
    workers: set[Key] = field(default_factory=set)


class WantedLegs:
    """The workers that were given each dispatch, also by an earlier head, and have neither ended it nor
    received an abort."""

    def __init__(self) -> None:
        self._wanted: dict[str, dict[TransferId, _Wanted]] = {}  # by request

    def sent(self, worker: Key, command: WorkerCommand) -> None:
        match command:
            case Abort(transfer=transfer, choice=None):
                if (wanted := self._find(transfer)) is not None:
                    wanted.workers.discard(worker)
            case Prefill(spec=spec) | Reserve(spec=spec) | Serve(spec=spec):
                of_request = self._wanted.setdefault(spec.transfer.request_id, {})
                of_request.setdefault(spec.transfer, _Wanted(set(spec.choices))).workers.add(worker)

    def took_over(self, worker: Key, legs: Iterable[HeldLeg]) -> None:
        """Records the legs that a worker holds from an earlier head."""
        for held in legs:
            of_request = self._wanted.setdefault(held.spec.transfer.request_id, {})
            wanted = of_request.setdefault(held.spec.transfer, _Wanted(set(held.spec.choices)))
            wanted.choices.difference_update(
                output.choice for output in held.outputs if output.finish_reason is not None
            )
            if held.ended is None:
                wanted.workers.add(worker)

    def heard(self, message: StepReport | LegEnded) -> None:
        if isinstance(message, LegEnded):
            if (wanted := self._find(message.transfer)) is not None:
                wanted.workers.discard((message.worker_id, message.incarnation))
            return
        for output in message.outputs:
            if output.finish_reason is not None and (wanted := self._find(output.transfer)) is not None:
                wanted.choices.discard(output.choice)

    def ended(self, request_id: str, living: AbstractSet[Key]) -> list[str]:
        """Returns the violations at a request's end: a worker that has not seen the last tokens must have
        received an abort."""
        return [
            f"{request_id} has ended, but {sorted(working)} go on with {transfer}"
            for transfer, wanted in self._wanted.pop(request_id, {}).items()
            if wanted.choices and (working := wanted.workers & living)
        ]

    def _find(self, transfer: TransferId) -> _Wanted | None:
        return self._wanted.get(transfer.request_id, {}).get(transfer)
