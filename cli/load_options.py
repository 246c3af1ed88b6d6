"""Options that describe a load, of `bench`, which sends it, and of `plan`, which plans for it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

LOAD, TEXTS = "Load", "Prompts and outputs"  # panels of options


class ArrivalKind(StrEnum):
    """Gaps between the requests of an open load."""

    POISSON = "poisson"
    GAMMA = "gamma"
    CONSTANT = "constant"


Rate = Annotated[
    float | None, typer.Option(metavar="R", help="Open load: requests per second.", rich_help_panel=LOAD)
]
Arrivals = Annotated[
    ArrivalKind,
    typer.Option(metavar="KIND", help="Open load: poisson, gamma or constant gaps.", rich_help_panel=LOAD),
]
Burstiness = Annotated[
    float,
    typer.Option(metavar="B", help="For gamma: 1 is poisson, below 1 is burstier.", rich_help_panel=LOAD),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Open load: Azure's CSV, or Mooncake's JSON lines.", rich_help_panel=LOAD
    ),
]
Speed = Annotated[
    float, typer.Option(metavar="X", help="Speed-up factor of the trace.", rich_help_panel=LOAD)
]
PromptTokens = Annotated[
    str,
    typer.Option(
        metavar="D",
        help="A number, uniform:min=A,max=B, file:PATH, or lognormal: with mean=, cv=, min=, max=.",
        rich_help_panel=TEXTS,
    ),
]
OutputTokens = Annotated[
    str, typer.Option(metavar="D", help="Lengths of outputs, in the same forms.", rich_help_panel=TEXTS)
]
MaxPromptTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Cut longer prompts of a trace.", rich_help_panel=TEXTS),
]
MaxOutputTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Cut longer outputs of a trace.", rich_help_panel=TEXTS),
]
PrefixGroups = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Number of prefixes that prompts share.", rich_help_panel=TEXTS),
]
PrefixTokens = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Their length in tokens, before the prompt's own.", rich_help_panel=TEXTS
    ),
]
