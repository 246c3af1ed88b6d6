"""The `pdserve` command: options and their help. Each command is implemented in a module of its own, imported
when it runs."""

import difflib
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..core.errors import PdserveError
from .address import NO_ADDRESS, Address
from .ask import chat, generate
from .bench import bench
from .commands import Group, PlainCommand
from .ending import end_at_once
from .entry import EXIT_SIGPIPE
from .key import key_app
from .options import File, Sets
from .plan_command import PlanOutput as PlannerOutput, plan
from .terminal import show

_MEANT = {  # what other tools call our commands
    "ps": "status",
    "ls": "status",
    "top": "status -w",
    "start": "up",
    "run": "serve MODEL, or pdserve generate PROMPT",
    "stop": "down",
    "kill": "down",
    "scale": "apply FILE",
    "version": "--version",
    "help": "--help",
}


class _Commands(Group):
    """Environment errors end a command with one message on stderr and status 1."""

    def invoke(self, ctx: Any) -> Any:
        if signal.getsignal(signal.SIGINT) is end_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except PdserveError as error:
            show(f"pdserve: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # as `| head` ends others
            os._exit(EXIT_SIGPIPE)
        raise typer.Exit(1)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Says of an unknown command which one may be meant."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            similar = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            meant = _MEANT.get(name) or (similar[0] if similar else None)
            hint = f"did you mean: pdserve {meant}?" if meant else "see pdserve --help"
            ctx.fail(f"no such command: {name}; {hint}")
        return super().resolve_command(ctx, args)


SERVING, ASKING, OPERATING, MEASURING = (
    "Serve a model",
    "Ask it",
    "Operate a cluster",
    "Measure and understand",
)

app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve large language models with prefill and decode on separate devices.",
)


class Output(StrEnum):
    """The output formats of `status` and `requests`."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"


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
            help="Use TLS, and trust these authorities: a PEM file, or: public.",
        ),
    ] = None,
    cert: Annotated[
        str | None, typer.Option(envvar="PDSERVE_TLS_CERT", help="The client's certificate (PEM).")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="PDSERVE_TLS_KEY", help="The certificate's private key (PEM).")
    ] = None,
) -> None:
    """Holds the options of all commands."""
    from .trust import Trust, use

    use(Trust(tls_ca, cert, key))


@app.command(cls=PlainCommand, rich_help_panel=SERVING)
def serve(
    model: Annotated[
        str, typer.Argument(help="A checkpoint directory, a GGUF file, embedded, or smollm2.")
    ] = "embedded",
    prefill: Annotated[int, typer.Option(min=0, metavar="N", help="Number of prefill instances.")] = 1,
    decode: Annotated[int, typer.Option(min=0, metavar="N", help="Number of decode instances.")] = 1,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, metavar="P", help="HTTP port on loopback, by default 8000."),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(metavar="N", help="Processes that share an instance's computation: 1, 2, 4 or 8.")
    ] = 1,
    sets: Sets = None,
) -> None:
    """Serve MODEL without a file, until Ctrl-C or `pdserve down`."""
    from .serve import serve

    serve(model, {"prefill": prefill, "decode": decode}, tensor_parallel, port, sets or [])


@app.command(cls=PlainCommand, rich_help_panel=SERVING)
def up(file: File = None, sets: Sets = None) -> None:
    """Start the cluster that a file describes, and serve until Ctrl-C or `pdserve down`.

    It runs on this machine, or in the Ray cluster that it belongs to."""
    from .plan import located, read_config, read_source
    from .supervise import report_end
    from .up import up

    config = read_config(file, sets or [])
    with located(read_source(file, sets or [])):
        up(config)
    report_end()


@app.command(cls=PlainCommand, rich_help_panel=OPERATING)
def supervise(
    file: Annotated[Path, typer.Argument(help="The file, as Ray puts it on the head.")],
    ray_start: Annotated[list[str], typer.Argument(help="The command that starts Ray, behind `--`.")],
    at_reboot: Annotated[bool, typer.Option("--at-reboot", hidden=True)] = False,
) -> None:
    """For `ray up`: keep Ray and `pdserve up` running on the head.

    Both are started again after a crash or a reboot; where they run already, FILE is applied."""
    from .supervise import supervise

    supervise(file, ray_start, at_reboot)


app.command(cls=PlainCommand, rich_help_panel=ASKING)(generate)
app.command(cls=PlainCommand, rich_help_panel=ASKING)(chat)


@app.command(cls=PlainCommand, rich_help_panel=OPERATING)
def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show the state as it changes, until interrupted.")
    ] = False,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.TABLE,
    address: Address = NO_ADDRESS,
) -> None:
    """Show the cluster and its workers."""
    from .admin import show_status
    from .client import connect_to_administer

    with connect_to_administer(address) as client:
        show_status(client, watch, output.value)


@app.command(cls=PlainCommand, rich_help_panel=MEASURING)
def explain(
    request_id: Annotated[
        str | None, typer.Argument(help="The id of a request that is being served, or that ended recently.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last request of `pdserve generate`.")] = False,
    address: Address = NO_ADDRESS,
) -> None:
    """Show where a request's time went, and why it was placed there."""
    from .client import connect_to_administer
    from .explain import explain
    from .last_request import read

    if (request_id is None) == (not last):
        raise typer.BadParameter("name a request (`pdserve requests` lists them), or give --last")
    with connect_to_administer(address) as client:
        explain(client, request_id or read())


