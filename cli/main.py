"""The `pdserve` command: options and their help. Each command is implemented in a module of its own, imported
when it runs."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..core.errors import PdserveError
from .ask import chat, generate
from .bench import bench
from .key import key_app
from .options import DEFAULT_ADDRESS, Address


class _Commands(TyperGroup):
    """Environment errors end a command with one message on stderr and status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PdserveError as error:
            print(f"pdserve: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(130) from None
        raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve large language models with prefill and decode on separate devices.",
)


class Output(StrEnum):
    """The output formats of `status`."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"


class PlanOutput(StrEnum):
    """The output formats of `plan`."""

    TEXT = "text"
    JSON = "json"


File = Annotated[
    Path | None, typer.Argument(help="The file; by default ./cluster.yaml, or else the defaults.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pdserve {__version__}")
        raise typer.Exit


@app.callback()
def pdserve(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    tls_ca: Annotated[
        str | None,
        typer.Option(
            envvar="PDSERVE_TLS_CA",
            help="Use TLS; the server's certificate comes from these (PEM), or: public.",
        ),
    ] = None,
    cert: Annotated[
        str | None, typer.Option(envvar="PDSERVE_TLS_CERT", help="Our certificate (PEM).")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="PDSERVE_TLS_KEY", help="Its private key (PEM).")] = None,
) -> None:
    """Holds the options of all commands."""
    from .trust import Trust, use

    use(Trust(tls_ca, cert, key))


@app.command()
def up(file: File = None) -> None:
    """Start a cluster on this machine, or in the Ray cluster it belongs to, and serve until Ctrl-C or
    `pdserve down`."""
    from .plan import read_config
    from .supervise import report_end
    from .up import up

    up(read_config(file))
    report_end()


@app.command()
def supervise(
    file: Annotated[Path, typer.Argument(help="The file, as Ray puts it on the head.")],
    ray_start: Annotated[list[str], typer.Argument(help="The command that starts Ray, behind `--`.")],
    at_reboot: Annotated[bool, typer.Option("--at-reboot", hidden=True)] = False,
) -> None:
    """For `ray up`: start Ray and `pdserve up` on a head, again after a crash or a reboot; where they run,
    apply FILE."""
    from .supervise import supervise

    supervise(file, ray_start, at_reboot)


app.command()(generate)
app.command()(chat)


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the state until interrupted.")] = False,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.TABLE,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show the cluster and its workers."""
    from .admin import show_status
    from .client import connect_to_administer

    with connect_to_administer(address) as client:
        show_status(client, watch, output.value)


@app.command()
def explain(
    request_id: Annotated[
        str, typer.Argument(help="The id of a request that is being served, or that ended recently.")
    ],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show where a request's time went, against what was predicted, and why it was placed where it was."""
    from .client import connect_to_administer
    from .explain import explain

    with connect_to_administer(address) as client:
        explain(client, request_id)


@app.command()
def apply(
    file: Annotated[Path, typer.Argument(help="The file that the cluster is to match.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would change.")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Make the running cluster match a file: instances are added, or drained and removed; no request
    fails."""
    from .admin import apply
    from .client import connect_to_administer

    with connect_to_administer(address) as client:
        apply(client, file, dry_run)


@app.command()
def drain(
    workers: Annotated[
        list[str] | None, typer.Argument(help="Names of workers, as `status` shows them.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All workers.")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Give no more work to workers and wait until they are idle."""
    from .admin import drain
    from .client import connect_to_administer

    if bool(workers) == all_:
        raise typer.BadParameter("name workers, or give --all")
    with connect_to_administer(address) as client:
        drain(client, workers or [])


@app.command()
def down(address: Address = DEFAULT_ADDRESS) -> None:
    """Drain all workers and end the cluster."""
    from .admin import shut_down
    from .client import connect_to_administer

    with connect_to_administer(address) as client:
        shut_down(client)
    print("stopped")


@app.command()
def validate(file: File = None) -> None:
    """Check a cluster.yaml and the model it names."""
    from .plan import validate

    validate(file)


@app.command()
def plan(
    file: File = None,
    output: Annotated[PlanOutput, typer.Option("--output", "-o", help="How to print.")] = PlanOutput.TEXT,
) -> None:
    """Show what a cluster.yaml needs on this machine, what fits, and what does not and why."""
    from .plan import show_plan

    show_plan(file, output.value)


@app.command()
def simulate(
    seed: Annotated[
        int | None, typer.Option(min=0, help="Run this seed alone and print its timeline.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds to run.")] = 100,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; by default one per core.")
    ] = None,
) -> None:
    """Run the cluster's own decisions in virtual time, with faults everywhere; exits with 1 if a promise was
    broken."""
    from .simulate import show_range, show_seed

    num_broken = show_range(first_seed, seeds, processes) if seed is None else show_seed(seed)
    if num_broken:
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Serve the embedded model through one prefill and one decode worker and ask it something."""
    from .demo import demo

    demo()


app.add_typer(key_app, name="key")
app.command()(bench)


def main() -> None:
    """The entry point of the `pdserve` command."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # connections that end are no news
    app()
