"""`secateur methods`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.guard import out, say
from secateur.cli.options import CacheDir, Json, Revision
from secateur.signatures import RECOMMENDED

if TYPE_CHECKING:
    from secateur.forecast import Forwards
    from secateur.methods import Method


def show_methods(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Say what each would take on this model.", show_default=False)
    ] = None,
    sparsity: Annotated[float, typer.Option(help="Share of parameters to remove, of MODEL.")] = 0.25,
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
        print(json.dumps({name: _facts(method, costs.get(name)) for name, method in known.items()}))
        return
    for name, method in known.items():
        mark = "  (recommended)" if name == RECOMMENDED else ""
        out.print(f"[bold]{name}[/]{mark}  {method.summary}", highlight=False)
        say(f"  {method.paper}  removes {method.unit}")
        say(f"  calibration: {method.samples} windows of {method.length} tokens")
        if method.needs:
            say(f"  runs {method.needs}")
        if costs:
            say(f"  at {sparsity:.4g} of {model}: {_cost(costs[name])}")
        for option in method.options.values():
            say(f"  --{option.name.replace('_', '-')} ({option.default_in_words}): {option.help}")


def _facts(method: Method, cost: Forwards | str | None) -> dict[str, Any]:
    facts = {
        "recommended": method.name == RECOMMENDED, "summary": method.summary, "paper": method.paper,
        "unit": method.unit, "needs": method.needs,
        "calibration": {"samples": method.samples, "length": method.length},
        "options": {o.name: {"default": o.default, "help": o.help} for o in method.options.values()},
    }  # fmt: skip
    if cost is not None:
        facts["cost"] = {"refused": cost} if isinstance(cost, str) else asdict(cost)
    return facts


def _cost(cost: Forwards | str) -> str:
    if isinstance(cost, str):
        return f"refused: {cost}"
    return (
        f"{cost.forwards:,.1f} full-length forwards (of {cost.forwards_asked:,.1f} asked for) of {cost.length} tokens"
    )
