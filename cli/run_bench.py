"""The implementation of `pdserve bench`: files in, targets, a campaign, a report on stdout, and files out."""

import asyncio
import json
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..loadgen.campaign import CampaignPlan, Contender, Result, ratios_of, run_campaign, summed_up
from ..loadgen.errors import LoadError
from ..loadgen.grpc_target import GrpcTarget
from ..loadgen.http_target import HttpTarget
from ..loadgen.records import Round
from ..loadgen.slo import Slo, parse_slo
from ..loadgen.tables import ratio_lines, report_lines
from ..loadgen.target import Target
from .trust import current_trust
from .workload import WorkloadOptions, make_workload

_DEFAULT_REQUESTS = 100
_CACHED_SHARE = 0.02  # random prompts share next to nothing by chance


@dataclass(frozen=True, kw_only=True)
class LoadOptions(WorkloadOptions):
    """The load options of the command line."""

    requests: int | None
    duration_s: float | None
    warm_up: int
    rounds: int
    seed: int
    temperature: float
    ignore_eos: bool
    timeout_s: float
    vocab_size: int | None

    def words(self) -> dict[str, Any]:
        """Returns the options for JSON."""
        return asdict(self) | {"trace": None if self.trace is None else str(self.trace)}


@dataclass(frozen=True)
class TargetOptions:
    addresses: tuple[str, ...]
    model: str
    extra: str


@dataclass(frozen=True)
class ReportFiles:
    json_file: Path | None
    plots: Path | None


def run(load: LoadOptions, targets: TargetOptions, slo_text: str, outputs: ReportFiles) -> None:
    """The whole command. Raises LoadError."""
    slo, plan = parse_slo(slo_text), make_plan(load)
    results = asyncio.run(_campaign(plan, targets))
    _show(results, slo, may_be_cached=load.prefix_tokens > 0)
    if outputs.json_file is not None:
        words = load.words() | {"targets": targets.addresses} | _circumstances()
        outputs.json_file.write_text(json.dumps(summed_up(words, results, slo), indent=1) + "\n")
    if outputs.plots is not None:
        from ..loadgen.plots import draw_all

        for file in draw_all(results, slo, outputs.plots):
            print(f"drew {file}")


def make_plan(load: LoadOptions) -> CampaignPlan:
    """Raises LoadError for options that do not go together."""
    num_requests = load.requests
    if num_requests is None and load.duration_s is None and load.trace is None:
        num_requests = _DEFAULT_REQUESTS
    return CampaignPlan(
        workload=make_workload(load),
        seed=load.seed,
        num_rounds=load.rounds,
        max_requests=num_requests,
        duration_s=load.duration_s,
        concurrency=load.concurrency,
        num_warm_up=load.warm_up,
        timeout_s=load.timeout_s,
        ignore_eos=load.ignore_eos,
        temperature=load.temperature,
        vocab_size=load.vocab_size,
    )


async def _campaign(plan: CampaignPlan, options: TargetOptions) -> list[Result]:
    if len(options.addresses) > 2:
        raise LoadError("at most two targets can be compared")
    contenders = [_contender(address, options) for address in options.addresses]
    try:
        if len({contender.name for contender in contenders}) < len(contenders):
            raise LoadError("both targets have the same name; give them others as NAME=ADDRESS")
        return await run_campaign(plan, contenders, _tell)
    finally:
        for contender in contenders:
            await contender.target.close()


def _contender(text: str, options: TargetOptions) -> Contender:
    name, separator, address = text.partition("=")
    if not separator:
        name, address = text, text
    trust = current_trust()
    target: Target
    if address.startswith(("http://", "https://")):
        tls = trust.tls_context() if address.startswith("https://") else None
        target = HttpTarget(address, options.model, trust.api_key or "", _object(options.extra), tls)
    else:
        target = GrpcTarget(address, options.model, trust.api_key or "", trust.credentials())
    return Contender(name, target)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise LoadError(f"--extra: {error}") from error
    if not isinstance(value, dict):
        raise LoadError("--extra: expected a JSON object")
    return value


def _tell(name: str, index: int, one: Round) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(
            f"round {index + 1}, {name}: {len(one.records)} requests in {one.duration_s:.1f} s",
            file=sys.stderr,
        )


def _show(results: list[Result], slo: Slo, may_be_cached: bool) -> None:
    for result in results:
        report = result.report(slo)
        print(*report_lines(result.name, report), "", sep="\n")
        if (report.num_cached_tokens or 0) > _CACHED_SHARE * report.num_input_tokens and not may_be_cached:
            print(
                f"careful: {result.name} knew many of these prompts, probably from a run before; take another"
                " --seed\n"
            )
    ratios = ratios_of(results, slo)
    if ratios:
        print(*ratio_lines(results[0].name, results[1].name, ratios), sep="\n")


def _circumstances() -> dict[str, str]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "pdserve": __version__,
        "at": now,
        "machine": platform.platform(),
        "python": platform.python_version(),
    }
