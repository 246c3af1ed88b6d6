"""The classes of all commands: their help shows no value for a flag, and names arguments as its texts do."""

from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption


def _shown(params: list[Any]) -> list[Any]:
    """Returns parameters with the names under which help and mistakes show their values."""
    for param in params:
        if isinstance(param, TyperArgument):
            param.metavar = param.metavar or str(param.name).upper()
        elif isinstance(param, TyperOption) and param.is_flag:
            param.metavar = ""
    return params


class PlainCommand(TyperCommand):
    """A command without commands of its own."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _shown(super().get_params(ctx))


class Group(TyperGroup):
    """A command of which others are parts."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _shown(super().get_params(ctx))
