"""How the commands show how far a grid is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from secateur.cli import progress
from secateur.cli.progress import in_words, standing_in_words, standing_shown
from secateur.grid.pace import Standing

AT = Standing(
    cell="2ssp-0.25", part="generation", done=0.4, finished=3, cells=33, elapsed_s=100.0, left_s=300.0,
    guessed=(("prune", "slimgpt"), ("inference", "")),
)  # fmt: skip
BETWEEN = Standing(
    cell="", part="", done=0.0, finished=4, cells=33, elapsed_s=170.0, left_s=230.0, guessed=()
)  # fmt: skip


def test_a_time_as_one_says_it() -> None:
    times = (0.4, 99, 100, 5940, 6000, 7.5 * 3600, 100 * 3600)
    assert list(map(in_words, times)) == ["0 s", "99 s", "2 min", "99 min", "1 h 40 min", "7 h 30 min", "100 h 0 min"]


def test_what_is_guessed_is_told() -> None:
    assert standing_in_words(AT) == (
        "3 of 33 cells, about 5 min left; 2ssp-0.25: generated text 40%; not timed yet: pruning by slimgpt, prefill "
        "and time per token"
    )
    assert standing_in_words(BETWEEN) == "4 of 33 cells, about 4 min left"


def console(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    told = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=told, force_terminal=terminal, width=120))
    return told


def test_without_a_terminal_a_line_a_minute_and_one_after_each_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    told, now = console(monkeypatch, terminal=False), [0.0]
    with standing_shown(lambda: now[0]) as show:
        for now[0] in (1.0, 30.0, 59.0, 61.0, 90.0):
            show(AT)
        show(BETWEEN)
        show(BETWEEN)
    lines = [line for line in told.getvalue().splitlines() if " of 33 cells" in line]
    assert [line[0] for line in lines] == ["3", "4"]


def test_on_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    told = console(monkeypatch, terminal=True)
    with standing_shown() as show:
        show(AT)
    assert "25%" in told.getvalue()  # 100 of 400 s
    assert "about 5 min left" in told.getvalue()
