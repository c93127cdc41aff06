"""What makes up for what a method removes: filters that compose with any of them. A compensation is one file and its
place in `FILTERS`."""

from __future__ import annotations

from typing import Any

from secateur.compensation.fold import FOLD
from secateur.compensation.refine import REFINE
from secateur.compensation.refit import REFIT
from secateur.driver import Filter
from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.methods import Method
from secateur.model.modeling_secateur import Family
from secateur.signatures import options_of
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, KeepHeads, KeepNeurons

FILTERS: dict[str, Filter] = {each.name: each for each in (REFIT, FOLD, REFINE)}
REFITS = (REFIT, FOLD)  # what --refit chooses from


def get_filter(name: str, **options: Any) -> Filter:
    """The filter of that name, the options that are not given at their defaults.

    Raises:
        UnknownNameError: no such filter, or it has no such option.
        InvalidOptionError: a value of the wrong kind.
    """
    if name not in FILTERS:
        raise UnknownNameError.of("filter", name, FILTERS)
    plain = FILTERS[name]
    known = options_of(plain.apply)
    for option, value in options.items():
        if option not in known:
            raise UnknownNameError.of(f"option of {name}", option, known)
        if not known[option].accepts(value):
            raise InvalidOptionError(f"{name}: {option} takes {known[option].allowed}, not {value!r}")
    return Filter(name, plain.edits, plain.apply, {each: options.get(each, known[each].default) for each in known})


def refits(method: Method, family: Family) -> list[Filter]:
    """What `--refit` puts behind a method: the ridge refit where it narrows modules, and the fold where it removes
    whole ones, in families whose blocks add what a projection gives to the stream as it is. Empty where it does
    neither, or refits by itself.
    """
    if method.fits_itself:
        return []
    wanted = (narrows(method), removes_modules(method) and not family.post_norms)
    return [get_filter(each.name) for each, fits in zip(REFITS, wanted, strict=True) if fits]


def require_refits(method: Method, family: Family) -> list[Filter]:
    """
    Raises:
        InvalidOptionError: there are none.
    """
    if not (chosen := refits(method, family)):
        why = "it narrows no module"
        if method.fits_itself:
            why = "what it leaves is fitted already"
        elif family.post_norms and removes_modules(method):
            why = f"{family.model_type} puts a norm behind each module"
        raise InvalidOptionError(f"{method.name} has nothing to refit: {why}")
    return chosen


def narrows(method: Method) -> bool:
    """Whether it narrows modules: their refit is what it then sees of the model."""
    return bool({KeepNeurons, KeepHeads} & set(method.edits))


def removes_modules(method: Method) -> bool:
    """Whether it removes whole modules, behind which what stays can be folded."""
    return bool({DropAttention, DropMLP, DropBlock} & set(method.edits))
