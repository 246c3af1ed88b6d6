"""The options that describe a workload: for a load that is sent, and for one that is planned for."""

from dataclasses import dataclass
from pathlib import Path

from ..core.bounded_file import read_bounded
from ..loadgen.arrivals import make_arrivals
from ..loadgen.errors import LoadError
from ..loadgen.lengths import parse_lengths
from ..loadgen.trace import parse_trace
from ..loadgen.workload import Drawn, Replayed, SharedPrefixes, Workload

MAX_FILE_BYTES = 1 << 29  # of a trace; Azure's of a week have some 400 MB


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """Requests by distributions, or from a trace."""

    rate: float | None
    arrivals: str
    burstiness: float
    trace: Path | None
    speed: float
    concurrency: int | None
    prompt_tokens: str
    output_tokens: str
    max_prompt_tokens: int | None
    max_output_tokens: int | None
    prefix_groups: int
    prefix_tokens: int


def make_workload(load: WorkloadOptions) -> Workload:
    """Raises LoadError for options that do not go together, and for files that cannot be read."""
    if (load.rate is None) == (load.concurrency is None) and load.trace is None:
        raise LoadError("give either --rate or --trace (an open load) or --concurrency (a closed one)")
    if load.trace is not None:
        if load.rate is not None:
            raise LoadError("--trace has its own instants; change them by --speed, not by --rate")
        if load.prefix_tokens:
            raise LoadError("--prefix-tokens goes with drawn lengths, not with --trace")
        if not 0 < load.speed < float("inf"):
            raise LoadError(f"--speed: {load.speed:g} is not valid, expected a number above 0")
        rows = parse_trace(_read(str(load.trace)).splitlines())
        return Replayed(
            rows, load.speed, load.max_prompt_tokens, load.max_output_tokens, load.concurrency is None
        )
    prefixes = SharedPrefixes(load.prefix_groups, load.prefix_tokens) if load.prefix_tokens else None
    arrivals = None if load.rate is None else make_arrivals(load.arrivals, load.rate, load.burstiness)
    return Drawn(
        arrivals, parse_lengths(load.prompt_tokens, _read), parse_lengths(load.output_tokens, _read), prefixes
    )


def _read(path: str) -> str:
    try:
        return read_bounded(Path(path), MAX_FILE_BYTES).decode()
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
