"""`pdserve planner`: what the planner of a running cluster saw, considered, predicted and did."""

from google.protobuf.json_format import MessageToJson

from ..proto import pdserve_pb2 as pb
from .client import Client
from .status import age
from .terminal import show

MAX_CHECKS = 10


def show_planner(client: Client, output: str) -> None:
    """Print its latest decision, and its history."""
    report = client.cluster.Planner(pb.PlannerRequest())
    if output == "json":
        show(MessageToJson(report, preserving_proto_field_name=True))
    else:
        show("\n".join(as_lines(report)))


def as_lines(report: pb.PlannerReport) -> list[str]:
    if report.mode == "off":
        return ["planner: off", *_history(report)]
    lines = [
        f"planner: {report.mode}, for {report.objective} over {report.horizon_s:g} s;"
        f" {_ratio(report.least)} to {_ratio(report.most)}, at most {report.max_instances} instances;"
        f" {report.num_changes} changes"
    ]
    if not report.HasField("age_s"):
        return [*lines, "no decision yet", *_history(report)]
    load = report.load
    advised = f"{_ratio(report.advised)}" if report.HasField("advised") else "no change"
    lines += [
        f"load: {load.rate:.3g} requests/s, {load.forecast_rate:.3g} expected; prompts of"
        f" {load.mean_prompt_tokens:.0f} tokens, {load.mean_cached_tokens:.0f} cached; outputs of"
        f" {load.mean_output_tokens:.0f}; replayed: {load.num_requests} requests, {load.num_clients} clients",
        f"{age(report.age_s)} ago, at {_ratio(report.ratio)}: {advised}: {report.reason}",
        f"trust: {report.trust:.0%}",
    ]
    if report.candidates:
        lines += ["", "RATIO     GOODPUT  GOOD  GAIN      COST"]
        lines += [_candidate(one) for one in report.candidates]
    if report.checks:
        lines += ["", "AGE   RATIO     PREDICTED  CAME"]
        lines += [
            f"{age(one.age_s):<4}  {_ratio(one.ratio):<8}  {one.predicted:<9.3g}  {one.came:.3g}"
            for one in report.checks[-MAX_CHECKS:]
        ]
    return lines + _history(report)


def _history(report: pb.PlannerReport) -> list[str]:
    """Returns the changes of the last hour, made or advised."""
    if not report.deeds:
        return []
    return ["", "AGE   CHANGE         WHAT"] + [
        f"{age(one.age_s):<4}  {_ratio(one.made_for)} -> {_ratio(one.to):<6}  {one.deed}: {one.reason}"
        for one in report.deeds
    ]


def _candidate(one: pb.PlannerCandidate) -> str:
    figures = f"{one.goodput:<7.3g}  {one.attainment:<4.0%}  {one.gain:<8.3g}  {one.cost:.3g}"
    return f"{_ratio(one.ratio):<8}  {figures}" + ("  (given up)" if one.screened_out else "")


def _ratio(ratio: pb.Ratio) -> str:
    return f"{ratio.prefill}P{ratio.decode}D"