@app.command(cls=PlainCommand, rich_help_panel=MEASURING)
def requests(
    number: Annotated[
        int, typer.Option("-n", "--number", min=1, max=200, metavar="N", help="How many at most.")
    ] = 20,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print.")] = Output.TABLE,
    address: Address = NO_ADDRESS,
) -> None:
    """List the requests that are being served, and those that ended last."""
    from .client import connect_to_administer
    from .requests import show_requests

    with connect_to_administer(address) as client:
        show_requests(client, number, output.value)


@app.command(cls=PlainCommand, rich_help_panel=OPERATING)
def logs(
    processes: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORKER", help="Only these workers, or: up, keeper, head."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print further lines too, until the cluster ends.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of the cluster; by default your latest.")
    ] = None,
) -> None:
    """Print the logs of your running or last cluster on this machine."""
    from .address import checked
    from .logs import show_logs

    show_logs(None if address is None else checked(address), processes or [], follow)


@app.command(cls=PlainCommand, rich_help_panel=OPERATING)
def apply(
    file: Annotated[Path, typer.Argument(help="The file that the cluster is to match.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would change.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when all instances are ready.")] = False,
    address: Address = NO_ADDRESS,
) -> None:
    """Make the running cluster match a file; no request fails.

    Instances are added, or drained and removed."""
    from .admin import apply
    from .client import connect_to_administer

    with connect_to_administer(address) as client:
        apply(client, file, dry_run, wait)


@app.command(cls=PlainCommand, rich_help_panel=OPERATING)
def scale(
    changes: Annotated[
        list[str], typer.Argument(metavar="POOL=N", help="Such as prefill=3, or decode=+1 for one more.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would change.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when all instances are ready.")] = False,
    address: Address = NO_ADDRESS,
) -> None:
    """Change the prefill:decode ratio of the running cluster; no request fails.

    The next `apply` of a file replaces it."""
    from .admin import scale
    from .client import connect_to_administer

    with connect_to_administer(address) as client:
        scale(client, changes, dry_run, wait)


@app.command(cls=PlainCommand, rich_help_panel=OPERATING)
def planner(
    output: Annotated[
        PlannerOutput, typer.Option("--output", "-o", help="How to print.")
    ] = PlannerOutput.TEXT,
    address: Address = NO_ADDRESS,
) -> None:
    """Show what the planner saw, considered, predicted and did.

    `planner.mode` of the configuration turns it on."""
    from .client import connect_to_administer
    from .planner import show_planner

    with connect_to_administer(address) as client:
        show_planner(client, output.value)


@app.command(cls=PlainCommand, rich_help_panel=OPERATING)
def drain(
    workers: Annotated[
        list[str] | None, typer.Argument(metavar="WORKER", help="Names of workers, as `status` shows them.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All workers.")] = False,
    address: Address = NO_ADDRESS,
) -> None:
    """Take workers out of service, and wait until they are idle."""
    from .admin import drain
    from .client import connect_to_administer

    if bool(workers) == all_:
        raise typer.BadParameter("name workers, or give --all")
    with connect_to_administer(address) as client:
        drain(client, workers or [])


@app.command(cls=PlainCommand, rich_help_panel=OPERATING)
def down(address: Address = NO_ADDRESS) -> None:
    """Drain all workers and end the cluster."""
    from .admin import shut_down
    from .client import connect_to_administer

    with connect_to_administer(address) as client:
        shut_down(client)
    print("stopped")


@app.command(cls=PlainCommand, rich_help_panel=SERVING)
def validate(file: File = None, sets: Sets = None) -> None:
    """Check a cluster.yaml and the model it names."""
    from .plan import validate

    validate(file, sets or [])


@app.command(cls=PlainCommand, rich_help_panel=MEASURING)
def simulate(
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Run this seed alone and print its timeline.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Number of seeds to run.")] = 100,
    first_seed: Annotated[int, typer.Option(min=0, metavar="N", help="The first seed.")] = 0,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of processes; by default one per core.")
    ] = None,
    pools: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Workers in each pool; by default 1 to 8, by seed.")
    ] = None,
) -> None:
    """Run the cluster's own decisions in virtual time, with faults everywhere.

    Exits with 1 if a promise was broken."""
    from .simulate import show_range, show_seed

    num_broken = show_range(first_seed, seeds, processes, pools) if seed is None else show_seed(seed, pools)
    if num_broken:
        raise typer.Exit(1)


@app.command(cls=PlainCommand, rich_help_panel=SERVING)
def demo() -> None:
    """Serve the embedded model through one prefill and one decode worker and ask it something."""
    from .demo import demo

    demo()


app.add_typer(key_app, name="key", rich_help_panel=OPERATING)
app.command(cls=PlainCommand, rich_help_panel=SERVING)(plan)
app.command(cls=PlainCommand, rich_help_panel=MEASURING)(bench)
