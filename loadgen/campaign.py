"""One or more targets under the same workload, round after round. Targets take turns, and the order turns
around each round, so that what changes on the machine meanwhile does not fall on one of them alone."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .compare import FigureRatio, compare
from .errors import LoadError, LoadRequestFailed
from .records import Round
from .report import Report, make_report
from .runner import LoadRunner, RoundLoad
from .slo import Slo
from .target import LoadRequest, ModelFacts, Target
from .workload import Drawn, Prompts, ScheduledRequest, Workload, limited

_DEFAULT_VOCABULARY = 1000  # when a target does not report its own: every model has at least this many tokens
_FIRST_ID = 3  # most tokenizers have their special tokens before it
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class CampaignPlan:
    """The load that every target receives."""

    workload: Workload
    seed: int = 0
    num_rounds: int = 1
    max_requests: int | None = None  # limit per round
    duration_s: float | None = None  # length of one round: nothing is sent after it
    concurrency: int | None = None
    num_warm_up: int = 0  # requests before each turn, one after the other, that do not count
    timeout_s: float | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    vocab_size: int | None = None  # token ids below it; by default the target's own


@dataclass(frozen=True)
class Contender:
    """A target with the name that reports give it. `prepare` is awaited before each of its turns."""

    name: str
    target: Target
    prepare: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True)
class Result:
    """The results of all rounds of one target."""

    name: str
    rounds: tuple[Round, ...]

    def report(self, slo: Slo) -> Report:
        return make_report(self.rounds, slo)


Progress = Callable[[str, int, Round], None]  # name, round, what was seen


async def run_campaign(
    plan: CampaignPlan, contenders: Sequence[Contender], progress: Progress | None = None
) -> list[Result]:
    """Raises LoadError when a target cannot be used for this load."""
    turns = [await _TargetTurns.of(plan, contender, salt) for salt, contender in enumerate(contenders)]
    rounds: list[list[Round]] = [[] for _ in contenders]
    for index in range(plan.num_rounds):
        order = range(len(turns)) if index % 2 == 0 else reversed(range(len(turns)))
        for which in order:
            rounds[which].append(await turns[which].take(index))
            if progress is not None:
                progress(contenders[which].name, index, rounds[which][-1])
    return [Result(contender.name, tuple(mine)) for contender, mine in zip(contenders, rounds, strict=True)]


@dataclass(frozen=True)
class _TargetTurns:
    """One target's share."""

    plan: CampaignPlan
    contender: Contender
    runner: LoadRunner
    prompts: Prompts

    @staticmethod
    async def of(plan: CampaignPlan, contender: Contender, salt: int) -> "_TargetTurns":
        try:
            facts = await contender.target.facts()
        except LoadRequestFailed as error:
            raise LoadError(f"{contender.name}: {error}") from error
        _check_fits(plan, contender.name, facts)
        high = plan.vocab_size or facts.vocab_size or _DEFAULT_VOCABULARY
        prefixes = plan.workload.prefixes if isinstance(plan.workload, Drawn) else None
        prompts = Prompts(plan.seed, min(_FIRST_ID, high - 1), high, facts.special_token_ids, prefixes, salt)
        return _TargetTurns(plan, contender, LoadRunner(contender.target), prompts)

    async def take(self, index: int) -> Round:
        plan = self.plan
        if self.contender.prepare is not None:
            await self.contender.prepare()
        await self._warm_up(index)
        return await self.runner.measured(
            RoundLoad(
                jobs=limited(plan.workload.jobs(plan.seed, index), plan.max_requests, plan.duration_s),
                make_request=lambda job: self._request(job, index),
                concurrency=plan.concurrency,
                duration_s=plan.duration_s,
                timeout_s=plan.timeout_s,
            )
        )

    def _request(self, job: ScheduledRequest, round_index: int) -> LoadRequest:
        return self._asking(self.prompts.token_ids(job, round_index), job.num_output_tokens)

    def _asking(self, token_ids: Sequence[int], num_output_tokens: int) -> LoadRequest:
        return LoadRequest(token_ids, num_output_tokens, self.plan.ignore_eos, self.plan.temperature)

    async def _warm_up(self, index: int) -> None:
        """Prompts as long as the load's own, that no job has; their outputs are short."""
        first = index * self.plan.num_warm_up
        jobs = limited(_endless(self.plan.workload.jobs(self.plan.seed, index)), self.plan.num_warm_up, None)
        prompts = [self.prompts.warm_up(first + job.index, job.num_prompt_tokens) for job in jobs]
        requests = [self._asking(token_ids, _WARM_UP_TOKENS) for token_ids in prompts]
        try:
            await self.runner.warm_up(requests, self.plan.timeout_s)
        except (LoadRequestFailed, TimeoutError) as error:
            raise LoadError(
                f"{self.contender.name}: a warm-up request failed: {str(error) or 'timeout'}"
            ) from error


def _endless(jobs: Iterator[ScheduledRequest]) -> Iterator[ScheduledRequest]:
    """A trace's rows over again, should there be fewer than warm-up requests."""
    seen = []
    for job in jobs:
        seen.append(job)
        yield job
    index = len(seen)
    while seen:
        yield replace(seen[index % len(seen)], index=index)
        index += 1


def _check_fits(plan: CampaignPlan, name: str, facts: ModelFacts) -> None:
    """Checks lengths before anything is sent, where the bounds are known."""
    if not isinstance(plan.workload, Drawn) or facts.max_model_len is None:
        return
    lengths = (plan.workload.prompt_tokens.longest, plan.workload.output_tokens.longest)
    prefix = 0 if plan.workload.prefixes is None else plan.workload.prefixes.num_tokens
    longest = sum(length or 1 for length in lengths) + prefix
    if longest > facts.max_model_len:
        raise LoadError(
            f"{name}: prompt and output may have {longest} tokens together, but the model takes"
            f" {facts.max_model_len}; give lengths a max"
        )


def summed_up(plan_words: dict[str, Any], results: Sequence[Result], slo: Slo) -> dict[str, Any]:
    """Summarizes for JSON: the load in the caller's words, each target's figures (all rounds, and each), and
    the ratios of two."""
    targets = [
        {
            "name": result.name,
            "total": result.report(slo).as_dict(),
            "rounds": [make_report([one], slo).as_dict() for one in result.rounds],
        }
        for result in results
    ]
    ratios = [vars(ratio) for ratio in ratios_of(results, slo)]
    return {"format": "pdserve-bench-1", "load": plan_words, "targets": targets, "ratios": ratios}


def ratios_of(results: Sequence[Result], slo: Slo) -> list[FigureRatio]:
    """Second over first; nothing unless there are two."""
    if len(results) != 2:
        return []
    first, second = results
    return compare(first.rounds, second.rounds, slo)
