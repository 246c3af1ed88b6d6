"""Who works for which request, as a bystander of the head's connections knows it: nobody for one that has
ended."""

from collections.abc import Iterable, Set as AbstractSet
from dataclasses import dataclass, field

from ..core.messages import Abort, HeldLeg, LegEnded, Prefill, Reserve, Serve, StepReport, WorkerCommand
from ..core.request import TransferId

Key = tuple[str, int]  # (worker_id, incarnation)


@dataclass(slots=True)
class _Wanted:
    """One dispatch: choices whose last token no worker has brought, and workers that were not told to
    stop."""

    choices: set[int]
    workers: set[Key] = field(default_factory=set)


class WantedLegs:
    """Who was told to work for which dispatch, also by an earlier head, and has neither ended nor been told
    to stop."""

    def __init__(self) -> None:
        self._wanted: dict[str, dict[TransferId, _Wanted]] = {}  # by request

    def sent(self, worker: Key, command: WorkerCommand) -> None:
        match command:
            case Abort(transfer=transfer):
                if (wanted := self._find(transfer)) is not None:
                    wanted.workers.discard(worker)
            case Prefill(spec=spec) | Reserve(spec=spec) | Serve(spec=spec):
                of_request = self._wanted.setdefault(spec.transfer.request_id, {})
                of_request.setdefault(spec.transfer, _Wanted(set(spec.choices))).workers.add(worker)

    def told(self, worker: Key, legs: Iterable[HeldLeg]) -> None:
        """What a worker holds that an earlier head has sent to it."""
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
        """What is wrong at a request's end: a worker that does not know it by the last tokens must have been
        told."""
        return [
            f"{request_id} has ended, but {sorted(working)} go on with {transfer}"
            for transfer, wanted in self._wanted.pop(request_id, {}).items()
            if wanted.choices and (working := wanted.workers & living)
        ]

    def _find(self, transfer: TransferId) -> _Wanted | None:
        return self._wanted.get(transfer.request_id, {}).get(transfer)
