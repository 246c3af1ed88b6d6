"""`pdserve bench`: its options. Everything they lead to is imported when the command runs."""

from pathlib import Path
from typing import Annotated

import typer

from .address import NO_ADDRESS, Address
from .load_options import (
    LOAD,
    TEXTS,
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

SAMPLING, MEASURE, OUTPUT = "Sampling", "Measurement", "Output"  # panels of options


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help=(
                "HOST:PORT (gRPC) or http://HOST:PORT (OpenAI); one, or two to compare. NAME=ADDRESS"
                " names it."
            )
        ),
    ] = None,
    rate: Rate = None,
    arrivals: Arrivals = ArrivalKind.POISSON,
    burstiness: Burstiness = 1.0,
    trace: Trace = None,
    speed: Speed = 1.0,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Closed load: number of clients, one request each.", rich_help_panel=LOAD
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Requests of one round; 100 if there is no --duration.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="S", help="Seconds after which a round sends no more.", rich_help_panel=LOAD
        ),
    ] = None,
    prompt_tokens: PromptTokens = "512",
    output_tokens: OutputTokens = "64",
    max_prompt_tokens: MaxPromptTokens = None,
    max_output_tokens: MaxOutputTokens = None,
    prefix_groups: PrefixGroups = 1,
    prefix_tokens: PrefixTokens = 0,
    slo: Annotated[
        str,
        typer.Option(
            metavar="SLO",
            help="Targets in ms: ttft, tpot (mean gap), itl (each gap), e2e.",
            rich_help_panel=MEASURE,
        ),
    ] = "ttft=200,tpot=50",
    warm_up: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Requests before each turn that do not count.", rich_help_panel=MEASURE
        ),
    ] = 4,
    rounds: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Rounds; two targets take turns in each.", rich_help_panel=MEASURE
        ),
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="The same seed gives the same load.", rich_help_panel=SAMPLING),
    ] = 0,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="T", help="0 takes the most probable token each time.", rich_help_panel=SAMPLING
        ),
    ] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Let outputs reach the length that was drawn.", rich_help_panel=SAMPLING)
    ] = True,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="S", help="Seconds after which a request has failed.", rich_help_panel=MEASURE
        ),
    ] = 600.0,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The name of the model; by default the one that is served.")
    ] = "",
    vocab_size: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Token ids of prompts are below it.", rich_help_panel=TEXTS),
    ] = None,
    extra: Annotated[
        str, typer.Option(metavar="JSON", help="An object, added to the body of each HTTP request.")
    ] = "",
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write all figures to this file.", rich_help_panel=OUTPUT
        ),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw PNGs into this folder.", rich_help_panel=OUTPUT)
    ] = None,
    address: Address = NO_ADDRESS,
) -> None:
    """Put a server under load and measure it, or compare two.

    TLS and keys are as for other commands."""
    from .run_bench import LoadOptions, ReportFiles, TargetOptions, run

    load = LoadOptions(
        rate=rate,
        arrivals=arrivals.value,
        burstiness=burstiness,
        trace=trace,
        speed=speed,
        concurrency=concurrency,
        requests=requests,
        duration_s=duration,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        prefix_groups=prefix_groups,
        prefix_tokens=prefix_tokens,
        warm_up=warm_up,
        rounds=rounds,
        seed=seed,
        temperature=temperature,
        ignore_eos=ignore_eos,
        timeout_s=timeout,
        vocab_size=vocab_size,
    )
    options = TargetOptions(tuple(targets or [address]), model, extra)
    run(load, options, slo, ReportFiles(json_file, plots))
