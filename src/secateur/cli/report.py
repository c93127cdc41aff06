"""`secateur report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.guard import say


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that `secateur compare` or `secateur ablate` made.")
    ],
) -> None:
    """Make the page (report.html) and the plots (plots/) of a comparison or an ablation, anew where they are there.

    Needs no model, only the folder: after a change of secateur, or while the command still runs.
    """
    from secateur.report.page import PAGE, write_report

    said = write_report(folder)
    for line in said.lines:
        say(line)
    for caveat in said.caveats:
        say(f"- {caveat}")
    say(f"\n{folder / PAGE}")
