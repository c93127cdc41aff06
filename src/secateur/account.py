"""Asked, got, why: how far a pruning came from its budget, and which of its units are to blame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from secateur.methods import Method, Options
from secateur.model.budget import Budget, shares
from secateur.model.layout import BlockLayout, Layout
from secateur.record import Shares, Sparsity
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, Edit, KeepHeads, KeepNeurons, Rebase

# What an edit removes, and the parameters of one of a block's.
_UNITS: Mapping[type[Edit], tuple[str, Callable[[BlockLayout], int]]] = {
    DropBlock: ("whole blocks", lambda block: block.parameters),
    DropAttention: ("attention modules", lambda block: block.parameters - block.without_attention().parameters),
    DropMLP: ("MLPs", lambda block: block.parameters - block.without_mlp().parameters),
    KeepHeads: ("KV heads with their query heads", lambda block: block.kv_group),
    KeepNeurons: ("FFN neurons", lambda block: block.neuron),
}


def account(
    method: Method, options: Options, budget: Budget, edits: Iterable[Edit], before: Layout, after: Layout
) -> Sparsity:
    """What was asked and what came of it, with the reason where the two differ as they are printed.

    Args:
        options: all of the method's.
        edits: those that were made.
    """
    sparsity = Sparsity(
        asked=budget.sparsity, of=budget.of, round_to=budget.round_to, achieved=Shares(**shares(before, after))
    )
    if f"{sparsity.asked:.2%}" != f"{sparsity.got:.2%}":
        sparsity.reason = _reason(method, options, budget, {type(edit) for edit in edits}, before, after)
    return sparsity


def _reason(
    method: Method, options: Options, budget: Budget, kinds: set[type[Edit]], before: Layout, after: Layout
) -> str:
    deciding = [f"{name} {options[name]}" for name in method.amount.decides if options[name] is not None]
    if deciding and len(deciding) == len(method.amount.decides):
        return f"{' and '.join(deciding)} decided, not the sparsity"
    one = budget.sparsity / budget.target(before)  # a parameter, in the budget's convention
    equal = method.amount.equal
    alike = method.amount.uniform or (equal is not None and options.get(equal[0]) == equal[1])
    units = []
    for kind, (name, size) in _UNITS.items():
        sizes = [parameters for block in before.blocks.values() if (parameters := size(block))]
        if kind in kinds and sizes:
            many = budget.round_to if kind is KeepNeurons else 1
            units.append(_unit(name, many, sizes, one, uniform=alike and kind is KeepNeurons))
    if Rebase in kinds:
        sites = [site for site in before.sites if site in after.sites]  # those of a dropped block are gone
        narrowed = [gone for site in sites if (gone := before.stream_width(site) - after.stream_width(site))]
        average = (before.parameters - after.parameters) * len(narrowed) / max(1, sum(narrowed))
        many = int(options[method.amount.step]) if method.amount.step else 1
        units.append(_unit("hidden directions", many, [average], one, uniform=True))
    return f"{method.name} removes {' and '.join(units) or method.unit}"


def _unit(name: str, many: int, sizes: Sequence[float], one: float, *, uniform: bool) -> str:
    """A unit and its share of what is counted; a range where blocks differ."""
    steps = [sum(sizes)] if uniform else [min(sizes), max(sizes)]
    low, *high = (f"{step * many * one * 100:.2g}%" for step in steps)
    share = low if not high or high[0] == low else f"{low} to {high[0]}"
    where = "in every block at a time" if uniform else "at a time"
    return f"{name}, {many} {where} ({share})" if uniform or many > 1 else f"{name} ({share} each)"
