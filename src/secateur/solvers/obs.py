"""Optimal brain surgery on the columns of a linear map: which inputs can go, and how the others make up for them.

For a map W (rows, columns) with inputs x the loss is the squared error of its outputs, E |W x - W' x|^2, whose Hessian
is H = 2 E[x x^T]. Columns go in groups: all columns of an attention head at once, or single FFN neurons. Equations and
Algorithm 1 are those of SlimGPT (arXiv 2412.18110).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.engine.moments import matmul_precision
from secateur.errors import NumericalError

GroupError = Literal["grouped", "ordinary", "exact"]

_DRIFT = 1e-3  # of a down-dated H^-1, see `_drift`; float32 has about 1e-4 on a real model's Hessians, damped by 0.01
_DAMPING_STEPS = 8  # each ten times the one before
_LEAST_DAMPING = 1e-8  # where none was asked and the Hessian turns out singular

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What is left of a map.

    Attributes:
        index: kept groups, ascending, (kept,).
        order: all groups, in the order in which they go, those that stay behind them, (groups,).
        weight: the map on the kept columns, compensated, (rows, kept * size).
        error: the loss that the removals cost by the quadratic model, E |W x - W' x|^2 summed over rows, H damped; 0
            where nothing went. Without compensation it is that of the plain removal.
    """

    index: Tensor
    order: Tensor
    weight: Tensor
    error: float


