"""The load that a plan is made for: requests of a workload, at any rate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..core.errors import ConfigError
from ..loadgen.trace import BLOCK_TOKENS, TraceRow
from ..loadgen.workload import Drawn, ScheduledRequest, Workload
from .virtual_cluster import Arrival

_PREFIX, _BLOCK, _OWN = range(3)  # kinds of token ids: of a shared prefix, of a trace's block, of one prompt


@dataclass(frozen=True)
class OfferedLoad:
    """`num_requests` requests of a workload: each seed draws others, or takes another part of a trace, whose
    instants are stretched to the rate."""

    workload: Workload
    num_requests: int

    @property
    def rate(self) -> float:
        """Returns the requests per second of the workload as it is. Raises ConfigError for a trace without a
        duration."""
        workload = self.workload
        if isinstance(workload, Drawn):
            assert workload.arrivals is not None
            return workload.arrivals.rate
        duration_s = workload.rows[-1].offset_s / workload.speed
        if duration_s <= 0:
            raise ConfigError(
                f"trace: {len(workload.rows)} requests at one instant, expected several instants"
            )
        return len(workload.rows) / duration_s

    def arrivals(self, rate: float, seed: int) -> Iterator[Arrival]:
        """Yields the requests at `rate`: the same ones at each rate under one seed."""
        workload = self.workload
        if isinstance(workload, Drawn):
            assert workload.arrivals is not None
            workload = replace(workload, arrivals=replace(workload.arrivals, rate=rate))  # type: ignore[type-var]
        else:
            speed = workload.speed * rate / self.rate
            workload = replace(workload, rows=self._part(workload.rows, seed), speed=speed)
        for job in workload.jobs(seed, 0):
            if job.index == self.num_requests:
                return
            assert job.due_s is not None
            yield Arrival(job.due_s, _prompt(job, workload), job.num_output_tokens)

    def _part(self, rows: Sequence[TraceRow], number: int) -> Sequence[TraceRow]:
        """Returns one part of a trace; parts overlap where it is short."""
        first = number * self.num_requests % max(1, len(rows) - self.num_requests + 1)
        part = rows[first : first + self.num_requests]
        return [replace(row, offset_s=row.offset_s - part[0].offset_s) for row in part]

    @property
    def longest(self) -> int:
        """Returns the largest prompt with its output, in tokens, under the first seed."""
        return max(
            len(arrival.prompt_token_ids) + arrival.num_output_tokens
            for arrival in self.arrivals(self.rate, 0)
        )


def _prompt(job: ScheduledRequest, workload: Workload) -> tuple[int, ...]:
    """Returns token ids that are equal where prompts share a prefix; they mean nothing else."""
    length = job.num_prompt_tokens
    if job.blocks:
        blocks = (_ids(_BLOCK, block) * BLOCK_TOKENS for block in job.blocks)
        return tuple(token_id for block in blocks for token_id in block)[:length]
    own = _ids(_OWN, job.index)
    if job.group is None or not isinstance(workload, Drawn) or workload.prefixes is None:
        return own * length
    shared = workload.prefixes.num_tokens
    return _ids(_PREFIX, job.group) * shared + own * (length - shared)


def _ids(kind: int, number: int) -> tuple[int]:
    return (3 * number + kind,)
