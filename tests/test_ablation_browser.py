"""An ablation's page in a real browser: plots drawn in light and dark, switches that switch, nothing that gets in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ablation_folders import CHOICES, make_ablation_folder
from test_ablation_page import evil_ablation
from test_report_browser import click, complaints, open_page, requested, shown, traces

from secateur.report.page import write_report

pytestmark = pytest.mark.slow
KEPT = (("norm", "2ssp"), ("calibration-size", "slimgpt"), ("stage1-only", "2ssp"), ("repeats", "2ssp"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    choices = {key: CHOICES[key] for key in KEPT}
    folder = make_ablation_folder(tmp_path_factory.mktemp("ablate"), choices=choices, seeds=(0, 1))
    write_report(folder)
    return folder


def axis_types(browser: Any, plot: int) -> list[str]:
    found: list[str] = browser.execute_script(
        "const full = document.getElementById(arguments[0])._fullLayout; return [full.xaxis.type, full.yaxis.type]",
        f"plot-{plot}",
    )
    return found


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_plots_are_drawn_without_a_complaint_or_a_request(browser: Any, folder: Path, scheme: str, width: int) -> None:
    requested(browser)  # forget what was before
    open_page(browser, folder, scheme=scheme, width=width)
    for plot in range(len(KEPT)):
        drawn = traces(browser, str(plot))
        assert len(drawn) == 2 * 2, plot  # a size's means, and its seeds
        assert len({trace["colour"] for trace in drawn}) == 2
        assert [trace["n"] for trace in drawn[:2]] == [drawn[0]["n"], 2 * drawn[0]["n"]]
        assert browser.execute_script(
            "return document.querySelectorAll(arguments[0]).length", f"#plot-{plot} .scatterlayer .trace"
        )
    assert axis_types(browser, 0) == ["linear", "log"]
    assert axis_types(browser, 1) == ["log", "log"]
    assert complaints(browser) == []
    assert requested(browser) == []
    wide, seen = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen


def test_every_word_has_its_label_and_the_default_its_name(browser: Any, tmp_path: Path) -> None:
    words = ("log", "linear", "uniform", "log-decrease", "linear-decrease")
    ratios = {word: 0.3 + 0.01 * len(word) for word in words}
    choices = {("schedule", "slimgpt"): ("slimgpt.ratio", ratios), ("norm", "2ssp"): CHOICES["norm", "2ssp"]}  # abreast
    write_report(make_ablation_folder(tmp_path, choices=choices, sparsities=(0.5,), texts=("c4",), tasks=False))
    for width in (1100, 390):
        open_page(browser, tmp_path, width=width)
        labels = browser.execute_script(
            """return [...document.querySelectorAll('#plot-0 .xtick text')]
            .filter((each) => each.checkVisibility({ opacityProperty: true })).map((each) => each.textContent);"""
        )
        assert labels == ["logdefault", *words[1:]]


def test_a_size_and_a_measure_can_be_chosen(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    everywhere = shown(browser, "#table tbody tr")
    click(browser, "#sizes [data-size='0.5']")
    assert len(traces(browser, "0")) == 2
    assert shown(browser, "#table tbody tr") == everywhere / 2
    assert shown(browser, ".card p[data-size='0.5']") == 0
    over_dense = traces(browser, "0")[0]["y"][0]
    click(browser, "#texts [data-text='perplexity:c4']")
    assert traces(browser, "0")[0]["y"][0] > 5 * over_dense
    assert shown(browser, "#table thead [data-text]") == 2  # it and what it is against the default
    click(browser, "#texts [data-text='accuracy']")
    assert axis_types(browser, 1) == ["log", "linear"]
    assert 0 < traces(browser, "1")[0]["y"][0] < 1
    click(browser, "#sizes [data-size='0.25']")
    assert traces(browser, "0") == []
    assert complaints(browser) == []


def test_values_sort_as_the_numbers_that_they_are(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    click(browser, "#table thead th:nth-child(2) button")
    values = browser.execute_script(
        "return [...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[1].dataset.sort)"
    )
    numbers = [int(value) for value in values if value.isdecimal()]
    assert numbers == sorted(numbers)
    assert len(numbers) == 2 * 8


def test_what_users_write_is_shown_and_not_run(browser: Any, tmp_path: Path) -> None:
    write_report(evil_ablation(tmp_path))
    open_page(browser, tmp_path)
    browser.execute_script("Plotly.Fx.hover('plot-0', [{ curveNumber: 0, pointNumber: 0 }])")
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('img, .hoverlayer a').length") == 0
    assert complaints(browser) == []
