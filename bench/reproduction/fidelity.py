"""The virtual cluster beside the simulator: good requests of the same workloads, served by the replay that
plans are made of, and by the simulation that has connections, transfers in chunks, heartbeats and a KV model.

    python -m bench.reproduction.fidelity [--seeds 50]"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from pdserve.core.messages import KVLayout, Role
from pdserve.core.request import Request, SamplingParams
from pdserve.loadgen.slo import Slo
from pdserve.planner.durations import DecodeSeconds, Durations
from pdserve.planner.virtual_cluster import Arrival, ServedRequest
from pdserve.router.config import RouterConfig
from pdserve.router.events import EmitChoiceEnd, EmitEnd, EmitTokens
from pdserve.simulator.faults import FaultRates
from pdserve.simulator.scenario import MAX_MODEL_LEN, PlannedRequest, Scenario
from pdserve.simulator.simulated_hosts import PlannedHost
from pdserve.simulator.simulated_worker import WorkerShape
from pdserve.simulator.simulation import Simulation

from .profiles import Profile

POOLS = {Role.PREFILL: 2, Role.DECODE: 2}
SHAPE = WorkerShape(
    num_blocks=600,
    block_size=4,
    max_model_len=MAX_MODEL_LEN,
    max_batch_tokens=64,
    max_batch_size=16,
    step_s=0.01,
    token_s=0.0005,
)
RATE, DURATION_S = 55.0, 8.0
READY_S = 2.0  # all workers of the simulation have started
SLO = Slo(ttft=80.0, tpot=20.0)
TINY_S = 1e-15  # steps of the simulation take no longer for contexts


@dataclass(frozen=True)
class Both:
    """Good requests of one seed's workload."""

    num_requests: int
    num_good_simulated: int
    num_good_replayed: int


def workload(seed: int) -> list[Arrival]:
    rng = Random(seed)
    found, at_s = [], READY_S
    while (at_s := at_s + rng.expovariate(RATE)) < READY_S + DURATION_S:
        prompt = tuple(rng.randrange(1000) for _ in range(rng.randint(5, 60)))
        found.append(Arrival(at_s, prompt, rng.randint(1, 40)))
    return found


def replayed(requests: list[Arrival]) -> list[ServedRequest]:
    decode = DecodeSeconds(SHAPE.step_s, TINY_S, SHAPE.token_s)
    durations = Durations(
        prefill_step_s=SHAPE.step_s,
        prefill_token_s=SHAPE.token_s,
        prefill_square_s=TINY_S,
        decode=decode,
        decode_large=decode,
        large_batch=1,
        transfer_s=0.0005,
        link_bytes_per_s=1e9,
    )
    layout = KVLayout(1, 1, 8, "float32", SHAPE.block_size, "m")
    profile = Profile(
        durations,
        layout,
        kv_bytes=SHAPE.num_blocks * SHAPE.block_size * layout.bytes_per_token,
        max_model_len=SHAPE.max_model_len,
        max_batch_tokens=SHAPE.max_batch_tokens,
        max_batch_size=SHAPE.max_batch_size,
    )
    cluster = profile.cluster(POOLS[Role.PREFILL], POOLS[Role.DECODE], RouterConfig().itl_slo_s, True)
    return cluster.serve(requests)


def simulated(requests: list[Arrival], seed: int) -> list[ServedRequest]:
    """Raises RuntimeError where the simulation finds a violation."""
    simulation = Simulation(_scenario(requests, seed))
    served = [
        ServedRequest(number, one.at_s, len(one.prompt_token_ids)) for number, one in enumerate(requests)
    ]
    for client, record in zip(simulation.clients, served, strict=True):
        client.on_event = _recorder(client.on_event, simulation, record)  # type: ignore[assignment]
    outcome = simulation.run()
    if outcome.violations:
        raise RuntimeError("; ".join(outcome.violations))
    return served


def _recorder(
    on_event: Callable[[EmitTokens | EmitChoiceEnd | EmitEnd], None],
    simulation: Simulation,
    record: ServedRequest,
) -> Callable[[EmitTokens | EmitChoiceEnd | EmitEnd], None]:
    def observe(event: EmitTokens | EmitChoiceEnd | EmitEnd) -> None:
        if isinstance(event, EmitTokens):
            record.token_s += [simulation.time.now_s] * len(event.tokens)
        elif isinstance(event, EmitEnd):
            record.is_complete = event.error is None
        on_event(event)

    return observe


def _scenario(requests: list[Arrival], seed: int) -> Scenario:
    plans = tuple(
        PlannedRequest(
            at_s=one.at_s,
            request=Request(
                request_id=f"r{number}",
                prompt_token_ids=one.prompt_token_ids,
                sampling=SamplingParams(max_tokens=one.num_output_tokens, ignore_eos=True, seed=number),
            ),
        )
        for number, one in enumerate(requests)
    )
    return Scenario(
        seed=seed,
        pools=POOLS,
        shapes=defaultdict(lambda: SHAPE),
        transport="shm",
        chunk_bytes=512,
        ring_slots=4,
        lease_s=30.0,
        max_links=64,
        max_queued_requests=1024,
        max_attempts=5,
        prefill_on_decode=True,
        start_s=0.1,
        hosts=(PlannedHost(64, 0.0),),
        join_timeout_s=2.0,
        rates=FaultRates(),
        requests=plans,
        accidents=(),
    )


def both(seed: int) -> Both:
    requests = workload(seed)
    good = [
        sum(not one.misses(SLO) for one in served)
        for served in (simulated(requests, seed), replayed(requests))
    ]
    return Both(len(requests), *good)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    options = parser.parse_args()
    found = []
    for seed in range(options.seeds):
        found.append(both(seed))
        one = found[-1]
        print(
            f"seed {seed}: {one.num_requests} requests; good: {one.num_good_simulated} simulated,"
            f" {one.num_good_replayed} replayed",
            flush=True,
        )
    simulated_good = sum(one.num_good_simulated for one in found)
    replayed_good = sum(one.num_good_replayed for one in found)
    num_requests = sum(one.num_requests for one in found)
    print(
        f"{simulated_good / num_requests:.2%} good simulated, {replayed_good / num_requests:.2%} replayed:"
        f" {replayed_good / simulated_good - 1:+.2%}"
    )


if __name__ == "__main__":
    main()
