"""`pdserve plan`: its options. Everything they lead to is imported when the command runs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .load_options import (
    LOAD,
    ArrivalKind,
    Arrivals,
    Burstiness,
    MaxOutputTokens,
    MaxPromptTokens,
    OutputTokens,
    PrefixGroups,
    PrefixTokens,
    PromptTokens,
    Rate,
    Speed,
    Trace,
)
from .options import File, Sets

ELSEWHERE = "Devices that need not be here"


class PlanOutput(StrEnum):
    """The output formats of `plan`."""

    TEXT = "text"
    JSON = "json"


def plan(
    file: File = None,
    output: Annotated[PlanOutput, typer.Option("--output", "-o", help="How to print.")] = PlanOutput.TEXT,
    sets: Sets = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=64, metavar="N", help="How many GPUs to divide.", rich_help_panel=ELSEWHERE),
    ] = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="Their kind, such as h200.", rich_help_panel=ELSEWHERE)
    ] = "h200",
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="A checkpoint, or its config.json alone.", rich_help_panel=ELSEWHERE
        ),
    ] = "",
    slo: Annotated[
        str,
        typer.Option(
            metavar="SLO", help="As for bench; by default the file's slo.", rich_help_panel=ELSEWHERE
        ),
    ] = "",
    target: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Of the requests, that are to meet it.", rich_help_panel=ELSEWHERE
        ),
    ] = 0.9,
    price: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="P", help="Of a GPU for an hour.", rich_help_panel=ELSEWHERE),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw goodput over rate.", rich_help_panel=ELSEWHERE)
    ] = None,
    rate: Rate = None,
    arrivals: Arrivals = ArrivalKind.POISSON,
    burstiness: Burstiness = 1.0,
    trace: Trace = None,
    speed: Speed = 1.0,
    requests: Annotated[
        int, typer.Option(min=10, metavar="N", help="Requests of a trial.", rich_help_panel=LOAD)
    ] = 1000,
    prompt_tokens: PromptTokens = "512",
    output_tokens: OutputTokens = "64",
    max_prompt_tokens: MaxPromptTokens = None,
    max_output_tokens: MaxOutputTokens = None,
    prefix_groups: PrefixGroups = 1,
    prefix_tokens: PrefixTokens = 0,
) -> None:
    """Show what a cluster.yaml needs on this machine, what fits, and what does not and why.

    With --devices: how to divide that many GPUs between prefill and decode, tried in virtual time."""
    if devices is None:
        from .plan import show_plan

        show_plan(file, output.value, sets or [])
        return
    from .splits import Answer, Hardware, show_splits
    from .workload import WorkloadOptions

    workload = WorkloadOptions(
        rate=rate,
        arrivals=arrivals.value,
        burstiness=burstiness,
        trace=trace,
        speed=speed,
        concurrency=None,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        prefix_groups=prefix_groups,
        prefix_tokens=prefix_tokens,
    )
    answer = Answer(slo, target, requests, price, output.value, plot)
    show_splits(file, sets or [], Hardware(devices, gpu, model), workload, answer)
