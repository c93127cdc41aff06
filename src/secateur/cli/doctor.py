"""`secateur doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from secateur.cli.guard import EXIT_FAILED, out, say
from secateur.cli.options import Json, words
from secateur.cli.progress import Bars

if TYPE_CHECKING:
    from secateur.doctor.examine import Finding
    from secateur.doctor.installed import Installed

# What the help repeats of `secateur.doctor`, which imports torch.
DTYPES = "float32,bfloat16,float16"
FAMILIES = "llama,gpt2,gemma2"
CHECKS = "statistics,walk,sweep,edits,rotation,cache,checkpoint,streamed,pruning"


def doctor(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="the CPU and each CUDA device")
    ] = None,
    dtypes: Annotated[str, typer.Option(help="Dtypes of the models, commas between.")] = DTYPES,
    families: Annotated[str, typer.Option(help="Families of models, commas between, or all.")] = FAMILIES,
    checks: Annotated[str, typer.Option(help="Which checks, commas between.")] = CHECKS,
    as_json: Json = False,
) -> None:
    """Check that secateur computes on this machine what it should, on tiny random models, and say what is installed.

    Nothing is fetched. Exit code 4 if a check fails.
    """
    from msgspec import json

    from secateur.doctor.examine import examine
    from secateur.model.tiny import TINY
    from secateur.run import Run

    examination = examine(
        [device] if device else None, dtypes=words(dtypes), checks=words(checks),
        families=list(TINY) if families == "all" else words(families), run=Run(observer=Bars()),
    )  # fmt: skip
    if as_json:
        print(json.encode(examination).decode())
    else:
        _show_installed(examination.installed)
        _show_outcomes(examination.outcomes)
        for outcome in examination.failed:
            _show_failure(outcome)
        for reason in dict.fromkeys(each.what for each in examination.outcomes if each.verdict == "not supported"):
            say(f"not supported: {reason}")
        seconds = sum(outcome.seconds for outcome in examination.outcomes)
        passed = sum(outcome.verdict == "passed" for outcome in examination.outcomes)
        say(f"{passed} checks passed, {len(examination.failed)} failed, in {seconds:.0f} s")
    if examination.failed:
        raise typer.Exit(EXIT_FAILED)


def _show_installed(installed: Installed) -> None:
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in installed.packages.items())
    say(f"Python {installed.python}, {installed.system}; {versions}; CUDA {installed.cuda or 'none'}")
    for device in installed.devices:
        memory = f"{device.bytes / 1e9:,.0f} GB" if device.bytes else f"{installed.threads} threads"
        say(f"{device.name}: {device.kind}, {memory}")
    for extra in installed.extras:
        if extra.command:
            say(f"extra '{extra.name}' lacks {', '.join(extra.missing)}: {extra.command}")
    there = [extra.name for extra in installed.extras if not extra.command]
    say(f"extras that are there: {', '.join(there) or 'none'}")


def _show_outcomes(outcomes: Sequence[Finding]) -> None:
    """A table per device: checks by dtypes, with the largest difference in each cell."""
    for device in dict.fromkeys(outcome.device for outcome in outcomes):
        here = [outcome for outcome in outcomes if outcome.device == device]
        dtypes = list(dict.fromkeys(outcome.dtype for outcome in here))
        table = Table(device, *dtypes, box=None, pad_edge=False)
        for check in dict.fromkeys(outcome.check for outcome in here):
            cells = [[each for each in here if (each.check, each.dtype) == (check, dtype)] for dtype in dtypes]
            table.add_row(check, *map(_cell, cells))
        out.print(table)
    say("The figures: the largest difference from the long way, as a share of the largest number expected.")


def _cell(outcomes: Sequence[Finding]) -> str:
    failed = [each.subject or "" for each in outcomes if each.verdict == "failed"]
    if failed:
        return f"[bold red]FAILED[/] {escape(' '.join(failed))}".rstrip()
    passed = [each for each in outcomes if each.verdict == "passed"]
    if not passed:
        return "not supported"
    differences = [each.difference for each in passed if each.difference is not None]
    return f"ok {max(differences):.0e}" if any(differences) else "ok"


def _show_failure(outcome: Finding) -> None:
    of = f" of {outcome.subject}" if outcome.subject else ""
    say(f"FAILED {outcome.check}{of} on {outcome.device} in {outcome.dtype}: {outcome.what}", style="bold red")
    say(f"  expected {outcome.expected}")
    say(f"  got      {outcome.got}")
    if outcome.difference is not None:
        say(f"  apart by {outcome.difference:.1e} of the largest number, where {outcome.tolerance:.0e} is rounding")
