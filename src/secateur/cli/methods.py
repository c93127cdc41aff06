"""`secateur methods`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from secateur.cli.guard import out
from secateur.cli.options import Json
from secateur.methods import methods


def show_methods(
    as_json: Json = False,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print how to cite them.")] = False,
) -> None:
    """List the methods with their papers and options."""
    known = methods()
    if bibtex:
        print("\n\n".join(method.bibtex for method in known.values()))
        return
    if as_json:
        print(
            json.dumps(
                {
                    name: {
                        "summary": method.summary,
                        "paper": method.paper,
                        "unit": method.unit,
                        "calibration": {"samples": method.samples, "length": method.length},
                        "options": {o.name: {"default": o.default, "help": o.help} for o in method.options.values()},
                    }
                    for name, method in known.items()
                }
            )
        )
        return
    for name, method in known.items():
        out.print(f"[bold]{name}[/]  {method.summary}", highlight=False)
        out.print(f"  {method.paper}  removes {method.unit}", highlight=False)
        out.print(f"  calibration of its paper: {method.samples} windows of {method.length} tokens", highlight=False)
        for option in method.options.values():
            flag = "--" + option.name.replace("_", "-")
            out.print(f"  {flag} ({option.default}): {option.help}", highlight=False, markup=False)
