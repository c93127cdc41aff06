"""The options of a method: its keyword-only arguments, read off the function or, importing nothing, off its source.

The commands' flags come from here, and a `--help` that imported the methods would import torch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECOMMENDED = "secateur"  # the method where none is asked for; help needs it, and imports no methods
_PACKAGE = Path(__file__).parent
_PLAIN = {"bool": bool, "int": int, "float": float, "str": str}


@dataclass(frozen=True)
class Option:
    """One keyword-only option of a method.

    Attributes:
        kinds: what its annotation allows, None apart: types (bool, int, float, str) and the words of a Literal.
    """

    name: str
    kinds: tuple[Any, ...]
    default: Any
    help: str

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.default is None
        if isinstance(value, bool):
            return bool in self.kinds
        number = isinstance(value, int) and float in self.kinds
        return number or any(type(value) is kind or value == kind for kind in self.kinds)

    def parse(self, text: str) -> Any:
        """A value from a command line: a word of a Literal, else the first type that reads it, else the text."""
        if text in self.kinds:
            return text
        if bool in self.kinds and text.lower() in ("true", "false"):
            return text.lower() == "true"
        for kind in (int, float):
            if kind in self.kinds:
                with contextlib.suppress(ValueError):
                    return kind(text)
        return text

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off and nothing else."""
        return self.kinds == (bool,)

    @property
    def allowed(self) -> str:
        """The kinds in words."""
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        return " or ".join(names.get(kind, str(kind)) for kind in self.kinds)

    @property
    def default_in_words(self) -> str:
        return "off" if self.default is False else "not given" if self.default is None else str(self.default)


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a method that has been imported."""
    hints, texts = typing.get_type_hints(function), documented(function.__doc__)
    return {
        name: Option(name, _kinds(hints[name]), parameter.default, texts[name])
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


@functools.cache
def builtin_options() -> dict[str, dict[str, Option]]:
    """The options of secateur's own methods by the methods' names, out of their source."""
    return dict(sorted(pair for path in (_PACKAGE / "methods").glob("*.py") for pair in _Source(path).methods()))


class _Source:
    """A module as it is written.

    Its methods may be annotated by bool, int, float, str, Literals, unions of these and names for them, also names
    that come from other modules of secateur; their defaults are literals.
    """

    def __init__(self, path: Path) -> None:
        self.body = ast.parse(path.read_text(encoding="utf-8")).body

    def methods(self) -> Iterator[tuple[str, dict[str, Option]]]:
        for node in self.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "method":
                    yield ast.literal_eval(self._value(call.args[0])), dict(self._options(node))

    def _options(self, function: ast.FunctionDef) -> Iterator[tuple[str, Option]]:
        texts = documented(ast.get_docstring(function))
        for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
            assert argument.annotation is not None
            assert default is not None
            kinds = tuple(self._kinds(argument.annotation))
            value = ast.literal_eval(self._value(default))
            yield argument.arg, Option(argument.arg, kinds, value, texts[argument.arg])

    def _kinds(self, annotation: ast.expr) -> Iterator[Any]:
        if isinstance(annotation, ast.BinOp):  # X | Y
            yield from self._kinds(annotation.left)
            yield from self._kinds(annotation.right)
        elif isinstance(annotation, ast.Subscript):  # Literal[...]
            words = ast.literal_eval(annotation.slice)
            yield from words if isinstance(words, tuple) else (words,)
        elif isinstance(annotation, ast.Name) and annotation.id in _PLAIN:
            yield _PLAIN[annotation.id]
        elif isinstance(annotation, ast.Name):
            home, value = self._home(annotation.id)
            yield from home._kinds(value)
        # what is left is None, which is no kind

    def _value(self, node: ast.expr) -> ast.expr:
        """A literal, or what a name stands for."""
        return self._home(node.id)[1] if isinstance(node, ast.Name) else node

    def _home(self, name: str) -> tuple[_Source, ast.expr]:
        """The module that gives the name its value, and the value."""
        for node in self.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return self, node.value
            if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
                original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
                path = _PACKAGE.parent.joinpath(*str(node.module).split(".")).with_suffix(".py")
                return _Source(path)._home(original)
        raise NameError(f"{name} is given no value in its module")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """`Literal["a", "b"] | int | None` -> ("a", "b", int)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(kind for arg in typing.get_args(annotation) if arg is not type(None) for kind in _kinds(arg))
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    return (annotation,)


def documented(docstring: str | None) -> dict[str, str]:
    """Option texts from a docstring's "Args" section."""
    texts: dict[str, str] = {}
    section, current = False, ""
    for line in inspect.cleandoc(docstring or "").splitlines():
        if not line.startswith(" "):
            section = line == "Args:" or (section and not line)
        elif section and line.startswith("    ") and line[4] != " ":
            current, _, text = line.strip().partition(": ")
            texts[current] = text
        elif section and current:
            texts[current] += " " + line.strip()
    return texts
