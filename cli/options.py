"""Options that several commands have."""

from typing import Annotated

import typer

Address = Annotated[str, typer.Option(envvar="PDSERVE_ADDRESS", help="HOST:PORT of the server.")]
DEFAULT_ADDRESS = "127.0.0.1:50051"
