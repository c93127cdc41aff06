"""Options by the group: typer sees a flag per field, and the command gets the group."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from secateur.cli.ablate import ablate
from secateur.cli.app import app
from secateur.cli.compare import compare
from secateur.cli.evaluate import evaluate
from secateur.cli.groups import grouped
from secateur.cli.options import CalibrationOptions, RunningOptions, SourceOptions, TaskOptions, TextOptions, words
from secateur.cli.prune import prune
from secateur.errors import InvalidOptionError
from secateur.grid.ablate import WHATS
from secateur.judge.generation import REFERENCE_DECODING, REFERENCE_PROMPTS
from secateur.judge.judging import Judging
from secateur.planning import Request


@dataclass(frozen=True, kw_only=True)
class Fruit:
    PANEL: ClassVar[str] = "From the orchard"

    apples: Annotated[int, typer.Option(help="Red ones.")] = 2
    pears: Annotated[list[str] | None, typer.Option()] = None


def test_a_command_gets_its_groups_and_typer_their_fields() -> None:
    told: list[Any] = []

    @grouped
    def buy(shop: Annotated[str, typer.Argument()], *, fruit: Fruit, quick: bool = False) -> None:
        """Go and buy."""
        told.append((shop, fruit, quick))

    app = typer.Typer()
    app.command()(buy)
    runner = CliRunner()
    assert runner.invoke(app, ["market"]).exit_code == 0
    assert runner.invoke(app, ["market", "--pears", "a", "--quick", "--pears", "b", "--apples", "5"]).exit_code == 0
    assert told == [("market", Fruit(), False), ("market", Fruit(apples=5, pears=["a", "b"]), True)]
    assert runner.invoke(app, ["market", "--fruit", "5"]).exit_code == 2
    _, _, panel = runner.invoke(app, ["--help"]).output.partition(" From the orchard ")
    assert "Red ones." in panel
    assert "--quick" not in panel


@pytest.mark.parametrize("bare", [{"given": Annotated[int, typer.Option()]}, {"given": int}])
def test_a_field_that_is_no_option_with_a_default_is_refused(bare: dict[str, Any]) -> None:
    field = {"given": dataclasses.field(default=2)} if bare["given"] is int else {}
    group = dataclass(type("Group", (), {"__annotations__": bare, "PANEL": "Some", **field}))

    def command(*, some: Any) -> None:
        """Nothing."""

    command.__annotations__["some"] = group
    with pytest.raises(TypeError, match=r"Group\.given"):
        grouped(command)


def test_help_lists_options_by_panel_and_ablations_by_line() -> None:
    helped = functools.partial(CliRunner().invoke, app, terminal_width=100)
    told = {name: helped([name, "--help"]).output for name in ("compare", "ablate")}
    for shown in told.values():
        places = [shown.index(f" {group.PANEL} ") for group in (CalibrationOptions, TextOptions, TaskOptions)]
        assert places == sorted(places)
        assert "Calibration: windows." in shown
    lines = [line.strip() for line in told["ablate"].splitlines()]
    assert all(any(line.startswith(f"- {name}: ") for line in lines) for name in WHATS)


def test_commands_share_their_options_to_the_word() -> None:
    def flag(annotation: Any, default: Any) -> tuple[Any, ...]:
        kind, option = typing.get_args(annotation)
        return kind, vars(option), default

    every = [inspect.signature(command).parameters for command in (compare, ablate, evaluate)]
    for group, users in ((TaskOptions, every), (SourceOptions, every), (RunningOptions, [every[0], every[2]])):
        hints = typing.get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            found = [flag(user[field.name].annotation, user[field.name].default) for user in users]
            kind, option, default = flag(hints[field.name], field.default)
            assert found == [(kind, {**option, "rich_help_panel": group.PANEL}, default)] * len(users)


def test_prune_has_a_flag_for_every_field_of_a_request() -> None:
    flags = inspect.signature(prune).parameters
    fields = {field.name: field.default for field in dataclasses.fields(Request)}
    own = {name: fields[name] for name in fields if name not in ("goal", "options", "filters", "cache")}
    assert {name: flags[name].default for name in own} == own


def test_words_have_commas_or_are_repeated() -> None:
    assert words(["a, b", "c,"]) == words("a,b,,c") == ["a", "b", "c"]
    assert words(None) == words("") == []


def test_no_tasks_can_be_said() -> None:
    published = Judging(tasks=("2ssp",))
    assert [TaskOptions(tasks=given).applied(published).tasks for given in (None, [""], ["piqa"])] == [
        ("2ssp",), (), ("piqa",)
    ]  # fmt: skip


def test_prompts_bring_how_they_are_continued() -> None:
    published = Judging(prompts=REFERENCE_PROMPTS, decodings=(REFERENCE_DECODING,), rounds=9)
    for running, prompts, decodings in (
        (RunningOptions(), REFERENCE_PROMPTS, (REFERENCE_DECODING,)),
        (RunningOptions(generate=["and then"]), ("and then",), ()),
        (RunningOptions(generate=["and then"], beams=True), ("and then",), (REFERENCE_DECODING,)),
        (RunningOptions(generate=["x", "2ssp", "x"]), ("x", *REFERENCE_PROMPTS), (REFERENCE_DECODING,)),
    ):
        judging = running.applied(published)
        assert (judging.prompts, judging.decodings, judging.rounds) == (prompts, decodings, 9)
    assert RunningOptions(inference=True, rounds=2).applied(published).rounds == 2
    timed = Judging(inference=True)
    assert [RunningOptions(inference=given).applied(timed).inference for given in (None, False)] == [True, False]
    with pytest.raises(InvalidOptionError, match="--generate"):
        RunningOptions(beams=True).applied(Judging())
