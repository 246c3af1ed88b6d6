"""The fleet's members, and what their states add up to. A change of one member costs the logarithm of their
number."""

from collections import Counter
from collections.abc import Iterable, Iterator

from ..core.messages import Role
from .fleet_member import Member, MemberState
from .timetable import Timetable

PREFIX = "worker-"
# states that count towards the size of a pool, in order of removal
REMOVAL_ORDER = [MemberState.DRAINED, MemberState.BACKOFF, MemberState.STARTING, MemberState.READY]


class Roster:
    """Members by name. `note` follows every change of one."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        # as last counted: role, state, whether present, whether awaited
        self._counted: dict[str, tuple[Role, MemberState, bool, bool]] = {}
        self._present: Counter[Role] = Counter()
        self._states: Counter[MemberState] = Counter()
        self._num_awaited = 0
        self._due: Timetable[str] = Timetable()  # of those whose patience ends
        self._restarts: Timetable[str] = Timetable()
        self._first_free = 0  # no name with a lower number is free

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def __len__(self) -> int:
        return len(self._members)

    def get(self, worker_id: str) -> Member | None:
        return self._members.get(worker_id)

    @property
    def num_awaited(self) -> int:
        """The number of members that an earlier controller has started and that have not reported yet."""
        return self._num_awaited

    def num_in(self, *states: MemberState) -> int:
        return sum(self._states[state] for state in states)

    def num_present(self, role: Role) -> int:
        """Returns the number of members that count towards the size of a pool."""
        return self._present[role]

    def present(self, role: Role) -> list[Member]:
        """Returns the members that count towards the size of a pool. Looks at all members."""
        return [member for member in self if member.role is role and _is_present(member)]

    @property
    def roles(self) -> Iterable[Role]:
        """The roles of members that count towards the size of a pool."""
        return (role for role, count in self._present.items() if count)

    def free_name(self) -> str:
        """Returns the free name with the lowest number."""
        while f"{PREFIX}{self._first_free}" in self._members:
            self._first_free += 1
        return f"{PREFIX}{self._first_free}"

    def note(self, member: Member) -> None:
        """Counts a member that is new or has changed; one that is GONE is forgotten."""
        name, state = member.worker_id, member.state
        if name in self._counted:
            self._count(*self._counted.pop(name), sign=-1)
        is_restarted, is_gone = state is MemberState.BACKOFF, state is MemberState.GONE
        self._restarts.put(name, member.due_s if is_restarted else None)
        self._due.put(name, None if is_restarted or is_gone else member.due_s)
        if is_gone:
            del self._members[name]
            number = name.removeprefix(PREFIX)
            self._first_free = min(self._first_free, int(number) if number.isdecimal() else 0)
            return
        self._members[name] = member
        is_awaited = member.is_awaited and state is MemberState.STARTING
        self._counted[name] = member.role, state, _is_present(member), is_awaited
        self._count(*self._counted[name], sign=1)

    def _count(
        self, role: Role, state: MemberState, is_present: bool, is_awaited: bool, *, sign: int
    ) -> None:
        self._present[role] += sign * is_present
        self._states[state] += sign
        self._num_awaited += sign * is_awaited

    def pop_due(self, now_s: float) -> list[Member]:
        """Takes out the members whose patience ends, other than those that back off."""
        return [self._members[name] for name in self._due.pop_due(now_s)]

    def pop_restarts(self, now_s: float) -> list[Member]:
        """Takes out the members that have backed off for long enough."""
        return [self._members[name] for name in self._restarts.pop_due(now_s)]

    def next_s(self, *, restarts: bool) -> float | None:
        """Returns when the next member is due; `restarts`: with those that back off."""
        due = (self._due.next_s(), self._restarts.next_s() if restarts else None)
        return min((at_s for at_s in due if at_s is not None), default=None)


def _is_present(member: Member) -> bool:
    return member.by_hand or member.state in REMOVAL_ORDER
