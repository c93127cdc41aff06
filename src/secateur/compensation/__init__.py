"""What makes up for what a method removes: filters that compose with any of them. A compensation is one file and its
place in `FILTERS`."""

from __future__ import annotations

from typing import Any

from secateur.compensation.refine import REFINE
from secateur.driver import Filter
from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.signatures import options_of

# In the order in which edits go through them: what trains a whole model comes last.
FILTERS: dict[str, Filter] = {each.name: each for each in (REFINE,)}


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
