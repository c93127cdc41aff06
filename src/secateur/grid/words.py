"""What a grid is asked for in words: methods, sparsities, options of single methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.grid.cells import Calibration
from secateur.methods import Method, get_method, methods

PAPER = (0.25, 0.375, 0.5)  # of 2SSP's tables
CALIBRATION = ("samples", "length")  # may be given as if they were a method's options
FIRST = "2ssp"  # of all methods, in tables


def method_names(asked: Sequence[str]) -> list[str]:
    """`all`, or names.

    Raises:
        UnknownNameError: a method that does not exist.
    """
    if list(asked) == ["all"]:
        return sorted(methods(), key=lambda name: (name != FIRST, name))
    return [get_method(name).name for name in asked]


def sparsities(asked: Iterable[str | float], blocks: int) -> list[float]:
    """Numbers, `paper` (25, 37.5, 50 %: the reference's -2) or `every-block` (each number of blocks but none and all,
    as a share of them: its -1), ascending and each once.

    Args:
        blocks: of the model.

    Raises:
        InvalidOptionError: another word, or a number outside (0, 1).
    """
    found: set[float] = set()
    for each in asked:
        if each == "paper":
            found.update(PAPER)
        elif each == "every-block":
            found.update(count / blocks for count in range(1, blocks))
        else:
            found.add(_sparsity(each))
    return sorted(found)


def _sparsity(asked: str | float) -> float:
    try:
        value = float(asked)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise InvalidOptionError(f"a sparsity is a number between 0 and 1, `paper` or `every-block`, not {asked!r}")
    return value


def parse_options(asked: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`METHOD.NAME=VALUE`, several of them -> by method and name.

    Raises:
        InvalidOptionError, UnknownNameError: not of that form, or no such method, option or value.
    """
    found: dict[str, dict[str, Any]] = {}
    for each in asked:
        left, equals, text = each.partition("=")
        method, dot, name = left.partition(".")
        if not (equals and dot):
            raise InvalidOptionError(
                f"options of a method are METHOD.NAME=VALUE, as evopress.generations=4; not {each!r}"
            )
        found.setdefault(method, {})[name.replace("-", "_")] = parse_value(
            get_method(method), name.replace("-", "_"), text
        )
    for method, options in found.items():
        split(get_method(method), options)
    return found


def parse_value(method: Method, name: str, text: str) -> Any:
    """The value of one option, or of the calibration's samples or length.

    Raises:
        UnknownNameError, InvalidOptionError: no such option; no whole number.
    """
    if name in CALIBRATION:
        if not text.isdecimal():
            raise InvalidOptionError(f"{method.name}.{name} is a whole number, not {text!r}")
        return int(text)
    if name not in method.options:
        raise UnknownNameError.of(f"option of {method.name}", name, [*method.options, *CALIBRATION])
    return method.options[name].parse(text)


def split(method: Method, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """A method's own options, checked, and what was given of its calibration.

    Raises:
        UnknownNameError, InvalidOptionError: what the method would refuse.
    """
    own = {name: value for name, value in given.items() if name not in CALIBRATION}
    method.complete(own)
    return own, {name: value for name, value in given.items() if name in CALIBRATION}


def windows(samples: int | None, length: int | None) -> dict[str, int]:
    """What was given of the calibration of all methods, as `split` gives a single one's."""
    return {name: value for name, value in (("samples", samples), ("length", length)) if value is not None}


def calibration_of(
    method: Method, text: str, given: Mapping[str, int], *, seed: int, count: Any, max_length: int | None
) -> Calibration:
    """A method's calibration: of the shape that was given, else of its paper's.

    Raises:
        InvalidOptionError: too few or too long windows.
    """
    shape = method.window_shape(max_length, given.get("samples"), given.get("length"))
    return Calibration(text=text, samples=shape[0], length=shape[1], seed=seed, count=count)
