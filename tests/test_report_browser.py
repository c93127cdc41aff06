"""The pages in a real browser: no complaint on its console, pictures shown, switches that switch, no script runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ablation_folders import CHOICES, make_ablation_folder
from compare_folders import make_compare_folder
from test_ablation import evil_ablation
from test_report_page import evil_folder

from secateur.report.page import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_compare_folder(
        tmp_path_factory.mktemp("compare"), methods=("2ssp", "slicegpt", "shortgpt"), sparsities=(0.25, 0.5)
    )
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    choices = {key: CHOICES[key] for key in (("norm", "2ssp"), ("calibration-size", "slimgpt"))}
    folder = make_ablation_folder(tmp_path_factory.mktemp("ablate"), choices=choices, seeds=(0, 1))
    write_report(folder)
    return folder


def open_page(browser: Any, folder: Path, *, scheme: str = "light", width: int = 1280) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((folder / "report.html").as_uri())


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def requested(browser: Any) -> list[str]:
    """Whatever the page asked for, but for itself and what it holds."""
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]


def click(browser: Any, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def shown(browser: Any, selector: str) -> int:
    count: int = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility()"
        " && getComputedStyle(e).display !== 'none').length",  # of a group in an SVG the former does not tell
        selector,
    )
    return count


@pytest.mark.parametrize("kind", ["folder", "ablation"])
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_pictures_are_shown_without_a_complaint_or_a_request(
    browser: Any, kind: str, scheme: str, width: int, request: pytest.FixtureRequest
) -> None:
    requested(browser)  # forget what was before
    open_page(browser, request.getfixturevalue(kind), scheme=scheme, width=width)
    assert shown(browser, "figure svg[role=img]") == {"folder": 5, "ablation": 2}[kind]
    assert complaints(browser) == []
    assert requested(browser) == []
    wide, seen = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen  # a phone need not scroll sideways, but for tables and pictures in their own frames
    narrow = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('svg')].map((s) => s.clientWidth))"
    )
    assert narrow > 300


def test_both_schemes_are_what_they_say(browser: Any, folder: Path) -> None:
    def light(selector: str, what: str) -> float:
        colour: str = browser.execute_script(
            "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, what
        )
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3

    def ground_and_ink() -> tuple[bool, bool]:
        return light("body", "backgroundColor") > 200, light("#plots svg text", "fill") > 130

    open_page(browser, folder, scheme="light")
    assert ground_and_ink() == (True, False)
    open_page(browser, folder, scheme="dark")
    assert ground_and_ink() == (False, True)
    click(browser, "#scheme")  # to light, whatever the system has
    assert ground_and_ink() == (True, False)
    click(browser, "#scheme")
    assert ground_and_ink() == (False, True)


def test_methods_and_sizes_can_be_switched_off_and_on(browser: Any, folder: Path) -> None:
    open_page(browser, folder)
    of_method = ["#table tr[data-method='shortgpt']", "#plots g[data-method='shortgpt']"]
    of_size = ["#table tr[data-size='0.5']", ".card[data-size='0.5']", "#plots g[data-size='0.5']"]
    before = [shown(browser, selector) for selector in of_method + of_size]
    assert all(before)
    click(browser, "#controls [data-of='method'][value='shortgpt']")
    click(browser, "#controls [data-of='size'][value='0.5']")
    assert [shown(browser, selector) for selector in of_method + of_size] == [0] * 5
    assert shown(browser, "#table tbody tr") == 4  # the dense model, two methods, and what one is matched to
    click(browser, "#controls [data-of='method'][value='shortgpt']")
    click(browser, "#controls [data-of='size'][value='0.5']")
    assert [shown(browser, selector) for selector in of_method + of_size] == before
    assert complaints(browser) == []


@pytest.mark.parametrize(("kind", "column"), [("folder", 5), ("ablation", 2), ("ablation", 6)])
def test_headings_sort_by_number_and_leave_the_unmeasured_last(
    browser: Any, kind: str, column: int, request: pytest.FixtureRequest
) -> None:
    open_page(browser, request.getfixturevalue(kind))

    def values() -> list[float | None]:
        found: list[str | None] = browser.execute_script(
            "return [...document.querySelectorAll('.main tbody tr')].map((r) => r.cells[arguments[0]]?.dataset.sort)",
            column - 1,
        )
        return [None if each is None else float(each) if each.lstrip("-")[0].isdigit() else 1e9 for each in found]

    original = values()
    for sign in (1, -1):
        click(browser, f".main thead th:nth-child({column}) button")
        known = [value for value in values() if value not in (None, 1e9)]
        assert known == sorted(known, reverse=sign < 0)
        if None in original:
            assert values()[-1] is None
    click(browser, f".main thead th:nth-child({column}) button")
    assert values() == original


@pytest.mark.parametrize("evil", [evil_folder, evil_ablation])
def test_what_models_and_users_write_is_shown_and_not_run(browser: Any, tmp_path: Path, evil: Any) -> None:
    write_report(evil(tmp_path))
    open_page(browser, tmp_path)
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert "<img src=x" in browser.execute_script("return document.body.innerText")
    assert complaints(browser) == []
