"""`pdserve plan`: its options. Everything they lead to is imported when the command runs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .bench import ArrivalKind
from .options import File, Sets

ELSEWHERE, LOAD = "Devices that need not be here", "The load that is planned for"


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
    rate: Annotated[
        float | None, typer.Option(metavar="R", help="Requests per second.", rich_help_panel=LOAD)
    ] = None,
    arrivals: Annotated[
        ArrivalKind, typer.Option(metavar="KIND", help="poisson, gamma or constant.", rich_help_panel=LOAD)
    ] = ArrivalKind.POISSON,
    burstiness: Annotated[
        float, typer.Option(metavar="B", help="For gamma: below 1 is burstier.", rich_help_panel=LOAD)
    ] = 1.0,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Azure's CSV, or Mooncake's JSON lines.", rich_help_panel=LOAD),
    ] = None,
    speed: Annotated[
        float, typer.Option(metavar="X", help="Speed-up factor of the trace.", rich_help_panel=LOAD)
    ] = 1.0,
    requests: Annotated[
        int, typer.Option(min=10, metavar="N", help="Requests of a trial.", rich_help_panel=LOAD)
    ] = 1000,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="D", help="Lengths, as for bench.", rich_help_panel=LOAD)
    ] = "512",
    output_tokens: Annotated[
        str, typer.Option(metavar="D", help="Lengths of outputs.", rich_help_panel=LOAD)
    ] = "64",
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Cut longer prompts.", rich_help_panel=LOAD)
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Cut longer outputs.", rich_help_panel=LOAD)
    ] = None,
    prefix_groups: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of shared prefixes.", rich_help_panel=LOAD)
    ] = 1,
    prefix_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Their length in tokens.", rich_help_panel=LOAD)
    ] = 0,
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
