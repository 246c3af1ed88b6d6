"""A worker that was away, since we had stood still, is back: its legs continue where they are, and the two
accounts of them are made to agree."""

from collections.abc import Iterable

from ..core.messages import Abort, HeldLeg
from .events import RouterCommand, SendCommand
from .ledger import Ledger
from .live_request import DispatchState
from .live_requests import LiveRequests
from .registered_worker import RegisteredWorker
from .reports import WorkerReports

NEVER_ARRIVED = "its command had not arrived when its worker lost the router"


class Reunion:
    """Carried out each time that a worker is back."""

    def __init__(self, ledger: Ledger, requests: LiveRequests, reports: WorkerReports) -> None:
        self._ledger = ledger
        self._requests = requests
        self._reports = reports

    def carry_out(
        self, worker: RegisteredWorker, held: Iterable[HeldLeg], now_s: float
    ) -> list[RouterCommand]:
        """Handles what the worker reported while it was away; ends legs that it does not have, and aborts
        those that are no longer wanted."""
        legs = {leg.spec.transfer: leg for leg in held}
        commands: list[RouterCommand] = []
        for dispatch in self._ledger.at(worker):
            leg = legs.get(dispatch.transfer)
            if leg is None:
                commands += self._requests.end_leg(
                    dispatch, dispatch.leg_at(worker), f"{worker.worker_id}: {NEVER_ARRIVED}", None, now_s
                )
                continue
            # reports arrive in order: a decode leg's first tokens are those that are counted already
            num_known = dispatch.num_grown_tokens if worker is dispatch.decode else 0
            commands += self._reports.on_tokens(worker, leg.outputs()[num_known:], now_s)
            if leg.ended is not None:
                commands += self._reports.on_leg_ended(leg.ended, now_s)
        for transfer, leg in legs.items():
            if leg.ended is None and not self._is_wanted(worker, leg):
                commands.append(SendCommand(worker.worker_id, worker.incarnation, Abort(transfer=transfer)))
        return commands

    def _is_wanted(self, worker: RegisteredWorker, leg: HeldLeg) -> bool:
        dispatch = self._ledger.get(leg.spec.transfer)
        return (
            dispatch is not None
            and leg.spec.transfer in worker.open_legs
            and dispatch.state is DispatchState.RUNNING
        )
