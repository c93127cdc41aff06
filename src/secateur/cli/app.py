"""The table from command to function. A command's module is imported when the command is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from secateur.cli.guard import guarded
from secateur.version import __version__

# A module of this folder and its function. Modules import torch, and what does, only when their function is called.
COMMANDS = {
    "prune": "prune:prune",
    "recover": "recover:recover",
    "eval": "evaluate:evaluate",
    "compare": "compare:compare",
    "ablate": "ablate:ablate",
    "report": "report:report",
    "inspect": "inspect:inspect",
    "export": "export:export",
    "run": "run:run",
    "plan": "plan:plan",
    "methods": "methods:show_methods",
    "fetch": "fetch:fetch",
    "cache": "cache:cache",
    "doctor": "doctor:doctor",
}


class Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            self.add_command(_click_command(cmd_name, function(cmd_name)), cmd_name)
        return super().get_command(ctx, cmd_name)


def function(name: str) -> Callable[..., None]:
    """The command's function; its signature is its flags."""
    module, _, attribute = COMMANDS[name].partition(":")
    command: Callable[..., None] = getattr(import_module(f"secateur.cli.{module}"), attribute)
    return command


def _click_command(name: str, command: Callable[..., None]) -> Any:
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name)(guarded(command))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="secateur",
    cls=Commands,
    help="Make large language models smaller by structured pruning.",
    epilog="Exit codes: 0 done, or already there. 1 a bug. 2 wrong usage. 3 refused, with the reason: bad input, an "
    "unreachable sparsity, an unsupported model, missing data. 4 done, but a cell of a grid failed, a condition of "
    "`eval --fail-if` holds, or a check of `doctor` failed. 130 interrupted; nothing is half-written.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def version(
    show: bool = typer.Option(False, "--version", is_eager=True, help="Print the version and stop."),
) -> None:
    if show:
        print(__version__)
        raise typer.Exit
