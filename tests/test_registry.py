"""Methods by name: their options are their signatures, their help is their docstring, other packages may add some."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from models import tiny, tiny_tokens

from secateur.driver import run_method
from secateur.errors import InvalidOptionError, NameTakenError, UnknownNameError
from secateur.methods import Method, get_method, method, methods, registry
from secateur.model.budget import Budget
from secateur.run import Run
from secateur.surgery.edits import DropBlock, Edit


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_TRIED", set())


FACTS: dict[str, Any] = {
    "paper": "p", "unit": "blocks", "samples": 3, "length": 4, "bibtex": "@b",
    "edits": (DropBlock,),
}  # fmt: skip


def drop_last(
    model: Any,
    tokens: Any,
    budget: Any,
    run: Any,
    *,
    count: int = 1,
    rate: float | None = None,
    kind: Literal["a", "b"] = "a",
    width: int | Literal["auto"] | None = None,
    loud: bool = False,
    name: str = "x",
) -> Iterator[Edit]:
    """Drop the last blocks.

    More about it: not an option.

    Args:
        count: how many of them,
            counted from the end: the last first.
        rate: a share, if given.
        kind: one of two: a or b.
        width: how wide.

        loud: say so.
        name: what to call it.

    Returns:
        nothing: not an option either.
    """
    for _ in range(count):
        yield DropBlock(model.numbers[-1])


def register() -> Method:
    method("last", **FACTS)(drop_last)
    return get_method("last")


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_says_what_it_is(name: str) -> None:
    each = get_method(name)
    assert each.name == name
    assert each.summary.endswith(".")
    assert each.paper.startswith("https://")
    assert each.bibtex.startswith("@")
    assert each.bibtex.count("{") == each.bibtex.count("}")
    assert each.unit
    assert each.samples >= 1
    assert each.length >= 2
    signature = inspect.signature(each.prune).parameters.values()
    keywords = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    assert {option.name: option.default for option in each.options.values()} == keywords
    for option in each.options.values():
        assert option.help.endswith(".")
        assert len(option.help) > 10
        assert option.default is not inspect.Parameter.empty
    assert each.complete({}) == keywords


@pytest.mark.usefixtures("own_registry")
def test_options_are_read_off_signature_and_docstring() -> None:
    made = register()
    assert made.summary == "Drop the last blocks."
    assert {o.name: (o.kinds, o.default, o.help) for o in made.options.values()} == {
        "count": ((int,), 1, "how many of them, counted from the end: the last first."),
        "rate": ((float,), None, "a share, if given."),
        "kind": (("a", "b"), "a", "one of two: a or b."),
        "width": ((int, "auto"), None, "how wide."),
        "loud": ((bool,), False, "say so."),
        "name": ((str,), "x", "what to call it."),
    }


@pytest.mark.usefixtures("own_registry")
def test_a_method_must_be_documented() -> None:
    def silent(model: Any, tokens: Any, budget: Any, run: Any) -> Iterator[Edit]:
        yield DropBlock(0)

    def terse(model: Any, tokens: Any, budget: Any, run: Any, *, one: int = 1, two: int = 2) -> Iterator[Edit]:
        """Say little.

        Args:
            one: the one.
        """
        yield DropBlock(0)

    with pytest.raises(ValueError, match="silent"):
        method("silent", **FACTS)(silent)
    with pytest.raises(ValueError, match=r"terse.* two"):
        method("terse", **FACTS)(terse)
    assert not {"silent", "terse"} & set(methods())


GOOD = [
    {}, {"count": 2}, {"rate": 0.5}, {"rate": 1}, {"rate": None}, {"kind": "b"}, {"width": 3},
    {"width": "auto"}, {"width": None}, {"loud": True}, {"name": ""},
]  # fmt: skip
BAD = [
    ("count", 1.0), ("count", "1"), ("count", True), ("count", None), ("rate", "0.5"), ("rate", False),
    ("width", "wide"), ("width", 0.5), ("width", True), ("kind", "c"), ("kind", None), ("kind", 1), ("loud", 1),
    ("loud", "yes"), ("loud", None), ("name", 3),
]  # fmt: skip


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("given", GOOD, ids=str)
def test_what_is_not_given_takes_its_default(given: dict[str, Any]) -> None:
    defaults = {"count": 1, "rate": None, "kind": "a", "width": None, "loud": False, "name": "x"}
    assert register().complete(given) == {**defaults, **given}


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_of_the_wrong_kind_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidOptionError, match=f"{name}.*{value!r}"):
        register().complete({name: value})


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("count", "3", 3), ("count", "3.5", "3.5"), ("rate", "0.5", 0.5), ("rate", "1", 1.0), ("kind", "b", "b"),
     ("width", "auto", "auto"), ("width", "7", 7), ("width", "x", "x"), ("name", "7", "7")],
)  # fmt: skip
def test_words_of_a_command_line_become_values(name: str, text: str, value: Any) -> None:
    option = register().options[name]
    parsed = option.parse(text)
    assert (parsed, type(parsed)) == (value, type(value))
    assert option.accepts(parsed) == ((name, text) not in [("count", "3.5"), ("width", "x")])


@pytest.mark.usefixtures("own_registry")
def test_an_unknown_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'cuont'.*'count'\?"):
        register().complete({"cuont": 1})
    with pytest.raises(UnknownNameError, match=r"'2spp'.*'2ssp'\?"):
        get_method("2spp")
    with pytest.raises(UnknownNameError, match=r"'qqqqqq'[^?]*2ssp[^?]*$"):  # near to none
        get_method("qqqqqq")


@pytest.mark.usefixtures("own_registry")
def test_other_packages_add_methods_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def load() -> None:
        loads.append(1)
        method("plugged", **FACTS)(drop_last)

    def installed(*, group: str) -> list[Any]:
        return [SimpleNamespace(name="plugged", value="p:m", load=load)] if group == "secateur.methods" else []

    monkeypatch.setattr(registry, "entry_points", installed)
    plugged = get_method("plugged")  # by its name alone, with nobody having listed the methods before
    assert {"2ssp", "plugged"} <= set(methods())
    assert sorted(methods()) == list(methods())
    assert len(loads) == 1
    model = tiny("llama")
    pruning = run_method(model, plugged, tiny_tokens(model, 1, 4), Budget(0.5), Run(), count=2)
    assert pruning.edits == [DropBlock(3), DropBlock(2)]
    assert model.numbers == [0, 1]


@pytest.mark.usefixtures("own_registry")
def test_somebody_elses_broken_package_is_told_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A method whose annotations cannot be read; the others are tried for real in test_plugin.py."""
    monkeypatch.setitem(drop_last.__annotations__, "count", "Nowhere")
    broken, ours = SimpleNamespace(name="last", value="gone:method", load=register), dict(registry._METHODS)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [broken])
    monkeypatch.setattr(logging.getLogger("secateur"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert methods() == methods() == ours
    assert {record.args[1] for record in caplog.records if record.args} == {"gone:method"}


@pytest.mark.usefixtures("own_registry")
def test_a_name_is_given_once() -> None:
    with pytest.raises(NameTakenError):
        method("2ssp", **FACTS)(drop_last)
    register()
    register()  # a notebook's cell that runs again


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("given", "shape"),
    [((None, None, None), (3, 4)), ((2, None, None), (3, 2)), ((100, 5, 7), (5, 7)), ((None, 1, 2), (1, 2)),
     ((7, None, 7), (3, 7))],
)  # fmt: skip
def test_the_papers_windows_where_none_are_asked(given: tuple[Any, Any, Any], shape: tuple[int, int]) -> None:
    assert register().window_shape(*given) == shape


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("given", [(None, 0, None), (None, -1, 5), (None, 1, 1), (None, None, 0), (8, 1, 9)])
def test_windows_that_cannot_be_are_refused(given: tuple[Any, Any, Any]) -> None:
    with pytest.raises(InvalidOptionError, match="window"):
        register().window_shape(*given)
