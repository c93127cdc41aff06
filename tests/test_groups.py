"""Options by the group: typer sees a flag per field, and the command gets the group."""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from secateur.cli.ablate import ablate
from secateur.cli.compare import compare
from secateur.cli.evaluate import evaluate
from secateur.cli.groups import grouped
from secateur.cli.options import RunningOptions, SourceOptions, TaskOptions, words
from secateur.errors import InvalidOptionError
from secateur.evaluation.asked import Judging
from secateur.evaluation.generation import REFERENCE, REFERENCE_PROMPTS


@dataclass(frozen=True, kw_only=True)
class Fruit:
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
    assert "Red ones." in runner.invoke(app, ["--help"]).output


def test_commands_share_their_options_to_the_word() -> None:
    def flag(annotation: Any, default: Any) -> tuple[Any, ...]:
        kind, option = typing.get_args(annotation)
        return kind, vars(option), default

    every = [inspect.signature(command).parameters for command in (compare, ablate, evaluate)]
    for group, users in ((TaskOptions, every), (SourceOptions, every), (RunningOptions, [every[0], every[2]])):
        hints = typing.get_type_hints(group, include_extras=True)
        for name, field in group.__dataclass_fields__.items():
            found = [flag(user[name].annotation, user[name].default) for user in users]
            assert found == [flag(hints[name], field.default)] * len(users)


def test_words_have_commas_or_are_repeated() -> None:
    assert words(["a, b", "c,"]) == words("a,b,,c") == ["a", "b", "c"]
    assert words(None) == words("") == []


def test_no_tasks_can_be_said() -> None:
    published = Judging(tasks=("2ssp",))
    assert [TaskOptions(tasks=given).applied(published).tasks for given in (None, [""], ["piqa"])] == [
        ("2ssp",), (), ("piqa",)
    ]  # fmt: skip


def test_prompts_bring_how_they_are_continued() -> None:
    published = Judging(prompts=REFERENCE_PROMPTS, decodings=(REFERENCE,), rounds=9)
    for running, prompts, decodings in (
        (RunningOptions(), REFERENCE_PROMPTS, (REFERENCE,)),
        (RunningOptions(generate=["and then"]), ("and then",), ()),
        (RunningOptions(generate=["and then"], beams=True), ("and then",), (REFERENCE,)),
        (RunningOptions(generate=["x", "2ssp", "x"]), ("x", *REFERENCE_PROMPTS), (REFERENCE,)),
    ):
        judging = running.applied(published)
        assert (judging.prompts, judging.decodings, judging.rounds) == (prompts, decodings, 9)
    assert RunningOptions(inference=True, rounds=2).applied(published).rounds == 2
    timed = Judging(inference=True)
    assert [RunningOptions(inference=given).applied(timed).inference for given in (None, False)] == [True, False]
    with pytest.raises(InvalidOptionError, match="--generate"):
        RunningOptions(beams=True).applied(Judging())
