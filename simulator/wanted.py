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
        self._ended: set[str] = set()  # requests

    def sent(self, worker: Key, command: WorkerCommand) -> None:
        match command:
            case Abort(transfer=transfer, choice=None):
                if (wanted := self._find(transfer)) is not None:
                    wanted.workers.discard(worker)
            case Prefill(spec=spec) | Reserve(spec=spec) | Serve(spec=spec):
                self._ended.discard(spec.transfer.request_id)  # another of the same id
                of_request = self._wanted.setdefault(spec.transfer.request_id, {})
                of_request.setdefault(spec.transfer, _Wanted(set(spec.choices))).workers.add(worker)

    def took_over(self, worker: Key, legs: Iterable[HeldLeg]) -> None:
        """Records the legs that a worker holds from an earlier head, or held while it was away. Commands to
        it that were lost are not among them."""
        for of_request in self._wanted.values():
            for wanted in of_request.values():
                wanted.workers.discard(worker)
        for held in legs:
            of_request = self._wanted.setdefault(held.spec.transfer.request_id, {})
            wanted = of_request.setdefault(held.spec.transfer, _Wanted(set(held.spec.choices)))
            wanted.choices.difference_update(
                output.choice for output in held.outputs() if output.finish_reason is not None
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
        self._ended.add(request_id)
        return self._unwanted(request_id, living)

    def came_back(self, worker: Key) -> list[str]:
        """Returns the violations when a worker has reported what it holds, and was answered: it must have
        received an abort for each request that has ended meanwhile."""
        return [text for request_id in sorted(self._ended) for text in self._unwanted(request_id, {worker})]

    def _unwanted(self, request_id: str, living: AbstractSet[Key]) -> list[str]:
        return [
            f"{request_id} has ended, but {sorted(working)} go on with {transfer}"
            for transfer, wanted in self._wanted.pop(request_id, {}).items()
            if wanted.choices and (working := wanted.workers & living)
        ]

    def _find(self, transfer: TransferId) -> _Wanted | None:
        return self._wanted.get(transfer.request_id, {}).get(transfer)
