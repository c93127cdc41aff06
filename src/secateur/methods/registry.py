"""What a method is, and how it is found by name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from secateur.errors import InvalidOptionError, NameTakenError, UnknownNameError
from secateur.model.handle import require_positions
from secateur.signatures import Option, documented, options_of
from secateur.surgery.edits import Edit

Options = Mapping[str, Any]  # of a method or a filter, by name; what JSON can hold
Prune = Callable[..., Iterator[Edit]]  # (model, tokens, budget, run, *, options) -> edits


@dataclass(frozen=True)
class Amount:
    """How a method comes to how much goes.

    Attributes:
        uniform: all blocks lose alike, so that a step is one unit of every block.
        equal: an option and its value, by which all blocks lose alike in a method where else they do not.
        step: the option that says how many units go at a time; None if they go one by one.
        decides: options that, all given, decide instead of the sparsity.
        shared: how the keys of those steps begin whose results do not depend on the budget, so that a run at one
            sparsity may take them over from a run at another; None if there are none.
    """

    uniform: bool = False
    equal: tuple[str, str] | None = None
    step: str | None = None
    decides: tuple[str, ...] = ()
    shared: str | None = None


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        samples, length: its calibration by default; its paper's, or what the docstring says.
        unit: what it removes.
        edits: the kinds that it may yield; a family that cannot do one of them is refused before any work.
        able: further kinds, that it yields only where the family can do them.
        needs: what it runs, in full-length forwards; L blocks, S calibration windows.
        amount: what is to know of how much goes.
    """

    name: str
    prune: Prune
    paper: str
    unit: str
    samples: int
    length: int
    bibtex: str
    edits: tuple[type[Edit], ...]
    needs: str = ""
    amount: Amount = Amount()
    able: tuple[type[Edit], ...] = ()

    @property
    def shared(self) -> str | None:
        return self.amount.shared

    @property
    def fits_itself(self) -> bool:
        """Whether it fits what it leaves to a target, an option of that name; a refit behind it would undo that."""
        return "target" in self.options

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.prune) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Option]:
        """Its keyword-only arguments; the CLI derives its flags from them."""
        return options_of(self.prune)

    def complete(self, given: Options) -> Options:
        """The given options checked and the others at their defaults.

        Raises:
            UnknownNameError: the method has no such option.
            InvalidOptionError: a value of the wrong kind.
        """
        options = self.options
        for name, value in given.items():
            if name not in options:
                raise UnknownNameError.of(f"option of {self.name}", name, options)
            if not options[name].accepts(value):
                raise InvalidOptionError(f"{self.name}: {name} takes {options[name].allowed}, not {value!r}")
        return {name: given.get(name, option.default) for name, option in options.items()}

    def window_shape(self, max_length: int | None, samples: int | None, length: int | None) -> tuple[int, int]:
        """(samples, length) of the calibration: its paper's where not given, within the model's positions.

        Raises:
            InvalidOptionError: too few, or longer than the positions.
        """
        samples = self.samples if samples is None else samples
        length = min(self.length, max_length or self.length) if length is None else length
        if samples < 1 or length < 2:
            raise InvalidOptionError(f"need at least 1 window of at least 2 tokens, not {samples} of {length}")
        require_positions(max_length, length)
        return samples, length


# Options that came later, and the value that means what was done before. Where results are compared with earlier ones
# these are left out, so that folders of cells go on.
_LATER: dict[str, Options] = {
    "2ssp": {"score": "activation", "screen": None},
    "blockpruner": {"screen": None},
    "secateur": {"shrinkage": 0.0},
}


def earlier(method: str) -> Options:
    """What results mean that say nothing of an option that came after them."""
    return _LATER.get(method, {})


def as_before(method: str, options: Options) -> Options:
    """The options, without those that came later and ask for nothing new."""
    later = earlier(method)
    return {name: value for name, value in options.items() if name not in later or value != later[name]}


_METHODS: dict[str, Method] = {}
_TRIED: set[str] = set()  # entry points of other packages: each is loaded once


def method(
    name: str,
    *,
    paper: str,
    unit: str,
    samples: int,
    length: int,
    bibtex: str,
    edits: tuple[type[Edit], ...],
    needs: str = "",
    amount: Amount = Amount(),
    able: tuple[type[Edit], ...] = (),
) -> Callable[[Prune], Prune]:
    """Register a generator of edits as a method. Its docstring's "Args" document its options.

    Its cost is stated nowhere: it is rehearsed (see `planning.plan`).

    Args:
        bibtex: how to cite it; of ours the key in `references.bib`.

    Raises:
        ValueError: it has no docstring, or an option that this does not document.
        NameTakenError: another method has the name. (A cell of a notebook may run again: it replaces its own.)
    """

    def register(prune: Prune) -> Prune:
        if (other := _METHODS.get(name)) and _home(other.prune) != _home(prune):
            raise NameTakenError(f"the method '{name}' is {other.prune.__module__}'s; name yours otherwise")
        if not inspect.getdoc(prune):
            raise ValueError(f"method '{name}' has no docstring; its first line is its summary")
        keyword_only = [p.name for p in inspect.signature(prune).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if missing := [option for option in keyword_only if option not in documented(prune.__doc__)]:
            raise ValueError(f"method '{name}': its docstring's \"Args\" lack {', '.join(missing)}")
        citation = bibtex if bibtex.startswith("@") else _cited(bibtex)
        _METHODS[name] = Method(name, prune, paper, unit, samples, length, citation, edits, needs, amount, able)
        return prune

    return register


def _cited(key: str) -> str:
    """The entry of that key in our references."""
    entries = resources.files("secateur.methods").joinpath("references.bib").read_text(encoding="utf-8").split("\n\n")
    return next(entry.strip() for entry in entries if f"{{{key}," in entry)


def methods() -> dict[str, Method]:
    """All methods by name, those of other packages included (entry point group `secateur.methods`)."""
    for entry in entry_points(group="secateur.methods"):
        if entry.value not in _TRIED:
            _TRIED.add(entry.value)
            _load_plugin(entry)
    return dict(sorted(_METHODS.items()))


def _load_plugin(entry: EntryPoint) -> None:
    """Somebody else's package must not break ours: whatever it does is told, and it is left out."""
    before = dict(_METHODS)
    try:
        entry.load()
        for name in _METHODS.keys() - before.keys():
            _METHODS[name].options  # noqa: B018  # its annotations must be readable
    except (Exception, SystemExit) as error:
        _METHODS.clear()
        _METHODS.update(before)
        logging.getLogger(__name__).warning(
            "the method '%s' of %s cannot be used: %s", entry.name, entry.value, error or type(error).__name__
        )


def get_method(name: str | Method) -> Method:
    """The method of that name; one that is given is returned.

    Raises:
        UnknownNameError: there is none.
    """
    if isinstance(name, Method):
        return name
    if name not in _METHODS and name not in methods():  # looking for other packages' takes a while
        raise UnknownNameError.of("method", name, _METHODS)
    return _METHODS[name]


def _home(prune: Prune) -> tuple[str, str]:
    return prune.__module__, prune.__qualname__
