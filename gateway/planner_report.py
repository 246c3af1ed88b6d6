"""The planner's state as a message."""

from ..proto import pdserve_pb2 as pb
from ..router.planner_desk import PlannerState
from ..router.planning import Advice, Ratio


def planner_report(state: PlannerState) -> pb.PlannerReport:
    terms, advice = state.terms, state.advice
    deeds = [
        pb.PlannerDeed(
            age_s=state.now_s - record.at_s,
            made_for=_ratio(record.made_for),
            to=_ratio(record.to),
            deed=record.deed.value,
            reason=record.reason,
        )
        for record in state.latest_records
    ]
    if terms is None:
        return pb.PlannerReport(mode=state.mode.value, deeds=deeds)
    report = pb.PlannerReport(
        mode=state.mode.value,
        objective=terms.objective.value,
        horizon_s=terms.horizon_s,
        least=_ratio(terms.bounds.least),
        most=_ratio(terms.bounds.most),
        max_instances=terms.bounds.max_instances,
        num_changes=state.num_changes,
        deeds=deeds,
    )
    if advice is not None:
        report.MergeFrom(_decision(advice, state.now_s))
    return report


def _decision(advice: Advice, now_s: float) -> pb.PlannerReport:
    window = advice.window
    return pb.PlannerReport(
        age_s=now_s - advice.at_s,
        ratio=_ratio(advice.made_for),
        advised=None if advice.to is None else _ratio(advice.to),
        reason=advice.reason,
        load=pb.PlannerLoad(
            num_requests=window.num_requests,
            rate=window.rate,
            forecast_rate=window.forecast_rate,
            mean_prompt_tokens=window.mean_prompt_tokens,
            mean_cached_tokens=window.mean_cached_tokens,
            mean_output_tokens=window.mean_output_tokens,
            num_clients=window.num_clients,
        ),
        candidates=[
            pb.PlannerCandidate(
                ratio=_ratio(one.ratio),
                goodput=one.goodput,
                attainment=one.attainment,
                gain=one.gain,
                cost=one.cost,
                screened_out=one.is_screened_out,
            )
            for one in advice.candidates
        ],
        trust=advice.trust,
        checks=[
            pb.PlannerCheck(
                age_s=now_s - one.until_s, ratio=_ratio(one.ratio), predicted=one.predicted, came=one.came
            )
            for one in advice.checks
        ],
    )


def _ratio(ratio: Ratio) -> pb.Ratio:
    return pb.Ratio(prefill=ratio.num_prefill, decode=ratio.num_decode)
