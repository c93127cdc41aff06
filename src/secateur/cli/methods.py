"""`secateur methods`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.guard import out
from secateur.cli.options import CacheDir, Json, Revision

if TYPE_CHECKING:
    from secateur.forecast import Forwards


def show_methods(
    model: Annotated[
        str | None, typer.Option("--for", metavar="MODEL", help="Say what each would take on this model.")
    ] = None,
    sparsity: Annotated[float, typer.Option(help="Share of parameters to remove, for --for.")] = 0.25,
    of: Annotated[str, typer.Option(help="A share of the `blocks`' parameters or of the whole `model`'s.")] = "blocks",
    revision: Revision = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print how to cite them.")] = False,
) -> None:
    """List the methods with their papers, their options, and what they cost."""
    from secateur.forecast import forwards_by_method
    from secateur.methods import methods
    from secateur.model.load import Source

    known = methods()
    if bibtex:
        print("\n\n".join(method.bibtex for method in known.values()))
        return
    costs: dict[str, Forwards | str] = {}
    if model is not None:
        costs = forwards_by_method(Source(name=model, revision=revision, cache=cache_dir), sparsity, of)
    if as_json:
        print(
            json.dumps(
                {
                    name: {
                        "summary": method.summary,
                        "paper": method.paper,
                        "unit": method.unit,
                        "needs": method.needs,
                        "calibration": {"samples": method.samples, "length": method.length},
                        "options": {o.name: {"default": o.default, "help": o.help} for o in method.options.values()},
                    }
                    | ({"cost": _cost_as_json(costs[name])} if costs else {})
                    for name, method in known.items()
                }
            )
        )
        return
    for name, method in known.items():
        out.print(f"[bold]{name}[/]  {method.summary}", highlight=False)
        out.print(f"  {method.paper}  removes {method.unit}", highlight=False)
        out.print(f"  calibration: {method.samples} windows of {method.length} tokens", highlight=False)
        if method.needs:
            out.print(f"  runs {method.needs}", highlight=False, markup=False)
        if costs:
            out.print(f"  at {sparsity:.4g} of {model}: {_cost(costs[name])}", highlight=False, markup=False)
        for option in method.options.values():
            flag = "--" + option.name.replace("_", "-")
            out.print(f"  {flag} ({option.default_in_words}): {option.help}", highlight=False, markup=False)


def _cost_as_json(cost: Forwards | str) -> dict[str, Any]:
    return {"refused": cost} if isinstance(cost, str) else asdict(cost)


def _cost(cost: Forwards | str) -> str:
    if isinstance(cost, str):
        return f"refused: {cost}"
    return (
        f"{cost.forwards:,.1f} full-length forwards (of {cost.forwards_asked:,.1f} asked for) of {cost.length} tokens"
    )
