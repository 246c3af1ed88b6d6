"""The results of the rounds: outcomes, and the times to detection, to resumption and to full recovery."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

from pdserve.proto import pdserve_pb2 as pb

from .accidents import DEADLY, GRAY, ROUTER, InjectedAccident
from .streams import ObservedStream
from .watch import Watch

LONG_PAUSE_S = 8.0
BREAK_S = 5.0  # so soon after its router was killed, at the latest, must a client notice


class Account:
    """Results, accumulated round by round."""

    def __init__(self) -> None:
        self.num_rounds = 0
        self.accidents: Counter[str] = Counter()  # workers that were struck
        self._victims: set[int] = set()  # pids
        self._replaced: dict[int, str] = {}  # workers that were replaced for no accident, by their pids
        self.outcomes: Counter[str] = Counter()
        self.num_tokens = 0
        self.hits: Counter[str] = Counter()  # where in its life a stream was when its worker went
        self.unexplained: Counter[str] = Counter()
        self.num_broken_promises = 0  # of accidents, about their victims
        # the longest of each stream, in rounds with a single gray fault
        self.paused_s: defaultdict[str, list[float]] = defaultdict(list)
        self.leaks: list[str] = []
        # the router had taken the choice back
        self.acted_s: defaultdict[str, list[float]] = defaultdict(list)
        self.resumed_s: defaultdict[str, list[float]] = defaultdict(list)
        self.num_returned = 0  # streams whose clients came back
        self.returned_s: list[float] = []  # the next token after the router was killed
        self._timed: list[InjectedAccident] = []  # in rounds in which the router was spared
        self._router_kills_s: list[float] = []

    def add_round(
        self,
        accidents: Sequence[InjectedAccident],
        streams: Sequence[ObservedStream],
        undisturbed: Sequence[ObservedStream],
    ) -> list[str]:
        """Returns the problems of a round as text."""
        self.num_rounds += 1
        struck = [accident for accident in accidents if accident.at_s is not None]
        for accident in struck:
            is_request = accident.kind == DEADLY
            self.accidents[_name(accident)] += 1 if is_request else len(accident.victims)
            if is_request:
                self.accidents["workers that died of a request"] += len(accident.victims)
            self._victims |= {victim.pid for victim in accident.victims}
            if accident.role == ROUTER and accident.kind == "kill":
                self._router_kills_s.append(accident.at_s or 0.0)
        # with a router or a gray worker among them, it is not clear what followed from what
        is_gray = any(accident.kind in GRAY for accident in struck)
        is_timed = not is_gray and not any(accident.role == ROUTER for accident in struck)
        if is_timed:
            self._timed += struck
        if is_gray and len(struck) == 1:
            self.paused_s[_name(struck[0])] += [stream.longest_pause()[0] for stream in streams]
        problems = [accident.problem for accident in accidents if accident.problem is not None]
        self.num_broken_promises += len(problems)
        for stream, expected in zip(streams, undisturbed, strict=True):
            outcome = stream.outcome(expected) if self._has_reason_to_break(stream) else "lost"
            self.outcomes[outcome] += 1
            self.num_tokens += stream.num_tokens
            if outcome != "whole":
                problems.append(f"{outcome}: {stream.error or 'other tokens'} ({_story(stream)})")
            elif stream.breaks_s:
                self._count_return(stream)
            elif is_timed or is_gray:
                self._count_resumptions(stream, struck if is_timed else None)
        return problems

    def add_replaced(self, watch: Watch) -> list[str]:
        """Reports workers that were replaced without an accident and had not been counted before, as text."""
        replaced = watch.replaced_workers()
        new = {
            pid: name
            for pid, name in replaced.items()
            if pid not in self._victims and pid not in self._replaced
        }
        self._replaced |= new
        return [f"replaced for no accident: {name}" for name in new.values()]

    def _has_reason_to_break(self, stream: ObservedStream) -> bool:
        """Whether the router had been killed just before each time its connection broke."""
        return all(
            any(0.0 <= at_s - kill_s < BREAK_S for kill_s in self._router_kills_s) for at_s in stream.breaks_s
        )

    def _count_return(self, stream: ObservedStream) -> None:
        """Counts, for a resumed stream, the time from each kill that broke it to its next token, if one was
        missing."""
        self.num_returned += 1
        causes = {
            max(kill_s for kill_s in self._router_kills_s if kill_s <= at_s): at_s
            for at_s in reversed(stream.breaks_s)
        }
        arrivals_s = sorted(
            arrival_s for choice in stream.choices.values() for arrival_s in choice.arrivals_s
        )
        for kill_s, broken_s in causes.items():
            next_s = next((arrival_s for arrival_s in arrivals_s if arrival_s > broken_s), None)
            if next_s is not None:
                self.returned_s.append(next_s - kill_s)

    def _count_resumptions(
        self, stream: ObservedStream, accidents: Sequence[InjectedAccident] | None
    ) -> None:
        """Counts where its choices were when they went on elsewhere, and the times since their accidents, if
        given."""
        for number, choice in stream.choices.items():
            attempts = [attempt for attempt in stream.attempts if number in attempt.choices]
            for failed, following in pairwise(attempts):
                position = following.prefill.num_tokens - len(stream.template.prompt)
                self.hits[
                    "before the first token"
                    if not position
                    else "in transfer"
                    if position == 1
                    else "in decode"
                ] += 1
                if accidents is None:
                    continue
                cause = _cause(failed, stream.start_s + following.queued_s, accidents)
                if cause is not None and cause.at_s is not None:
                    kind = f"{cause.kind}, {cause.role}"
                    self.acted_s[kind].append(stream.start_s + following.queued_s - cause.at_s)
                    self.resumed_s[kind].append(choice.arrivals_s[position] - cause.at_s)
                else:
                    self.unexplained[f"{failed.prefill.worker} -> {failed.decode.worker or '?'}"] += 1

    def lines(self, watch: Watch) -> list[str]:
        """The table."""
        rows = [f"{'rounds':44} {self.num_rounds}"]
        rows += [f"{kind:44} {count}" for kind, count in sorted(self.accidents.items())]
        rows += [f"{'streams':44} {sum(self.outcomes.values())}", f"{'tokens':44} {self.num_tokens}"]
        rows += [f"{outcome:44} {self.outcomes[outcome]}" for outcome in ("lost", "altered")]
        if self.paused_s:
            rows += [f"{'deadly requests that broke a promise':44} {self.num_broken_promises}"]
        rows += [f"{'leaked':44} {len(self.leaks)}"]
        rows += [f"{'workers replaced for no accident':44} {len(self._replaced)}"]
        rows += [f"{'streams whose clients came back':44} {self.num_returned}"]
        rows += [
            f"{'choices that went on elsewhere: ' + hit:44} {count}"
            for hit, count in sorted(self.hits.items())
        ]
        if not self.paused_s:  # of gray faults, causes are not told apart
            rows += [f"{'  of these, by no accident to their workers':44} {sum(self.unexplained.values())}"]
        rows += [""]
        rows += [f"{'seconds from the accident to':44} {'count':>6} {'median':>8} {'p95':>8} {'max':>8}"]
        return rows + self._times(watch)

    def _times(self, watch: Watch) -> list[str]:
        noticed: defaultdict[str, list[float]] = defaultdict(list)
        back: defaultdict[str, list[float]] = defaultdict(list)
        for accident in self._timed:
            assert accident.at_s is not None
            for victim in accident.victims:
                noticed_s = watch.noticed_after(accident.at_s, victim.worker_id, victim.pid)
                if noticed_s is None or (accident.kind != "kill" and noticed_s > accident.duration_s + 2.0):
                    # it was over before anybody had to notice; what ended the process later was something
                    # else
                    continue
                noticed[accident.kind].append(noticed_s)
                back_s = watch.first_after(accident.at_s + noticed_s, watch.is_whole)
                if back_s is not None:
                    back[accident.kind].append(noticed_s + back_s)
        served_s = [
            seconds
            for kill_s in self._router_kills_s
            if (seconds := watch.served_again_after(kill_s)) is not None
        ]
        rows = [_row(f"in the router: {kind}", values) for kind, values in sorted(self.acted_s.items())]
        rows += [_row(f"in the status: {kind}", values) for kind, values in sorted(noticed.items())]
        rows += [_row("status served again: kill, router", served_s)] if served_s else []
        rows += [_row(f"next token: {kind}", values) for kind, values in sorted(self.resumed_s.items())]
        rows += [_row("next token: kill, router", self.returned_s)] if self.returned_s else []
        rows += [_row(f"capacity back: {kind}", values) for kind, values in sorted(back.items())]
        rows += [_row(f"longest pause: {kind}", values) for kind, values in sorted(self.paused_s.items())]
        return rows


def _name(accident: InjectedAccident) -> str:
    return f"{accident.kind}, {accident.role}"


def _cause(
    failed: pb.Attempt, failed_s: float, accidents: Sequence[InjectedAccident]
) -> InjectedAccident | None:
    """Returns the accident that ended an attempt: a kill is noticed at once, anything else later. An attempt
    without a token does not show which decode worker it had."""

    def concerns(accident: InjectedAccident) -> bool:
        names = {victim.worker_id for victim in accident.victims}
        may_be_the_target = not failed.HasField("decode") and accident.role == "decode"
        return may_be_the_target or bool(names & {failed.prefill.worker, failed.decode.worker})

    slack_s = 0.05  # the router's clock began a little later than ours
    before = [a for a in accidents if a.at_s is not None and a.at_s <= failed_s + slack_s and concerns(a)]
    kills = [a for a in before if a.kind == "kill" and failed_s - (a.at_s or 0.0) < 1.0]
    others = [a for a in before if a.kind != "kill"]
    return max(kills or others, key=lambda accident: accident.at_s or 0.0, default=None)


def _row(name: str, values: Sequence[float]) -> str:
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"{name:44} {len(values):6} {statistics.median(values):8.3f} {p95:8.3f} {ordered[-1]:8.3f}"


def _story(stream: ObservedStream) -> str:
    """A stream's attempts: their workers, and when each was queued, dispatched and got its first token."""
    attempts = [
        f"{a.attempt}: {a.prefill.worker} -> {a.decode.worker or '?'} with {a.prefill.num_tokens} tokens "
        f"[{a.queued_s:.2f} {a.dispatched_s:.2f} {a.first_token_s:.2f}]"
        for a in stream.attempts
    ]
    breaks = "".join(f"; came back after {at_s - stream.start_s:.2f} s" for at_s in stream.breaks_s)
    return (
        f"prompt {len(stream.template.prompt)}, {stream.num_tokens} tokens, {stream.template.sampling}; "
        f"{'; '.join(attempts)}{breaks}"
    )


def slowness(streams: Sequence[ObservedStream]) -> list[str]:
    """Reports streams that paused for longer than any accident justifies, as text."""
    slow = []
    for stream in streams:
        pause_s, since_s = stream.longest_pause()
        if pause_s > LONG_PAUSE_S:
            slow.append(
                f"a pause of {pause_s:.1f} s from {since_s - stream.start_s:.2f} s on: {_story(stream)}"
            )
    return slow
