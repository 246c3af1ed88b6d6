"""The workload: jobs and their send times, from distributions or from a trace, and their prompts. The same
seed gives the same workload.

Two targets of a comparison get the same jobs in each round (arrivals and lengths), but each its own token
ids: were both names of one server, the second would find the first one's prompts in its prefix cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from .arrivals import Arrivals, arrival_times
from .errors import LoadError
from .lengths import Lengths
from .trace import BLOCK_TOKENS, TraceRow

# independent streams of random numbers under one seed
_ARRIVALS, _PROMPT_LENGTHS, _OUTPUT_LENGTHS, _GROUPS, _PROMPTS, _PREFIXES, _BLOCKS = range(7)


@dataclass(frozen=True)
class ScheduledRequest:
    """One request to come."""

    index: int
    due_s: float | None  # since the start of the load; None in a closed loop: as soon as it is its turn
    num_prompt_tokens: int
    num_output_tokens: int
    group: int | None = None  # which shared prefix the prompt begins with
    blocks: tuple[int, ...] = ()  # identities of the prompt's blocks, as in `TraceRow`


@dataclass(frozen=True)
class SharedPrefixes:
    """Prompts begin with one of `num_groups` prefixes of `num_tokens` tokens, which come on top of the
    prompt's own length."""

    num_groups: int
    num_tokens: int


@dataclass(frozen=True)
class Drawn:
    """A load by distributions. Without `arrivals` it is a closed loop's."""

    arrivals: Arrivals | None
    prompt_tokens: Lengths
    output_tokens: Lengths
    prefixes: SharedPrefixes | None = None

    def jobs(self, seed: int, round_index: int) -> Iterator[ScheduledRequest]:
        """Yields jobs without end."""
        rngs = [generator(seed, round_index, stream) for stream in range(4)]
        due = None if self.arrivals is None else arrival_times(self.arrivals, rngs[_ARRIVALS])
        for index in count():
            num_prompt_tokens, group = self.prompt_tokens.draw(rngs[_PROMPT_LENGTHS]), None
            if self.prefixes is not None:
                group = int(rngs[_GROUPS].integers(self.prefixes.num_groups))
                num_prompt_tokens += self.prefixes.num_tokens
            num_output_tokens = self.output_tokens.draw(rngs[_OUTPUT_LENGTHS])
            yield ScheduledRequest(
                index, None if due is None else next(due), num_prompt_tokens, num_output_tokens, group
            )


@dataclass(frozen=True)
class Replayed:
    """A trace, `speed` times as fast as it was recorded. `max_prompt_tokens` and `max_output_tokens` cut what
    is longer."""

    rows: Sequence[TraceRow]
    speed: float = 1.0
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    is_open: bool = True  # False: only the lengths are taken, for a closed loop

    def jobs(self, seed: int, round_index: int) -> Iterator[ScheduledRequest]:
        """Yields one job for each row, the same in every round."""
        for index, row in enumerate(self.rows):
            num_prompt_tokens = min(row.num_prompt_tokens, self.max_prompt_tokens or row.num_prompt_tokens)
            num_output_tokens = min(row.num_output_tokens, self.max_output_tokens or row.num_output_tokens)
            yield ScheduledRequest(
                index,
                row.offset_s / self.speed if self.is_open else None,
                num_prompt_tokens,
                num_output_tokens,
                blocks=row.blocks[: -(-num_prompt_tokens // BLOCK_TOKENS)],
            )


Workload = Drawn | Replayed


def limited(
    jobs: Iterator[ScheduledRequest], max_requests: int | None, duration_s: float | None
) -> Iterator[ScheduledRequest]:
    """The first `max_requests` jobs that are due within `duration_s`."""
    for job in jobs:
        too_many = max_requests is not None and job.index >= max_requests
        if too_many or (duration_s is not None and job.due_s is not None and job.due_s >= duration_s):
            return
        yield job


class Prompts:
    """Random token ids for jobs: of `low` to `high` - 1 without `excluded`. `salt` makes a target's prompts
    its own."""

    def __init__(
        self,
        seed: int,
        low: int,
        high: int,
        excluded: Sequence[int] = (),
        prefixes: SharedPrefixes | None = None,
        salt: int = 0,
    ) -> None:
        self._ids = np.setdiff1d(np.arange(low, high), np.asarray(excluded, dtype=np.int64))
        if not len(self._ids):
            raise LoadError(f"no token id is left to make prompts of between {low} and {high}")
        self._seed, self._salt, self._prefixes = seed, salt, prefixes

    def token_ids(self, job: ScheduledRequest, round_index: int) -> list[int]:
        """The job's whole prompt. It depends on seed, salt, round and index alone; a trace's blocks depend on
        seed, salt and their identity."""
        if job.blocks:
            blocks = [self._draw(BLOCK_TOKENS, _BLOCKS, block) for block in job.blocks]
            return [token_id for block in blocks for token_id in block][: job.num_prompt_tokens]
        if job.group is None or self._prefixes is None:
            return self._draw(job.num_prompt_tokens, _PROMPTS, round_index, job.index)
        prefix = self._draw(self._prefixes.num_tokens, _PREFIXES, job.group)
        return prefix + self._draw(job.num_prompt_tokens - len(prefix), _PROMPTS, round_index, job.index)

    def warm_up(self, index: int, num_tokens: int) -> list[int]:
        """A prompt that no job has."""
        return self._draw(num_tokens, _PROMPTS, 0, index, 1)

    def _draw(self, num_tokens: int, *stream: int) -> list[int]:
        rng = generator(self._seed, self._salt, *stream)
        ids: list[int] = self._ids[rng.integers(len(self._ids), size=num_tokens)].tolist()
        return ids


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Random numbers of their own for each stream under one seed."""
    return np.random.default_rng(np.random.SeedSequence([seed, *stream]))
