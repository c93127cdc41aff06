"""What makes up for what a method removes: filters that compose with any of them. A compensation is one file and its
place in `FILTERS`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from secateur.compensation.fold import fold
from secateur.compensation.refit import refit
from secateur.driver import Filter
from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.methods import Method
from secateur.model.modeling_secateur import Family
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, KeepHeads, KeepNeurons, SetWeight

FILTERS: dict[str, Filter] = {
    filtering.name: filtering
    for filtering in (
        Filter("refit", (), refit, {"target": "original", "share": 1.0, "damping": 0.01}),
        Filter("fold", (SetWeight,), fold, {"damping": 0.01}),
    )
}

REFITS = ("refit", "fold")  # what --refit chooses from


def get_filter(name: str, **options: Any) -> Filter:
    """A filter by its name, its options at their defaults where they are not given.

    Raises:
        UnknownNameError: no filter, or no option, of that name.
    """
    if name not in FILTERS:
        raise UnknownNameError.of("filter", name, FILTERS)
    for option in options:
        if option not in FILTERS[name].options:
            raise UnknownNameError.of(f"option of the filter {name}", option, FILTERS[name].options)
    return replace(FILTERS[name], options={**FILTERS[name].options, **options})


def refits(method: Method, family: Family) -> list[Filter]:
    """What `--refit` puts behind a method: the ridge refit where it narrows modules, and the fold where it removes
    whole ones, in families whose blocks add what a projection gives to the stream as it is. None where it does neither.
    """
    folds = not family.post_norms and {DropAttention, DropMLP, DropBlock} & set(method.edits)
    return [get_filter(name) for name, wanted in zip(REFITS, (narrows(method), folds), strict=True) if wanted]


def require_refits(method: Method, family: Family) -> list[Filter]:
    """
    Raises:
        InvalidOptionError: there are none.
    """
    if not (chosen := refits(method, family)):
        why = f"{family.model_type} puts a norm behind each module" if family.post_norms else "it narrows no module"
        raise InvalidOptionError(f"{method.name} has nothing to refit: {why}")
    return chosen


def narrows(method: Method) -> bool:
    """Whether what it does later may depend on a refit of what it did before."""
    return bool({KeepNeurons, KeepHeads} & set(method.edits))
