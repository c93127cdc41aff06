"""Ridge regression of a linear map on those of its inputs that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from secateur.engine.moments import matmul_precision
from secateur.errors import InvalidOptionError, NumericalError
from secateur.solvers.obs import cholesky, damped

_LITTLE_DAMPING, _MOST_DAMPING = -4, 3  # powers of ten that are tried
_SHRINKAGE = 3.0  # found on development text, where 1 was too little (docs/notebook.md)
DAMPING = 0.01  # where y is W x, which few tokens tell as well as many

FloatOrAuto = float | Literal["auto"]


@matmul_precision()
@torch.no_grad()
def ridge(
    weight: Tensor,
    moment: Tensor,
    kept: Sequence[int] | Tensor,
    *,
    damping: float = 0.01,
    shrinkage: float = 0.0,
    target: Tensor | None = None,
    share: float = 1.0,
    name: str = "a map",
) -> Tensor:
    """The map W' on the kept inputs x_K that minimises E |y - W' x_K|^2 + |(W' - W_K) R^(1/2)|^2.

    With C = E[x x^T], T = E[y x^T] and R = shrinkage diag(C_KK) + lambda I, that is
    W' = (T_K + W_K R) (C_KK + R)^-1. Where y = W x, T = W C; so if nothing goes, W' is W to the last bit.

    Args:
        weight: W, (rows, columns).
        moment: C, (columns, columns), float32 or float64, which all is computed in; any multiple of it will do if
            `target` is the same multiple of T.
        kept: numbers of the kept columns, (kept,).
        damping: lambda as a share of the mean of C_KK's diagonal, shrinkage included; ten times more where C_KK is
            singular.
        shrinkage: share of each input's second moment added to it, against what chance puts into the moments of few
            tokens.
        target: T, (rows, columns); None: y = W x.
        share: of `target` in y, the rest being W x.
        name: for messages.

    Returns:
        (rows, kept), on the CPU, in the moment's dtype.

    Raises:
        InvalidOptionError: a damping or share out of its range.
        NumericalError: NaN or Inf in the statistics, or a moment that no damping makes positive definite.
    """
    check_ridge(damping, share, shrinkage)
    index = torch.as_tensor(kept, dtype=torch.long)
    if moment.is_meta:  # of a rehearsal
        return moment.new_empty(len(weight), len(index))
    if not all(torch.isfinite(given).all() for given in (moment, target) if given is not None):
        raise NumericalError(f"{name}: the inputs have NaN or Inf; use another dtype")
    index, w = index.to(moment.device), weight.to(moment)
    stays = torch.zeros(w.shape[1], dtype=torch.bool, device=w.device)
    stays[index] = True
    # (W' - W_K) (C_KK + R) = T_K - W_K C_KK, which is W_R C_RK of the columns R that go where T = W C
    missing = w[:, ~stays] @ moment[~stays][:, index]
    if target is not None and share:
        missing = missing + share * (target.to(moment)[:, index] - w @ moment[:, index])
    left = moment[index[:, None], index]
    left.diagonal().mul_(1 + shrinkage)
    factor, _ = damped(left, damping, name, cholesky)
    fitted = w[:, index] + torch.cholesky_solve(missing.T, factor).T
    if not torch.isfinite(fitted).all():
        raise NumericalError(f"{name}: the fitted weight has NaN or Inf; give more damping or other data")
    return fitted.cpu()


@matmul_precision()
@torch.no_grad()
def held_out_damping(
    weight: Tensor, halves: Sequence[tuple[Tensor, Tensor]], kept: Sequence[int] | Tensor, *, shrinkage: float = 0.0,
    share: float = 1.0,
) -> float:  # fmt: skip
    """The damping, a power of ten, with which a fit on one half of the tokens does best on the other.

    Where y is no map of x, a fit follows what is chance in few tokens; from much damping to little, the first that does
    no better ends the search.

    Args:
        halves: C and T of each; shrinkage, share: of the fit, see `ridge`.
    """
    if halves[0][0].is_meta:  # of a rehearsal
        return DAMPING
    index = torch.as_tensor(kept, dtype=torch.long).to(halves[0][0].device)

    def error(damping: float) -> float:
        total = 0.0
        for (c, t), (other_c, other_t) in (halves, halves[::-1]):
            fitted = ridge(weight, c, index, damping=damping, shrinkage=shrinkage, target=t, share=share).to(c)
            goal = share * other_t.to(c) + (1 - share) * weight.to(c) @ other_c
            total += float(((fitted @ other_c[index][:, index]) * fitted).sum() - 2 * (fitted * goal[:, index]).sum())
        return total

    best, least = 10.0**_MOST_DAMPING, error(10.0**_MOST_DAMPING)
    for power in range(_MOST_DAMPING - 1, _LITTLE_DAMPING - 1, -1):
        if (found := error(10.0**power)) >= least:
            break
        best, least = 10.0**power, found
    return best


def shrinkage_for(shrinkage: FloatOrAuto, inputs: int, tokens: float) -> float:
    """auto: a multiple of the inputs per token, as what chance puts into the moments of inputs grows with these."""
    return _SHRINKAGE * inputs / tokens if shrinkage == "auto" else shrinkage


def check_ridge(damping: float | str, share: float = 1.0, shrinkage: float | str = 0.0) -> None:
    """
    Raises:
        InvalidOptionError: out of range.
    """
    if damping != "auto" and not 0 <= float(damping) < float("inf"):
        raise InvalidOptionError(f"damping is a share of the moment's mean diagonal, 0 or more, not {damping}")
    if shrinkage != "auto" and not 0 <= float(shrinkage) < float("inf"):
        raise InvalidOptionError(f"shrinkage is a share of each input's second moment, 0 or more, not {shrinkage}")
    if not 0 <= share <= 1:
        raise InvalidOptionError(f"the target's share lies between 0 and 1, not {share}")


def ridge_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """What `ridge` holds at its peak: the moment, of it what stays, damped, and its factor; four of the weight."""
    return dtype.itemsize * (3 * columns**2 + 4 * rows * columns)
