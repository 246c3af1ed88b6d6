"""The clients whose grammars recently cost so much CPU time that their outputs wait only for each other.
Pure."""

from dataclasses import dataclass

CHEAP_S = 0.005  # CPU time of a job that delays no other client, in any number
ALLOWED_S = 0.25  # beyond that, of all jobs of a client
FORGIVEN = 0.05  # seconds of it in a second: a client below a twentieth of a processor is never costly
MAX_DEBT_S = 3.0  # so that a client is one among others again a minute after its last costly job
MAX_CLIENTS = 1024  # with a debt; beyond that, those without one are looked for and forgotten


@dataclass(slots=True)
class _Debt:
    seconds: float
    at_s: float

    def after(self, now_s: float) -> float:
        return max(0.0, self.seconds - FORGIVEN * (now_s - self.at_s))


class ClientCosts:
    """Each client's debt: the processor time of its costly jobs, less what was forgiven since."""

    def __init__(self) -> None:
        self._debts: dict[str, _Debt] = {}

    def charge(self, client: str, cost_s: float, now_s: float) -> bool:
        """A job has cost so much. Whether it made its client a costly one."""
        if cost_s <= CHEAP_S:
            return False
        was_costly = self.is_costly(client, now_s)
        debt_s = self._debt_s(client, now_s) + cost_s
        self._debts[client] = _Debt(min(debt_s, MAX_DEBT_S), now_s)
        if len(self._debts) > MAX_CLIENTS:
            self._debts = {client: debt for client, debt in self._debts.items() if debt.after(now_s)}
        return not was_costly and self.is_costly(client, now_s)

    def is_costly(self, client: str, now_s: float) -> bool:
        return self._debt_s(client, now_s) > ALLOWED_S

    def _debt_s(self, client: str, now_s: float) -> float:
        debt = self._debts.get(client)
        return 0.0 if debt is None else debt.after(now_s)
