"""An ablation's page: what it says is what the cells say, and nothing that a user names gets in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ablation_folders import Choices, make_ablation_folder
from test_cli import call
from test_report_page import EVIL, Elements

from secateur.report.ablated_page import ablation_figures, render_ablation
from secateur.report.ablated_plots import save_ablation_plots, ticked
from secateur.report.ablated_words import AblationVerdict, ablation_verdict
from secateur.report.page import write_report
from secateur.report.results_before import read_results

NORM: Choices = {("norm", "2ssp"): ("2ssp.norm", {"l2": 0.32, "l1": 0.22})}
LEVEL: Choices = {("norm", "2ssp"): ("2ssp.norm", {"l2": 0.32, "l1": 0.32})}
SIZES: Choices = {("calibration-size", "2ssp"): ("samples", {"4": 0.4, "32": 0.3, "256": 0.29})}
FEW: dict[str, Any] = {"sparsities": (0.25,), "texts": ("c4",), "tasks": False}


def said_of(folder: Path, choices: Choices, **more: Any) -> AblationVerdict:
    return ablation_verdict(read_results(make_ablation_folder(folder, choices=choices, **{**FEW, **more})))


def page_of(folder: Path) -> str:
    results = read_results(folder)
    return render_ablation(results, ablation_verdict(results), ablation_figures(results))


# --- in words ---


def test_a_better_value_is_named_with_its_size_and_what_carries_it(tmp_path: Path) -> None:
    told = said_of(tmp_path, NORM)
    assert told.headline.startswith("Better than the method's own default, by perplexity: norm l1 of 2SSP (\u2212")
    assert told.said[0].better
    gap = told.said[0].gap
    assert gap is not None
    assert gap.seeds == 3
    assert gap.difference == pytest.approx(-0.095, abs=0.02)  # exp(-0.1)
    assert "Against the default, l2: \u2212" in told.said[0].text
    assert told.said[0].text.endswith("the repeats over seeds carry it.")


def test_what_seeds_do_not_carry_is_no_winner(tmp_path: Path) -> None:
    told = said_of(tmp_path, LEVEL)
    assert told.headline.startswith("By perplexity, no value is told to be better than its method's own default.")
    assert "In 1 of 1 the default is best, or level with the best." in told.headline
    assert "the repeats over seeds do not carry it" in told.said[0].text
    assert any("seeds are few" in caveat for caveat in told.caveats)


def test_of_one_seed_the_paired_interval_decides(tmp_path: Path) -> None:
    told = said_of(tmp_path / "a", NORM, seeds=(0,))
    assert told.said[0].better
    assert "the paired interval carries it, for this one seed" in told.said[0].text
    assert any("Of one seed" in caveat for caveat in told.caveats)
    losses = {"perplexity": 20.0, "nll": 3.0, "samples": 20, "length": 2048, "predictions": 40940}
    bare = {f"norm-{value}-0.25-seed0": {"perplexity": {"c4": losses}} for value in ("l1", "l2")}
    bare["norm-l1-0.25-seed0"] = {"perplexity": {"c4": {**losses, "nll": 2.9}}}  # no windows: no interval
    told = said_of(tmp_path / "b", NORM, seeds=(0,), change=bare)
    assert told.said[0].unsure
    assert not told.said[0].better
    assert "In 0 of 1 the default is best, or level" in told.headline
    assert "not known" in told.said[0].text


def test_the_default_at_its_best_is_said_with_the_next_one(tmp_path: Path) -> None:
    worse: Choices = {("norm", "2ssp"): ("2ssp.norm", {"l2": 0.32, "l1": 0.42})}
    said = said_of(tmp_path, worse).said[0]
    assert said.text.startswith("The default, l2, has the lowest perplexity")
    assert "Next is l1: +" in said.text


def test_a_value_alone_has_its_spread_and_one_without_a_default_no_winner(tmp_path: Path) -> None:
    told = said_of(
        tmp_path,
        {("repeats", "2ssp"): ("", {"as given": 0.3}), ("balance", "2ssp"): ("2ssp.attentions", {"0": 0.3, "1": 0.4})},
    )
    repeats, balance = told.said
    assert re.search(r"as given: 1\.\d+× the dense model's, ± 0\.\d+ over 3 seeds", repeats.text)
    assert "default is not among the values" in balance.text
    assert told.headline.startswith("Nothing can be held against a default")


def test_a_value_alone_stands_beside_the_default_of_another_ablation(tmp_path: Path) -> None:
    only: Choices = {
        ("norm", "2ssp"): ("2ssp.norm", {"l2": 0.32, "l1": 0.31}),
        ("stage1-only", "2ssp"): ("2ssp.stage1_only", {"True": 0.5}),
    }  # fmt: skip
    results = read_results(make_ablation_folder(tmp_path / "a", choices=only, **FEW))
    alone = ablation_verdict(results).said[1]
    assert alone.text.startswith("The default, False, has the lowest perplexity")
    assert "Next is True: +" in alone.text
    plot = ablation_figures(results)["plots"][1]
    assert [(value["shown"], value["default"]) for value in plot["values"]] == [("False", True), ("True", False)]
    norm, stage = (plot["lines"][0]["points"] for plot in ablation_figures(results)["plots"])
    assert stage[0]["y"] == norm[0]["y"]  # it is norm l2's
    assert any("False, is taken from norm" in caveat for caveat in ablation_verdict(results).caveats)
    for file in (results.folder / "cells").glob("norm*/cell.json"):  # not quite the same pruning
        cell = json.loads(file.read_text())
        cell["ablation"]["terms"]["2ssp.alpha"] = 3.0
        file.write_text(json.dumps(cell))
    assert len(ablation_verdict(read_results(results.folder)).said[1].group.values) == 1


def test_a_value_of_another_size_is_not_in_the_running(tmp_path: Path) -> None:
    order: Choices = {("rows-columns", "2ssp"): ("", {"2ssp": 0.32, "published": 0.2, "equal": 0.4})}
    larger = {"achieved": {"blocks": 0.31, "model": 0.2}, "method": "2ssp-inverted"}
    change = {f"rows-columns-published-0.25-seed{seed}": larger for seed in (0, 1, 2)}
    said = said_of(tmp_path, order, change=change).said[0]
    assert said.best is not None
    assert said.best.shown == "2ssp"
    assert "Of another size, hence not in the running: published (31\u00a0% removed)." in said.text


def test_failed_and_missing_cells_are_told(tmp_path: Path) -> None:
    failed = {"status": "failed", "error": "NaN in block 3", "perplexity": {}, "prune": None, "achieved": None}
    told = said_of(
        tmp_path, SIZES, missing=["calibration-size-256-0.25-seed2"],
        change={"calibration-size-4-0.25-seed0": failed},
    )  # fmt: skip
    caveats = " ".join(told.caveats)
    assert "1 of 10 cells is still to come" in told.headline
    assert "NaN in block 3" in caveats
    assert "calibration-size-256-0.25-seed2" in caveats
    assert "left out, whose seeds not all values have: 4. Means are over seeds: 1." in caveats


# --- what is drawn ---


def test_numbers_have_an_axis_and_words_have_places(tmp_path: Path) -> None:
    alpha = {("alpha", "2ssp"): ("2ssp.alpha", {"3.0": 0.4, "0.5": 0.36, "1.5": 0.32})}
    drawn = ablation_figures(read_results(make_ablation_folder(tmp_path, choices={**NORM, **SIZES, **alpha}, **FEW)))
    json.dumps(drawn, allow_nan=False)
    norm, size, alphas = drawn["plots"]
    assert (norm["numbers"], norm["log"]) == (False, False)
    assert [(value["shown"], value["x"]) for value in norm["values"]] == [("l2", 0), ("l1", 1)]
    assert (size["numbers"], size["log"]) == (True, True)  # 4 to 256
    assert [value["default"] for value in size["values"]] == [False, True, False]
    assert (alphas["numbers"], alphas["log"]) == (True, False)  # 0.5 to 3
    assert [value["x"] for value in alphas["values"]] == [0.5, 1.5, 3.0]
    for plot in drawn["plots"]:
        for point in plot["lines"][0]["points"]:
            y = point["y"]["perplexity:c4"]
            assert min(y["each"].values()) < y["mean"] < max(y["each"].values())
            assert y["sd"] > 0


def test_the_default_is_among_the_ticks() -> None:
    values = [{"shown": str(n), "x": n, "default": n == 5} for n in range(31)]
    assert len(ticked(values)) <= 10
    assert values[5] in ticked(values)


@pytest.mark.slow
def test_every_ablation_has_its_plots_by_all_measures(tmp_path: Path) -> None:
    few = {**FEW, "tasks": True}
    results = read_results(
        make_ablation_folder(tmp_path, choices={**SIZES, ("repeats", "2ssp"): ("", {"x": 1})}, **few)
    )
    written = save_ablation_plots(results, ablation_figures(results), tmp_path / "plots")
    names = ("ablation-calibration-size-2ssp", "ablation-repeats-2ssp")
    assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    svg = written[1].read_text()
    for label in ("perplexity over dense", "perplexity, c4", "mean acc", "default", "256"):
        assert f">{label}</text>" in svg, label


# --- the page ---


def test_the_page_has_the_table_the_command_and_no_address(tmp_path: Path) -> None:
    html = page_of(make_ablation_folder(tmp_path, choices=NORM, **FEW))
    table = html.split('id="table"')[1]
    assert re.search(r'data-sort="l2">l2 <span class="tag">default</span>', table)
    assert re.search(r'<td class="n best"[^>]*>\u2212\d+\.\d\d\u00a0% ± \d\.\d\d<', table)
    assert "<code>secateur ablate demo" in html
    for tag, attributes in Elements(html).found:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)


def evil_ablation(folder: Path) -> Path:
    """Every name that a user can choose."""
    make_ablation_folder(folder, choices=NORM, name=EVIL, **{**FEW, "seeds": (0,)})
    for file in (folder / "cells").glob("norm*/cell.json"):
        cell = json.loads(file.read_text())
        cell["ablation"] |= {"what": EVIL, "value": EVIL + cell["ablation"]["value"]}
        file.write_text(json.dumps(cell))
    return folder


def test_what_users_name_stays_text(tmp_path: Path) -> None:
    folder = evil_ablation(tmp_path)
    html = page_of(folder)
    elements = Elements(html)
    assert len(elements.scripts()) == 3
    assert not [tag for tag, attributes in elements.found if tag == "img" or "onerror" in attributes]
    assert html.count("&lt;img src=x onerror=") > 5
    assert re.fullmatch(r"[A-Za-z0-9._-]+", ablation_figures(read_results(folder))["plots"][0]["name"])


def test_a_folder_without_a_finished_cell_makes_a_page_too(tmp_path: Path) -> None:
    about = {"schema": 1, "kind": "ablate", "model": {"name": "m"}, "cells": ["dense", "norm-l1-0.5-seed0"]}
    (tmp_path / "compare.json").write_text(json.dumps(about))
    said = write_report(tmp_path)
    assert said.headline.startswith("No verdict: nothing was measured yet. 2 of 2 cells")
    assert (tmp_path / "report.html").is_file()
    assert list((tmp_path / "plots").iterdir()) == []


@pytest.mark.slow
def test_the_command_makes_the_page_of_an_ablation(tmp_path: Path) -> None:
    folder = make_ablation_folder(tmp_path / "x", choices=NORM, **FEW)
    told = call("report", folder)
    assert told.code == 0, told.err
    assert told.out.startswith("Better than the method's own default")
    assert "norm, 2SSP at 25" in told.out
    assert (folder / "plots" / "ablation-norm-2ssp.svg").is_file()
