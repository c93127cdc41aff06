"""The page in a real browser: no complaint on its console, plots drawn, switches that switch, nothing that gets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_folders import make_compare_folder
from test_report_page import evil_folder

from secateur.report.looks import looks
from secateur.report.page import write_report

pytestmark = pytest.mark.slow
PLOTS = ("size", "time", "accuracy", "inference", "curve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_compare_folder(tmp_path_factory.mktemp("compare"))
    write_report(folder)
    return folder


def open_page(browser: Any, folder: Path, *, scheme: str = "light", width: int = 1280) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((folder / "report.html").as_uri())
    WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def requested(browser: Any) -> list[str]:
    """Whatever the page asked for, but for itself and what it holds."""
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]


def traces(browser: Any, plot: str) -> list[dict[str, Any]]:
    """What a plot shows: name and colour of its traces, none where the plot is hidden."""
    found: list[dict[str, Any]] = browser.execute_script(
        """const plot = document.getElementById(arguments[0]);
        if (plot.closest(".off")) return [];
        return plot.data.map((t) =>
          ({ name: t.name, colour: t.marker?.color ?? t.line.color, n: t.x.length, y: t.y }));""",
        f"plot-{plot}",
    )
    return found


def click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def shown(browser: Any, selector: str) -> int:
    count: int = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility()).length", selector
    )
    return count


def first_column(browser: Any) -> list[str]:
    names: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('.main tbody tr')].map((row) => row.cells[0].dataset.sort)"
    )
    return names


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plots_are_drawn_without_a_complaint_or_a_request(browser: Any, folder: Path, scheme: str, width: int) -> None:
    requested(browser)  # forget what was before
    open_page(browser, folder, scheme=scheme, width=width)
    for plot in PLOTS:
        assert traces(browser, plot), plot
        assert browser.execute_script(
            "return document.querySelectorAll(arguments[0]).length", f"#plot-{plot} .scatterlayer .trace"
        )
    assert complaints(browser) == []
    assert requested(browser) == []
    wide, seen = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen  # a phone need not scroll sideways, but for tables in their own frames


def test_axes_are_what_the_captions_say(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    found = {
        plot: browser.execute_script(
            """const figure = document.getElementById(arguments[0]), { xaxis, yaxis } = figure._fullLayout;
            return [xaxis.type, yaxis.type, figure.closest("figure").querySelector("figcaption").textContent];""",
            f"plot-{plot}",
        )
        for plot in ("size", "time", "accuracy", "curve")
    }
    assert {plot: types[:2] for plot, types in found.items()} == {
        "size": ["log", "log"], "time": ["log", "log"], "accuracy": ["log", "linear"], "curve": ["linear", "linear"],
    }  # fmt: skip
    assert all("both axes logarithmic" in found[plot][2] for plot in ("size", "time"))
    assert "accuracy on a plain one" in found["accuracy"][2]
    assert "both axes plain" in found["curve"][2]


def test_both_schemes_are_what_they_say(browser: Any, folder: Path) -> None:
    def ground() -> float:
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3

    def ink() -> str:
        words: str = browser.execute_script(
            "return getComputedStyle(document.querySelector('#plot-size .xtitle')).fill"
        )
        return words

    open_page(browser, folder, scheme="light")
    assert ground() > 200
    light = ink()
    open_page(browser, folder, scheme="dark")
    assert ground() < 60
    assert ink() != light
    click(browser, "#scheme")  # to light, whatever the system has
    assert ground() > 200
    assert ink() == light
    click(browser, "#scheme")
    assert ground() < 60


def test_methods_have_their_colours(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    colours = {look.name: look.colour for look in looks(["2ssp", "slimgpt", "shortgpt", "evopress"]).values()}
    drawn = {trace["name"]: trace["colour"] for trace in traces(browser, "size")}
    assert {name: drawn[name] for name in colours} == colours


def test_a_method_can_be_switched_off_and_on(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    everywhere = ["#table tr[data-method='window']", "#removed figure[data-method='window']"]
    before = [shown(browser, selector) for selector in everywhere]
    assert before == [3, 3]
    click(browser, "#methods [data-method='window']")
    assert [shown(browser, selector) for selector in everywhere] == [0, 0]
    assert "Sliding window" not in {trace["name"] for trace in traces(browser, "size")}
    click(browser, "#methods [data-method='window']")
    assert [shown(browser, selector) for selector in everywhere] == before
    assert "Sliding window" in {trace["name"] for trace in traces(browser, "size")}


def test_a_size_can_be_switched_off(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    before = next(trace["n"] for trace in traces(browser, "size") if trace["name"] == "2SSP")
    click(browser, "#sizes [data-size='0.5']")
    assert shown(browser, "#table tr[data-size='0.5']") == 0
    assert shown(browser, "#table tr[data-size='0.25']") == 8
    assert shown(browser, ".card") == 2
    after = next(trace["n"] for trace in traces(browser, "size") if trace["name"] == "2SSP")
    assert (before, after) == (3, 2)


def test_with_everything_off_nothing_is_drawn_and_nothing_breaks(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    for size in ("0.25", "0.375", "0.5"):
        click(browser, f"#sizes [data-size='{size}']")
    assert all(traces(browser, plot) == [] for plot in PLOTS)
    assert shown(browser, "#table tbody tr") == 1  # the dense model
    click(browser, "#sizes [data-size='0.25']")
    assert traces(browser, "size")
    assert complaints(browser) == []


def test_the_text_chooses_columns_and_what_is_plotted(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    assert shown(browser, "#table thead [data-text]") == 3
    over_dense = min(traces(browser, "size")[0]["y"])
    click(browser, "#texts [data-text='c4']")
    assert shown(browser, "#table thead [data-text]") == 1
    assert min(traces(browser, "size")[0]["y"]) > 5 * over_dense  # perplexity itself
    click(browser, "#texts [data-text='*']")
    assert shown(browser, "#table thead [data-text]") == 3


def test_headings_sort_and_leave_the_unmeasured_last(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    original = first_column(browser)

    def values() -> list[float | None]:
        found: list[float | None] = browser.execute_script(
            """const place = [...document.querySelectorAll('.main thead th')].findIndex((h) => h.dataset.text === 'c4');
            return [...document.querySelectorAll('.main tbody tr')].map((row) => {
              const sort = row.cells[place]?.dataset.sort; return sort === undefined ? null : Number(sort); });"""
        )
        return found

    for sign in (1, -1):
        click(browser, ".main thead th[data-text='c4'] button")
        known = [value for value in values() if value is not None]
        assert known == sorted(known, reverse=sign < 0)
        assert values()[len(known) :] == [None]
    click(browser, ".main thead th[data-text='c4'] button")
    assert first_column(browser) == original


def test_what_models_and_users_write_is_shown_and_not_run(browser: Any, tmp_path: Path) -> None:
    write_report(evil_folder(tmp_path))
    open_page(browser, tmp_path)
    click(browser, "#texts button:last-of-type")
    browser.execute_script("Plotly.Fx.hover('plot-size', [{ curveNumber: 0, pointNumber: 0 }])")
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('img, .hoverlayer a').length") == 0
    assert "<img src=x" in browser.execute_script("return document.querySelector('#samples').innerText")
    assert complaints(browser) == []


def test_a_page_of_little_has_only_what_there_is(browser: Any, tmp_path: Path) -> None:
    write_report(make_compare_folder(tmp_path, only_perplexity=True, methods=("2ssp", "shortgpt"), change={}))
    open_page(browser, tmp_path)
    assert traces(browser, "size")
    assert [plot for plot in PLOTS if not traces(browser, plot)] == ["accuracy", "inference", "curve"]
    assert shown(browser, "#inference") == 0
    assert complaints(browser) == []
