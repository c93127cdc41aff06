"""`secateur report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.guard import out
from secateur.report.looks import percent
from secateur.report.page import PAGE, write_report


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `secateur compare` made.")],
) -> None:
    """Make the page (report.html) and the plots (plots/) of a comparison, anew where they are there already.

    Needs no model, only the folder: after a change of secateur, or while the comparison still runs.
    """
    said = write_report(folder)
    for line in (said.headline, said.cost, "", *(f"{percent(each.sparsity)}: {each.text}" for each in said.sizes)):
        out.print(line, markup=False, highlight=False)
    for caveat in said.caveats:
        out.print(f"- {caveat}", markup=False, highlight=False)
    out.print(f"\n{folder / PAGE}", markup=False, highlight=False)
