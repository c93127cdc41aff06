"""BlockPruner: Fine-grained Pruning for Large Language Models (arXiv 2406.10594)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from secateur.engine.sweep import Part, sweeper_of
from secateur.engine.tokens import Tokens
from secateur.errors import InfeasibleBudgetError
from secateur.methods.registry import method
from secateur.model.budget import Budget, inside, takes
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.criterion import Criterion, dense_metric
from secateur.solvers.greedy import Screen, best_removal
from secateur.surgery.apply import predict
from secateur.surgery.edits import DropAttention, DropMLP, Edit

_WINDOW = 2048  # tokens that 2SSP's repository searches on

Choose = Callable[[list[Part]], Part]  # of the candidates, the one to remove


def units(layout: Layout) -> dict[Part, int]:
    """The paper's minimal residual blocks, MHA and MLP, with the parameters that would go with each, norms included."""
    sizes = {}
    for number, block in layout.blocks.items():
        if block.attention:
            sizes[Part(number, "attention")] = block.parameters - block.without_attention().parameters
        if block.mlp:
            sizes[Part(number, "mlp")] = block.parameters - block.without_mlp().parameters
    return sizes


def removals(layout: Layout, budget: Budget, *, alternate: bool, choose: Choose) -> Iterator[Part]:
    """The units in the order of their removal, until the budget is met.

    Args:
        alternate: False: the paper's: each time one of all remaining units. The end is where the removed parameters are
            nearest to the target, ties up: the first unit that would take them further away stays. True: the 2SSP
            repository's: an attention, then an MLP, and so on; a pair is begun if at least half of one of average size
            is still wanted, which for blocks of one size makes as many pairs as the nearest number of whole blocks.
        choose: called for every removal in turn, with the candidates in order of their blocks.

    Raises:
        InfeasibleBudgetError: nothing would be removed, or everything.
    """
    target, left = budget.target(layout), layout
    _check_reach(layout, budget, alternate)
    turns: list[tuple[str, ...]] = [("attention",), ("mlp",)] if alternate else [("attention", "mlp")]
    while units(left) and takes(target, layout.parameters - left.parameters, _round_size(units(left), alternate)):
        for kinds in turns:
            sizes = {unit: size for unit, size in units(left).items() if unit.kind in kinds}
            if not sizes:
                continue
            unit = choose(list(sizes))
            if not alternate and not takes(target, layout.parameters - left.parameters, sizes[unit]):
                return
            yield unit
            left = predict(left, _edit(unit))


def _round_size(sizes: dict[Part, int], alternate: bool) -> float:
    """The parameters of an average pair; of the smallest unit where any may be next."""
    if not alternate:
        return min(sizes.values())
    by_kind = [[size for unit, size in sizes.items() if unit.kind == kind] for kind in ("attention", "mlp")]
    return sum(sum(each) / len(each) for each in by_kind if each)


def _check_reach(layout: Layout, budget: Budget, alternate: bool) -> None:
    """Refuse a target that may end with nothing removed or nothing left, whichever units go."""
    sizes = units(layout)
    largest = max(sizes.values(), default=0)
    if alternate:
        largest = sum(max((s for u, s in sizes.items() if u.kind == kind), default=0) for kind in ("attention", "mlp"))
    total, target = sum(sizes.values()), budget.target(layout)
    if not largest / 2 <= target < total - largest / 2:
        scale = budget.sparsity / target if target else 0.0  # a parameter, in the budget's convention
        raise InfeasibleBudgetError(
            f"{budget.sparsity:.4g} of the parameters of the {budget.of} would be none or all of the {len(sizes)} "
            f"attention modules and MLPs; {inside(largest / 2 * scale, (total - largest / 2) * scale)} can be reached"
        )


def _edit(unit: Part) -> Edit:
    return DropAttention(unit.block) if unit.kind == "attention" else DropMLP(unit.block)


@method(
    "blockpruner",
    paper="https://arxiv.org/abs/2406.10594",
    unit="attention modules and MLPs",
    samples=1,
    length=_WINDOW,
    bibtex="zhong2025blockpruner",
    edits=(DropAttention, DropMLP),
    needs="rounds, until the budget is met, of one forward per module there is: 2L at first",
    shared="blockpruner/",
)
def blockpruner(
    model: Model,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    alternate: bool = False,
    screen: int | None = None,
    criterion: Criterion = "ppl",
    search_samples: int = 1,
    search_length: int | None = None,
) -> Iterator[Edit]:
    """Whole attention modules and MLPs, each time the one whose absence hurts the calibration's loss least.

    The paper searches on 256 samples of Alpaca; the default is the 2SSP repository's single window, and `--samples 256
    --search-samples 256` are the paper's number. A search on less than that window says so in its record.

    Args:
        alternate: in turns an attention module and an MLP, as the 2SSP repository does; the paper takes whichever is
            cheapest.
        screen: after the first round try only this many candidates per round, those of the lowest estimated losses; all
            if not given (the paper's).
        criterion: what a removal minimises, ppl (the paper's) or kl to the dense model.
        search_samples: calibration windows that the loss is taken on.
        search_length: tokens of each of these; their whole length if not given.
    """
    layout, search = model.layout(), tokens.first(search_samples, search_length)
    _check_reach(layout, budget, alternate)
    if (there := search.samples * search.length) < _WINDOW:
        run.note("reduced", f"A reduced BlockPruner search: it judges on {there:,} tokens (in full {_WINDOW:,}).")
    sweeper, screened = sweeper_of(model, run), None if screen is None else Screen(screen)
    metric = dense_metric(sweeper, search, criterion)
    place = 0

    def cheapest(candidates: list[Part]) -> Part:
        nonlocal place
        key = f"blockpruner/{place}"
        unit, loss = best_removal(sweeper, search, candidates, metric=metric, key=key, screen=screened)
        place += 1
        run.log("blockpruner: without the %s of block %d: %s %.6f nats", unit.kind, unit.block, criterion, loss)
        return unit

    for unit in removals(layout, budget, alternate=alternate, choose=cheapest):
        yield _edit(unit)
