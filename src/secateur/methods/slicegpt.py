"""SliceGPT: Compress Large Language Models by Deleting Rows and Columns (arXiv 2401.15024)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from torch import Tensor

from secateur.engine.stream import Tap
from secateur.engine.tokens import Tokens
from secateur.engine.walk import Visit, walk
from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.methods.registry import Amount, method
from secateur.model.budget import COARSE, Budget, inside
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.pca import basis_bytes, principal_basis
from secateur.surgery.edits import CentreEmbedding, Edit, FoldNorms, Rebase, UntieHead

_TINY = 1e-6  # keeps a state of zeros finite

Signal = Literal["stream", "norm"]


def sites_to_slice(layout: Layout, dimension: int, *, slice_head: bool) -> list[int]:
    """The sites of the residual stream that are wider than `dimension`; the last, before the head, only if asked."""
    return [site for site in _sites(layout, slice_head) if layout.stream_width(site) > dimension]


def _sites(layout: Layout, slice_head: bool) -> list[int]:
    return layout.sites if slice_head else layout.sites[:-1]


def sliced(layout: Layout, dimension: int, *, slice_head: bool, untie: bool) -> Layout:
    """The layout that slicing to `dimension` leads to, skip matrices (section 3.4) and an untied head included."""
    after = layout
    if untie:
        after = after.with_ends(replace(after.ends, tied=False))
    after = after.folded()
    for site in sites_to_slice(layout, dimension, slice_head=slice_head):
        after = after.rebased(site, dimension)
    return after


def sliced_width(
    layout: Layout, budget: Budget, *, dimension: int | None, multiple: int, slice_head: bool, untie: bool
) -> int:
    """The hidden width after slicing: what was asked, else the multiple whose removed share is nearest to the budget's.

    Raises:
        InvalidOptionError: a width that the model does not have.
        InfeasibleBudgetError: no multiple removes as much, or the least that one removes is off by more than a quarter.
    """
    widest = max(layout.stream_width(site) for site in _sites(layout, slice_head))

    def share(width: int) -> float:
        return budget.achieved(layout, sliced(layout, width, slice_head=slice_head, untie=untie))

    if dimension is not None:
        if not 1 <= dimension < widest:
            raise InvalidOptionError(f"dimension must lie between 1 and {widest - 1}, not {dimension}")
        if (gone := share(dimension)) <= 0:
            raise InfeasibleBudgetError(
                f"at a dimension of {dimension} of {widest} the skip matrices weigh more than what is sliced off: the "
                f"{budget.of} would grow by {-gone:.2%}. Ask for a smaller one"
            )
        return dimension
    if not 1 <= multiple < widest:
        raise InvalidOptionError(f"multiple must lie between 1 and {widest - 1}, not {multiple}")

    # The share falls with the width: find the widest multiple that still removes the target, then look at the next.
    low, high = 1, (widest - 1) // multiple
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if share(middle * multiple) >= budget.sparsity else (low, middle - 1)
    near = [width for width in (low * multiple, (low + 1) * multiple) if width < widest]
    best = min(near, key=lambda width: abs(share(width) - budget.sparsity))
    missed = abs(share(best) - budget.sparsity) > COARSE * budget.sparsity
    is_least = len(near) == 1 or share(near[1]) <= 0
    if (missed and is_least) or budget.sparsity > share(multiple):
        reached = [each for i in range(1, (widest - 1) // multiple + 1) if (each := share(i * multiple)) > 0]
        said = f"{inside(min(reached), max(reached))}, in steps" if reached else "nothing"
        raise InfeasibleBudgetError(
            f"slicegpt cannot remove {budget.sparsity:.4g} of the parameters of the {budget.of}; with these options it "
            f"reaches {said} of {multiple} of {widest} hidden directions (skip matrices cost some of what is gained)"
        )
    return best


def unties(layout: Layout, *, untie: bool, mean_centre: bool) -> bool:
    """Whether the head is to get a matrix of its own.

    Raises:
        InvalidOptionError: what this or mean-centring needs is in another basis already.
    """
    untied = layout.ends.tied and (untie or mean_centre)
    if layout.is_rebased and (untied or mean_centre):
        raise InvalidOptionError(
            "the model was sliced before: its head can no longer be untied, nor its embedding centred"
        )
    return untied


def principal(visit: Visit, tap: Tap, dimension: int, *, hidden: int, signal: Signal) -> Tensor:
    """Section 3.3: the eigenvectors Q of C = sum over tokens of x x^T, the first `dimension` of them.

    Args:
        hidden: the stream's original width, by which norms divide.

    Returns:
        (stream, dimension) float32, which the journal keeps; the decomposition is float64.
    """

    def weigh(x: Tensor, weights: Tensor) -> Tensor:
        """What the folded norm makes of x, squared, but for its eps."""
        return weights / (x.double().pow(2).sum(dim=-1) / hidden + _TINY)

    moment = visit.second_moment(tap, weigh=weigh if signal == "norm" else None)
    assert moment.total is not None  # narrows the type; there is at least one window
    basis = principal_basis(moment.total, dimension).float()
    return basis if basis.is_meta else basis.cpu()


@method(
    "slicegpt",
    paper="https://arxiv.org/abs/2401.15024",
    unit="directions of the residual stream",
    needs="(2 - 1/L) S forwards without the LM head",
    samples=256,
    length=2048,
    bibtex="ashkboos2024slicegpt",
    edits=(Rebase, FoldNorms, UntieHead, CentreEmbedding),
    amount=Amount(uniform=True, step="multiple", decides=("dimension",)),
)
def slicegpt(
    model: Model,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    dimension: int | None = None,
    multiple: int = 8,
    slice_head: bool = False,
    untie: bool = False,
    mean_centre: bool = False,
    signal: Signal = "stream",
) -> Iterator[Edit]:
    """Directions of the residual stream: rotated at each site to its principal components, the least ones sliced off.

    Args:
        dimension: hidden width after slicing, the same everywhere; wins over the sparsity, then only noted, if given.
        multiple: without it, the width is the multiple of this that meets the sparsity best.
        slice_head: also slice what enters the final norm (the paper's code does not by default).
        untie: give a tied head a matrix of its own instead of maps before and after the shared one.
        mean_centre: subtract each embedding's mean, and untie, as the paper's code does; changes the model.
        signal: PCA of the residual stream (the paper's code) or of what the norm makes of it (its text).
    """
    layout = model.layout()
    untied = unties(layout, untie=untie, mean_centre=mean_centre)
    width = sliced_width(layout, budget, dimension=dimension, multiple=multiple, slice_head=slice_head, untie=untied)
    sites = sites_to_slice(layout, width, slice_head=slice_head)
    run.log("slicegpt: %d of %d sites are sliced to %d directions", len(sites), len(layout.sites), width)
    if untied:
        yield UntieHead()
    if mean_centre:
        yield CentreEmbedding()
    if not layout.is_folded:
        yield FoldNorms()
    for visit in walk(model, tokens, order="blocks", run=run, label="slicegpt"):
        first = 2 * visit.block.number
        taps: dict[int, Tap] = {first: "block_in", first + 1: "block_mid", layout.sites[-1]: "block_out"}
        if visit.block.number != max(layout.blocks):
            del taps[layout.sites[-1]]
        for site in sorted(taps.keys() & set(sites)):
            look = functools.partial(principal, visit, taps[site], width, hidden=layout.ends.hidden, signal=signal)
            scratch_bytes = basis_bytes(layout.stream_width(site))
            # the next PCA sees this site sliced
            yield Rebase(site, run.step(f"slicegpt/{site}", look, scratch_bytes=scratch_bytes))
