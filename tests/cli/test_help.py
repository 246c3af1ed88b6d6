"""Help texts fit a terminal of 80 columns, and say what a flag and an argument are."""

import re

import pytest
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

from pdserve.cli.main import app

COMMANDS = sorted(typer.main.get_group(app).commands)
NAMES = {
    "serve": "[MODEL]",
    "up": "[FILE]",
    "generate": "{PROMPT}",
    "explain": "[REQUEST_ID]",
    "logs": "[WORKER]...",
    "apply": "{FILE}",
    "scale": "{POOL=N}...",
    "drain": "[WORKER]...",
    "bench": "[TARGETS]...",
}
PANELS = {
    "generate": ["Arguments", "Options", "Prompt", "Sampling", "Length and end", "Output"],
    "bench": ["Arguments", "Options", "Load", "Prompts and outputs", "Measurement", "Sampling", "Output"],
}


def help_of(*command: str) -> str:
    environment = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, [*command, "--help"], env=environment)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", [[], ["key", "new"], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_fits_80_columns_and_gives_no_flag_a_value(command: list[str]) -> None:
    shown = help_of(*command)
    assert max(map(cell_len, shown.splitlines())) <= 80
    assert not re.search(r"<bool>|range>|\d{6}", shown)


@pytest.mark.parametrize("command", NAMES)
def test_an_argument_has_the_name_that_texts_call_it_by(command: str) -> None:
    assert f"pdserve {command} [OPTIONS] {NAMES[command]}" in help_of(command).replace("root", "pdserve")


@pytest.mark.parametrize("command", PANELS)
def test_many_options_are_grouped(command: str) -> None:
    assert re.findall(r"^╭─ (.*?) ─", help_of(command), re.MULTILINE) == PANELS[command]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_seed_that_is_too_large_is_refused_with_its_bounds(command: str) -> None:
    arguments = [command, *(["x"] if command == "generate" else []), "--seed", str(2**64)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert f"got {2**64}, expected 0 to 2^64 - 1" in result.output
