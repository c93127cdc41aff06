"""The table from command to function."""

from __future__ import annotations

from collections.abc import Callable

import typer

from secateur.cli import ablate, compare, evaluate, fetch, inspect, methods, prune, recover, report
from secateur.cli.guard import guarded
from secateur.version import __version__

app = typer.Typer(
    name="secateur",
    help="Make large language models smaller by structured pruning.",
    epilog="Exit codes: 0 done, or already there. 1 a bug. 2 wrong usage. 3 refused, with the reason: bad input, an "
    "unreachable sparsity, an unsupported model, missing data. 4 done, but a cell of a grid failed, or a condition of "
    "`eval --fail-if` holds. 130 interrupted; nothing is half-written.",
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


COMMANDS: dict[str, Callable[..., None]] = {
    "prune": prune.command(),
    "recover": recover.recover,
    "eval": evaluate.evaluate,
    "compare": compare.compare,
    "ablate": ablate.ablate,
    "report": report.report,
    "inspect": inspect.inspect,
    "methods": methods.show_methods,
    "fetch": fetch.fetch,
}
for name, function in COMMANDS.items():
    app.command(name)(guarded(function))
