"""What a method is, and how it is found by name."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.model.layout import Layout
from secateur.surgery.edits import Edit

Prune = Callable[..., Iterator[Edit]]  # (model, tokens, budget, run, *, options) -> edits


@dataclass(frozen=True)
class Cost:
    """What a method will do, foretold from numbers alone.

    Attributes:
        block_tokens, head_tokens: tokens through one block, and through the head.
        peak_states: the largest number of hidden-state tokens held at once.
        after: the layout that the method will reach; approximate where the method decides on the way.
    """

    block_tokens: float
    head_tokens: float
    peak_states: float
    after: Layout


Foretell = Callable[..., Cost]  # (layout, tokens' (samples, length), budget, *, options) -> Cost


@dataclass(frozen=True)
class Option:
    """One keyword-only option of a method: its annotation without None, its default, its help."""

    name: str
    type: Any
    default: Any
    help: str


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        samples, length: the calibration of its paper.
        unit: what it removes.
        foretell: its cost, before any work.
    """

    name: str
    prune: Prune
    foretell: Foretell
    paper: str
    unit: str
    samples: int
    length: int
    bibtex: str

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.prune).partition("\n")[0]  # type: ignore[union-attr]  # the decorator demands a docstring

    @property
    def options(self) -> dict[str, Option]:
        """Its keyword-only arguments; the CLI derives its flags from them."""
        hints = typing.get_type_hints(self.prune)
        documented = _documented(self.prune)
        return {
            name: Option(name, _without_none(hints[name]), parameter.default, documented[name])
            for name, parameter in inspect.signature(self.prune).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given options checked and the others at their defaults.

        Raises:
            UnknownNameError: the method has no such option.
            InvalidOptionError: a value of the wrong kind.
        """
        options = self.options
        for name, value in given.items():
            if name not in options:
                raise UnknownNameError.of(f"option of {self.name}", name, options)
            _check_kind(self.name, options[name], value)
        return {name: given.get(name, option.default) for name, option in options.items()}


_METHODS: dict[str, Method] = {}


def method(
    name: str, *, paper: str, unit: str, samples: int, length: int, bibtex: str, foretell: Foretell
) -> Callable[[Prune], Prune]:
    """Register a generator of edits as a method. Its docstring's "Args" document its options.

    Raises:
        ValueError: it has no docstring, or an option that this does not document.
    """

    def register(prune: Prune) -> Prune:
        if not inspect.getdoc(prune):
            raise ValueError(f"method '{name}' has no docstring; its first line is its summary")
        keyword_only = [p.name for p in inspect.signature(prune).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if missing := [option for option in keyword_only if option not in _documented(prune)]:
            raise ValueError(f"method '{name}': its docstring's \"Args\" lack {', '.join(missing)}")
        _METHODS[name] = Method(name, prune, foretell, paper, unit, samples, length, bibtex)
        return prune

    return register


def methods() -> dict[str, Method]:
    """All methods by name, those of other packages included (entry point group `secateur.methods`)."""
    for entry in entry_points(group="secateur.methods"):
        if entry.name not in _METHODS:
            entry.load()
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownNameError: there is none.
    """
    known = methods()
    if name not in known:
        raise UnknownNameError.of("method", name, known)
    return known[name]


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(annotation) if arg is not type(None))
    return annotation


def _check_kind(method_name: str, option: Option, value: Any) -> None:
    if value is None and option.default is None:
        return
    if typing.get_origin(option.type) is typing.Literal:
        allowed = typing.get_args(option.type)
        if value not in allowed:
            raise InvalidOptionError(f"{method_name}: {option.name} is one of {', '.join(allowed)}, not {value!r}")
        return
    kinds = (int, float) if option.type is float else (option.type,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and option.type is not bool):
        raise InvalidOptionError(f"{method_name}: {option.name} takes a {option.type.__name__}, not {value!r}")


def _documented(prune: Prune) -> dict[str, str]:
    """Option texts from the docstring's "Args" section."""
    texts: dict[str, str] = {}
    section, current = False, ""
    for line in inspect.getdoc(prune).splitlines():  # type: ignore[union-attr]
        if not line.startswith(" "):
            section = line == "Args:" or (section and not line)
        elif section and line.startswith("    ") and line[4] != " ":
            current, _, text = line.strip().partition(": ")
            texts[current] = text
        elif section and current:
            texts[current] += " " + line.strip()
    return texts