@matmul_precision()
@torch.no_grad()
def prune_groups(
    weight: Tensor,
    hessian: Tensor,
    size: int,
    schedule: Iterable[int],
    *,
    error: GroupError = "grouped",
    damping: float = 0.01,
    shrinkage: float = 0.0,
    compensate: bool = True,
    factors: Tensor | None = None,
    name: str = "a map",
) -> Kept:
    """Remove groups of `size` columns, as many at a time as `schedule` says, each time those whose loss costs least.

    After each time the remaining columns make up for what went (equation 4, for a whole set of columns), and H^-1 is
    down-dated to that of the remaining ones (equation 3, for the set); where rounding has spoiled it (`_DRIFT`) it is
    factored anew.

    Args:
        weight: (rows, groups * size).
        hessian: (groups * size, groups * size); damped in place.
        schedule: numbers of groups, one per iteration; [1, 1, ...] is Algorithm 1.
        error: how a group is judged, see `group_errors`; all the same for single columns.
        damping: share of the Hessian's mean diagonal, shrinkage included, added to its diagonal; ten times more where
            it is singular. An input that is always 0 counts as 1 in that mean, as in SlimGPT's code.
        shrinkage: share of each diagonal element added to it before, which shrinks what inputs have in common: of few
            tokens, chance makes up much of that.
        compensate: off is an ablation: what is kept stays as it was.
        factors: (groups,), by which the groups' losses are multiplied before the least of them go.
        name: for messages.

    Raises:
        NumericalError: NaN or Inf in the statistics, or a Hessian that no damping makes positive definite.
    """
    if hessian.is_meta:  # of a rehearsal
        groups = len(hessian) // size - sum(schedule)
        return Kept(
            torch.arange(groups), torch.arange(len(hessian) // size), hessian.new_empty(len(weight), groups * size), 0.0
        )
    if not torch.isfinite(hessian).all():
        raise NumericalError(f"{name}: the inputs have NaN or Inf; use another dtype")
    w, h = weight.to(hessian.dtype).to(hessian.device).clone(), hessian
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1  # an input that is always 0: any weight will do, so take none
    w[:, dead] = 0
    h.diagonal().mul_(1 + shrinkage)
    mean = float(h.diagonal().mean())
    h.diagonal().add_(damping * mean)
    alive, original = torch.arange(w.shape[1] // size, device=h.device), w
    columns, went = columns_of(alive, size), []
    factors = None if factors is None else factors.to(w)
    inverse, cost = None, w.new_zeros(())
    for count in schedule:
        if inverse is None or not _drift(inverse, h, columns) < _DRIFT:
            left, inverse = h if inverse is None else _block(h, columns), None  # the old one is not held beside the new
            inverse, extra = damped(left, damping, name, _inverse, mean)
            if left is not h:
                h.diagonal().add_(extra)
            del left
        errors = group_errors(w, inverse, size, error, name)
        order = torch.sort(errors if factors is None else errors * factors[alive], stable=True).indices
        gone, stay = order[:count], order[count:].sort().values
        p, r = columns_of(gone, size), columns_of(stay, size)
        factor = _lower(_block(inverse, p), name)  # L with L L^T = [H^-1]_PP
        across = torch.linalg.solve_triangular(factor, inverse[p[:, None], r], upper=False)  # L^-1 H^-1_PR
        if compensate:  # W_R - W_P [H^-1_PP]^-1 H^-1_PR, which costs tr(W_P [H^-1_PP]^-1 W_P^T) / 2
            solved = torch.linalg.solve_triangular(factor, w[:, p].T, upper=False)  # L^-1 W_P^T
            cost += solved.square().sum() / 2
            w = w[:, r].addmm_(solved.T, across, alpha=-1)
        else:
            w = w[:, r]
        inverse = _block(inverse, r).addmm_(across.T, across, alpha=-1)
        went.append(alive[gone])
        alive, columns = alive[stay], columns[r]
    if not compensate:  # what is lost is W_P x
        lost = torch.ones(original.shape[1], dtype=torch.bool, device=h.device)
        lost[columns] = False
        cost = ((original[:, lost] @ h[lost][:, lost]) * original[:, lost]).sum() / 2
    if not torch.isfinite(w).all():
        raise NumericalError(f"{name}: the compensated weight has NaN or Inf; give more damping or other data")
    return Kept(alive.cpu(), torch.cat([*went, alive]).cpu(), w.cpu(), float(cost))


def prune_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """What `prune_groups` holds at its peak: the second moment that the Hessian was made from, the Hessian, and what is
    left of it with its factor, or the inverse before and after a down-date; and four of the weight."""
    return dtype.itemsize * (4 * columns**2 + 4 * rows * columns)


def group_errors(
    weight: Tensor, inverse: Tensor, size: int, error: GroupError = "grouped", name: str = "a map"
) -> Tensor:
    """What the loss of each group costs: weight (rows, groups * size), H^-1 of all its columns -> (groups,).

    - "ordinary": equation 4 for each column on its own, sum over rows of W^2 / [H^-1]_jj, added up over the group;
    - "grouped": with the pivots that elimination column by column inside the group meets, which are the squared
      diagonal of the Cholesky factor of the group's block of H^-1 (equation 5): they know how H^-1 changes inside the
      group, but not how W does. SlimGPT's;
    - "exact": both: tr(W_g [H^-1_gg]^-1 W_g^T), by one batched triangular solve.

    Raises:
        NumericalError: a group's block of H^-1 is not positive definite.
    """
    groups = weight.shape[1] // size
    by_group = weight.T.reshape(groups, size, -1)  # (groups, size, rows)
    if error == "ordinary" or size == 1:
        return (by_group.square().sum(dim=2) / inverse.diagonal().reshape(groups, size)).sum(dim=1)
    places = torch.arange(weight.shape[1], device=inverse.device).reshape(groups, size)
    factor = _lower(inverse[places[:, :, None], places[:, None, :]], name)  # (groups, size, size)
    if error == "grouped":
        return (by_group.square().sum(dim=2) / factor.diagonal(dim1=1, dim2=2).square()).sum(dim=1)
    return torch.linalg.solve_triangular(factor, by_group, upper=False).square().sum(dim=(1, 2))


@matmul_precision()
def damped_inverse(hessian: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """(H + lambda I)^-1 and lambda, of which `damping` is the share of H's mean diagonal, or more where H is singular.

    Raises:
        NumericalError: as `prune_groups`.
    """
    if not torch.isfinite(hessian).all():
        raise NumericalError(f"{name}: the inputs have NaN or Inf; use another dtype")
    return damped(hessian.clone(), damping, name, _inverse)


def damped(
    matrix: Tensor, damping: float, name: str, attempt: Callable[[Tensor], Tensor | None], mean: float | None = None
) -> tuple[Tensor, float]:
    """What a matrix comes to, and what was added to its diagonal, in place: the damping, or more, until it comes to
    anything.

    Args:
        damping: a share of the mean diagonal; one that has been added already where `mean` is given.
        attempt: None where the matrix is no good.
        mean: of the diagonal, before any damping.

    Raises:
        NumericalError: no damping does.
    """
    first = damping if mean is None else 0.0
    mean = mean or float(matrix.diagonal().mean()) or 1.0  # inputs that are all 0: any damping will do
    more, step, added = first * mean, max(damping, _LEAST_DAMPING / 10) * mean, 0.0
    for _ in range(_DAMPING_STEPS):
        matrix.diagonal().add_(more)
        added += more
        if (result := attempt(matrix)) is not None:
            return result, added
        more = step = step * 10
        logger.warning("%s: the Hessian is singular; its diagonal gets %.1e of its mean more", name, step / mean)
    raise NumericalError(f"{name}: no damping makes the Hessian positive definite; the calibration data is unfit")


def cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor; None of a matrix that is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if failed or not bool((factor.diagonal() > 0).all()) else factor


def _lower(matrices: Tensor, name: str) -> Tensor:
    """Cholesky factors, lower, of blocks of an inverse Hessian, (..., n, n)."""
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if failed.any():
        raise NumericalError(f"{name}: the inverse Hessian has lost its definiteness to rounding; give more damping")
    return factors


def _inverse(hessian: Tensor) -> Tensor | None:
    """H^-1 by Cholesky; None where it is not positive definite, or nearly so."""
    if (factor := cholesky(hessian)) is None:
        return None
    inverse = torch.cholesky_inverse(factor, out=factor)  # in its place: both are large
    diagonal = inverse.diagonal()  # sums of squares of L^-1: where these are finite all is
    return inverse if torch.isfinite(diagonal).all() and bool((diagonal > 0).all()) else None


def _drift(inverse: Tensor, hessian: Tensor, columns: Tensor) -> float:
    """How far an inverse (columns, columns) is from that of a Hessian's columns: |H^-1 H z - z| / |z| for z of +-1.

    Infinite where its diagonal is no longer positive.
    """
    z = hessian.new_zeros(len(hessian))
    z[columns[::2]], z[columns[1::2]] = 1, -1
    z, product = z[columns], (hessian @ z)[columns]
    positive = bool((inverse.diagonal() > 0).all())
    return float((inverse @ product - z).norm() / z.norm()) if positive else math.inf


def _block(matrix: Tensor, index: Tensor) -> Tensor:
    """These rows and columns of a square matrix, a copy."""
    return matrix[index[:, None], index]


def columns_of(groups: Tensor, size: int) -> Tensor:
    """The columns of groups that have `size` each: (groups,) -> (groups * size,)."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def group_sizes(total: int, size: Literal["released", "paper"] | int) -> list[int]:
    """How many neurons go in each iteration, `total` in all (section 3.3, Dynamic Group Size).

    - "released": the schedule of the authors' code: (total - 512) / 2, then by the same rule from the last one, never
      fewer than 64 nor more than 1,024;
    - "paper": the paper says only that it starts large (e.g. 1,024) and shrinks (e.g. to 8): a quarter of what is left
      to remove, between 8 and 1,024;
    - a number: always that many (the paper's ablation has 128).
    """
    sizes: list[int] = []
    step = (total - 512) // 2
    while left := total - sum(sizes):
        if size == "released":
            count, step = min(max(step, 64), 1024), (step - 512) // 2
        elif size == "paper":
            count = min(max(left // 4, 8), 1024)
        else:
            count = size
        sizes.append(min(count, left))
    return sizes
