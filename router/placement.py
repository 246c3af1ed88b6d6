"""Chooses where a job runs: the (prefill, decode) pair, or the single worker, with the least predicted cost.

Cost is the time that streams take for it: predicted TTFT (queue and uncached prompt tokens on P), the part of
the transfer that compute does not hide, and, for each token that the output is expected to have, D's next
step and the delay of its other streams.
Workers on which a token would take longer than the SLO come last, the least excess first; but once no
prefill worker has room, the load is beyond capacity, and cost alone decides. A decision considers the few
least loaded workers of each role and those that hold most of the prefix, never all pairs."""

from itertools import islice
from operator import itemgetter

from ..core.latency import LatencyModel
from ..core.request import Request
from .candidates import NUM_KEPT, Candidate, PrefillOption, RoutingDecision, Score
from .config import RouterConfig
from .links import Links
from .live_request import Job
from .pairs import Pairs
from .prefix_index import PrefixIndex
from .registered_worker import RegisteredWorker, decode_load
from .registry import Registry


class Placer:
    """Makes placement decisions; changes no state."""

    def __init__(
        self,
        registry: Registry,
        index: PrefixIndex,
        model: LatencyModel,
        links: Links,
        pairs: Pairs,
        config: RouterConfig,
    ) -> None:
        self.config = config
        self._registry = registry
        self._links = links
        self._failed_pairs = pairs
        self._index = index
        self._model = model

    def place(self, job: Job, host: RegisteredWorker | None = None) -> RoutingDecision | None:
        """Returns the best place that has room now; None when the job has to wait. `host`: makes room for the
        job's decoding."""
        prefills, decodes, depths = self._workers(job, host)
        options = [self._prefill_option(job, worker, depths) for worker in prefills]
        with_room = [option for option in options if self._has_prefill_room(option)]
        is_beyond_capacity = not with_room
        options = with_room or options
        # a retry may have to go elsewhere
        if len(options) > self.config.num_candidates and not job.failed_pairs:
            options = sorted(options, key=_by_ttft)[: self.config.num_candidates]
        if not job.needs_decode:
            candidates = self._prefill_only(job, options)
            candidates += self._on_one(job, decodes, depths, bool(prefills), is_beyond_capacity)
        elif _can_pair(prefills, decodes):
            candidates = self._pairs(job, options, decodes, depths, host)
            # when each of them has failed, the pools may not reach each other: one worker alone needs no
            # transfer
            has_way = not candidates or any(not candidate[0][0] for candidate in candidates)
            candidates += self._on_one(job, decodes, depths, has_way, is_beyond_capacity, host)
            if host is None and self._may_decode_on_prefill(job, decodes):
                is_beyond_capacity = True
                able = [worker for worker in prefills if worker.capacity_tokens >= job.num_total_tokens]
                candidates += self._on_one(job, able, depths, True, True)
        else:
            candidates = self._on_one(job, decodes or prefills, depths, False, is_beyond_capacity, host)
        if not candidates:
            return None
        candidates.sort(key=_by_cost if is_beyond_capacity else itemgetter(0))
        score, option, decode, itl_s, transfer_s = candidates[0]
        if not self._has_prefill_room(option):
            return None
        return RoutingDecision(
            option.worker,
            decode,
            option.num_cached_tokens,
            option.num_new_tokens,
            option.compute_s,
            option.queue_s,
            transfer_s,
            itl_s,
            score[2] > 0.0,
            candidates[:NUM_KEPT],
        )

    def alone(self, job: Job, worker: RegisteredWorker) -> RoutingDecision:
        """Returns the decision to serve the job on an idle worker, both phases."""
        option = self._prefill_option(job, worker, {})
        return RoutingDecision(
            worker,
            worker,
            option.num_cached_tokens,
            option.num_new_tokens,
            option.compute_s,
            option.queue_s,
            itl_s=self._decode_itl_s(job, worker),
        )

    def itl_wait_s(self, request: Request) -> float:
        """Returns 0 when a worker is predicted to keep the time between tokens within the SLO with this
        request as well; else the seconds until the next of a worker's streams is expected to end. An idle
        worker takes any request: the measurement corrects a model that has become too pessimistic."""
        num_tokens, num_choices = len(request.prompt_token_ids), request.sampling.n
        num_total_tokens = num_tokens + request.sampling.max_tokens
        count = self.config.num_candidates
        workers = self._registry.best_decode(num_total_tokens, count)
        waits_s: list[float] = []
        for worker in workers or self._registry.best_prefill(num_total_tokens, count):
            itl_s = self._itl_s(worker, num_tokens, num_choices)
            if not worker.num_sequences or itl_s <= self.config.itl_slo_s:
                return 0.0
            num_left = max(1.0, worker.num_expected_tokens / worker.num_sequences)
            waits_s.append(itl_s * num_left / worker.num_sequences)
        return min(waits_s, default=0.0)

    def _may_decode_on_prefill(self, job: Job, decodes: list[RegisteredWorker]) -> bool:
        """Whether workers may take each other's work and no decode worker would keep the SLO with the job.
        For one that does, but is full, the job waits: streams end sooner than prompts would be delayed."""
        limit_s = self.config.itl_slo_s
        return self.config.prefill_on_decode_factor is not None and all(
            self._decode_itl_s(job, worker) > limit_s for worker in decodes
        )

    def _has_prefill_room(self, option: PrefillOption) -> bool:
        return option.worker.has_prefill_room(option.num_new_tokens, self.config.max_prefill_backlog_tokens)

    def _workers(
        self, job: Job, host: RegisteredWorker | None
    ) -> tuple[list[RegisteredWorker], list[RegisteredWorker], dict[int, int]]:
        """Returns the prefill and decode workers to consider, and the longest cached prefix anywhere, in
        blocks by block size."""
        count = self.config.num_candidates
        num_decode_tokens = job.num_total_tokens
        decodes = [host] if host is not None else self._registry.best_decode(num_decode_tokens, count)
        if (
            decodes
            and host is None
            and not any(_has_decode_room(job, worker) and worker.may_receive for worker in decodes)
        ):
            # the load weighs sequences and blocks: others may have room for this job
            others = self._registry.with_decode_room(
                job.num_tokens, num_decode_tokens, len(job.choices), job.num_expected_tokens, count
            )
            decodes = others or decodes
        num_prefill_tokens = job.num_tokens + 1 if decodes else num_decode_tokens
        prefills = self._registry.best_prefill(num_prefill_tokens, count)
        depths: dict[int, int] = {}
        for block_size in dict.fromkeys(worker.info.layout.block_size for worker in (*prefills, *decodes)):
            depths[block_size], holders = self._index.longest(job.chain(block_size))
            for name in islice(holders, count):
                worker = self._registry.get(name)
                if worker is None or not worker.takes_work:
                    continue
                if (
                    worker.role.prefills
                    and worker.capacity_tokens >= num_prefill_tokens
                    and worker not in prefills
                ):
                    prefills.append(worker)
                if (
                    worker.role.decodes
                    and worker.capacity_tokens >= num_decode_tokens
                    and worker not in decodes
                ):
                    decodes.append(worker)
        return prefills, decodes, depths

    def _cached_tokens(self, job: Job, worker: RegisteredWorker, depths: dict[int, int]) -> int:
        """Returns the cached tokens according to the index; at least one token is always computed."""
        block_size = worker.info.layout.block_size
        depth = depths.get(block_size, 0)
        if not depth:
            return 0
        num_blocks = self._index.cached_blocks(worker.worker_id, job.chain(block_size), depth)
        return min(num_blocks * block_size, job.num_tokens - 1)

    def _prefill_option(self, job: Job, worker: RegisteredWorker, depths: dict[int, int]) -> PrefillOption:
        cached = 0 if job.computes_whole_prompt else self._cached_tokens(job, worker, depths)
        new, chunk = job.num_tokens - cached, worker.info.max_batch_tokens
        slower = worker.speed.prefill_factor
        compute_s, stall_s = slower * self._model.prompt_s(new, cached, chunk), 0.0
        if worker.num_sequences:
            step_s = worker.speed.decode_factor * self._model.decode_s(
                worker.num_sequences, worker.num_context_tokens
            )
            stall_s = step_s + slower * self._model.prompt_s(min(new, chunk), cached, chunk)
            compute_s += step_s * -(-new // chunk)
        queue_s = worker.queue_s
        if worker.is_short(new):  # it shares half of each step with the short ones before it
            ahead_s = slower * self._model.prompt_s(2 * worker.num_short_tokens + chunk, 0, chunk)
            queue_s = min(queue_s, ahead_s)
        return PrefillOption(worker, cached, new, queue_s, compute_s, stall_s)

    def _decode_itl_s(self, job: Job, worker: RegisteredWorker) -> float:
        return self._itl_s(worker, job.num_tokens, len(job.choices))

    def _itl_s(self, worker: RegisteredWorker, num_tokens: int, num_choices: int) -> float:
        """Returns the predicted time between tokens with `num_choices` more sequences of `num_tokens`."""
        num_context_tokens = worker.num_context_tokens + num_choices * num_tokens
        return worker.speed.decode_factor * self._model.decode_s(
            worker.num_sequences + num_choices, num_context_tokens
        )

    def _decode_cost_s(self, job: Job, worker: RegisteredWorker) -> float:
        """Returns the seconds that decoding the job there is expected to take, and to add to the streams that
        the worker has already."""
        num_choices = len(job.choices)
        delay_s = worker.speed.decode_weight * self._model.decode_delay_s(
            worker.num_sequences, worker.num_context_tokens, num_choices, num_choices * job.num_tokens
        )
        return delay_s * job.num_expected_tokens

    def _score(
        self,
        job: Job,
        option: PrefillOption,
        decode: RegisteredWorker | None,
        itl_s: float,
        cost_s: float,
        load: float,
    ) -> Score:
        prefill_id, decode_id = option.worker.worker_id, decode.worker_id if decode else None
        excess_s = max(0.0, itl_s - self.config.itl_slo_s, option.stall_s - self.config.itl_slo_s)
        num_failed = (option.worker in job.failed_workers) + (decode in job.failed_workers)
        failed = (option.worker, decode) in job.failed_pairs
        if not failed and decode is not None:
            failed = self._links.avoids(option.worker, decode) or self._failed_pairs.avoids(
                option.worker, decode
            )
        return failed, num_failed, excess_s, cost_s, load, prefill_id, decode_id or ""

    def _prefill_only(self, job: Job, options: list[PrefillOption]) -> list[Candidate]:
        return [
            (self._score(job, option, None, 0.0, option.ttft_s, 0.0), option, None, 0.0, 0.0)
            for option in options
        ]

    def _pairs(
        self,
        job: Job,
        options: list[PrefillOption],
        decodes: list[RegisteredWorker],
        depths: dict[int, int],
        host: RegisteredWorker | None,
    ) -> list[Candidate]:
        candidates: list[Candidate] = []
        for decode in decodes:
            if not (decode is host or _has_decode_room(job, decode)) or not decode.may_receive:
                continue
            held = self._cached_tokens(job, decode, depths)
            num_bytes = (job.num_tokens - held) * decode.info.layout.wire_bytes_per_token
            itl_s, load = self._decode_itl_s(job, decode), decode_load(decode)
            decode_s = self._decode_cost_s(job, decode)
            for option in options:
                if (
                    option.worker is not decode
                    and option.worker.layout == decode.layout
                    and option.worker.may_send
                ):
                    transfer_s = self._model.exposed_transfer_s(num_bytes, option.compute_s)
                    cost_s = option.ttft_s + transfer_s + decode_s
                    score = self._score(job, option, decode, itl_s, cost_s, load)
                    candidates.append((score, option, decode, itl_s, transfer_s))
        return candidates

    def _on_one(
        self,
        job: Job,
        workers: list[RegisteredWorker],
        depths: dict[int, int],
        others_prefill: bool,
        is_beyond_capacity: bool,
        host: RegisteredWorker | None = None,
    ) -> list[Candidate]:
        """Returns the candidates that serve both phases on one worker. Where others prefill, a decode
        worker's time is precious: it must keep its streams inside the SLO while others have room, and its
        prefill counts `prefill_on_decode_factor` times, as it delays later ones."""
        candidates: list[Candidate] = []
        for worker in workers:
            if worker is not host and not _has_decode_room(job, worker):
                continue
            is_dear = others_prefill and not worker.role.prefills
            factor = self.config.prefill_on_decode_factor if is_dear else 1.0
            if factor is None:
                continue
            option = self._prefill_option(job, worker, depths)
            if not self._has_prefill_room(option):
                continue
            itl_s = self._decode_itl_s(job, worker)
            cost_s = option.queue_s + factor * option.compute_s + self._decode_cost_s(job, worker)
            score = self._score(job, option, worker, itl_s, cost_s, decode_load(worker))
            if not is_dear or is_beyond_capacity or score[2] == 0.0:
                candidates.append((score, option, worker, itl_s, 0.0))
        return candidates


def _has_decode_room(job: Job, worker: RegisteredWorker) -> bool:
    return worker.has_decode_room(job.num_tokens, len(job.choices), job.num_expected_tokens)


def _by_cost(candidate: Candidate) -> tuple[bool, int, float, float, str, str]:
    """Orders candidates as their scores do, but for the excess over the SLO."""
    score = candidate[0]
    return score[0], score[1], *score[3:]


def _by_ttft(option: PrefillOption) -> tuple[float, str]:
    return option.ttft_s, option.worker.worker_id


def _can_pair(prefills: list[RegisteredWorker], decodes: list[RegisteredWorker]) -> bool:
    return any(p is not d and p.layout == d.layout for p in prefills for d in decodes)
