"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

File = Annotated[
    Path | None, typer.Argument(help="The file; by default ./cluster.yaml, or else the defaults.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key of the configuration, such as pools.decode.instances=2; may be repeated.",
    ),
]
