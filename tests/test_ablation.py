"""An ablation: values are paired with the default seed by seed, no mean is over other draws than its neighbours', and
page, pictures and words say what the cells say."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ablation_folders import Choices, ablation_cells, make_ablation_folder
from msgspec import convert, structs
from studies import Loads
from test_cli import call
from test_report_page import EVIL, Elements

from secateur.grid.ablate import NOTHING, ORDER, TEXT, WHATS, Ablation
from secateur.judge.statistics import interval_of_mean, stratified_bootstrap
from secateur.methods import get_method
from secateur.model.handle import Model
from secateur.report.ablation import ablation_table, groups, own_default, short_ablation_table
from secateur.report.ablation_figures import Places, ablation_figures, places, ticked, together
from secateur.report.ablation_verdict import AblationVerdict, ablation_verdict
from secateur.report.comparing import losses
from secateur.report.drawing import save
from secateur.report.looks import number
from secateur.report.page import render, write_report
from secateur.report.results import AblationTerms, CellResult, Index, ModelFacts, Results, read_results
from secateur.report.table import Table, as_json, comma_separated, markdown

NORM: Choices = {("norm", "2ssp"): ("2ssp.norm", {"l2": 0.32, "l1": 0.22})}
LEVEL: Choices = {("norm", "2ssp"): ("2ssp.norm", {"l2": 0.32, "l1": 0.32})}
SIZES: Choices = {("calibration-size", "2ssp"): ("samples", {"4": 0.4, "32": 0.3, "256": 0.29})}
FEW: dict[str, Any] = {"sparsities": (0.25,), "texts": ("c4",), "tasks": False}
PPL, AGAINST = "perplexity:c4", "against:perplexity:c4"


@pytest.fixture(scope="module")
def model() -> Model:
    return Loads()()


def cells_of(choices: Choices = NORM, **more: Any) -> dict[str, dict[str, Any]]:
    return {cell["name"]: cell for cell in ablation_cells(choices, **more)}


def results_of(cells: Mapping[str, Mapping[str, Any]]) -> Results:
    made = convert(list(cells.values()), tuple[CellResult, ...])
    return Results(Index(model=ModelFacts(name="m"), cells=list(cells)), made)


def table_of(cells: Mapping[str, Mapping[str, Any]]) -> Table:
    results = results_of(cells)
    return ablation_table(results, groups(results))


def rows_of(cells: Mapping[str, Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    return {(row["what"], row["method"], row["value"]): row for row in table_of(cells).rows}


def loss(cell: Mapping[str, Any]) -> float:
    return float(cell["perplexity"]["c4"]["nll"])


def said_of(folder: Path, choices: Choices, **more: Any) -> AblationVerdict:
    return ablation_verdict(read_results(make_ablation_folder(folder, choices=choices, **{**FEW, **more})))


def page_of(folder: Path) -> str:
    results = read_results(folder)
    return render(results, ablation_verdict(results), {})


# --- the table ---


@pytest.mark.parametrize(("harm", "apart"), [(0.22, True), (0.32, False)])
def test_the_short_table_has_the_means_and_bold_is_what_differs_from_the_default(harm: float, apart: bool) -> None:
    results = results_of(cells_of({("norm", "2ssp"): ("2ssp.norm", {"l2": 0.32, "l1": harm})}))
    short, whole = (
        short_ablation_table(results, groups(results), losses(results, "c4")),
        ablation_table(results, groups(results)),
    )
    means = {row["value"]: row[PPL] for row in whole.rows}
    assert [row["value"] for row in short.rows] == ["l2 (default)", "l1"]
    for row, value in zip(short.rows, ("l2", "l1"), strict=True):
        assert str(row["size:0.25"]).startswith(f"{number(means[value])} ± ")
    assert short.bold["size:0.25"] == [1] * apart


def test_the_short_table_tells_methods_apart() -> None:
    values = "2ssp.norm", {"l2": 0.32, "l1": 0.22}
    results = results_of(cells_of({("norm", "2ssp"): values, ("norm", "slimgpt"): values}))
    rows = short_ablation_table(results, groups(results), losses(results, "c4")).rows
    assert len({(row["what"], row["value"]) for row in rows}) == len(rows) == 4


def test_a_value_is_held_against_the_default_seed_by_seed() -> None:
    """What a draw does to all values alike is no spread of the difference."""
    seeds = range(8)
    cells = cells_of(seeds=seeds, windows=200)
    rows = rows_of(cells)
    row = rows["norm", "2ssp", "l1"]
    relative = [math.expm1(loss(cells[f"norm-l1-0.25-seed{s}"]) - loss(cells[f"norm-l2-0.25-seed{s}"])) for s in seeds]
    assert row[AGAINST] == pytest.approx(statistics.fmean(relative))
    assert row[f"{AGAINST}:sd"] == pytest.approx(statistics.stdev(relative))
    assert row[f"{AGAINST}:sd"] < 0.6 * row[f"{PPL}:sd"] / row[PPL]
    assert (row[f"{AGAINST}:low"], row[f"{AGAINST}:high"]) == pytest.approx(interval_of_mean(relative))
    assert row["against:accuracy"] == pytest.approx(row["task_average"] - rows["norm", "2ssp", "l2"]["task_average"])
    default = rows["norm", "2ssp", "l2"]
    assert (default[f"{AGAINST}:shown"], default.get(AGAINST)) == ("default", None)
    shown = f"{100 * row[AGAINST]:+.2f}% ± {100 * row[f'{AGAINST}:sd']:.2f}"
    assert f"| **{shown}** |" in markdown(table_of(cells))


def test_one_seed_has_the_paired_interval_over_windows() -> None:
    cells = cells_of(seeds=(0,))
    row = rows_of(cells)["norm", "2ssp", "l1"]
    ours, theirs = (cells[f"norm-{v}-0.25-seed0"]["perplexity"]["c4"] for v in ("l1", "l2"))
    wanted = stratified_bootstrap([(ours["window_nll"], theirs["window_nll"], ours["window_predictions"])])
    edges = [math.expm1(wanted[key]) for key in ("difference", "low", "high")]
    assert [row[AGAINST], row[f"{AGAINST}:low"], row[f"{AGAINST}:high"]] == pytest.approx(edges)
    assert row[f"{AGAINST}:sd"] is None
    low, high = (f"{100 * edge:+.2f}" for edge in edges[1:])
    assert row[f"{AGAINST}:shown"].endswith(f"({low} to {high})")


def test_means_are_over_the_seeds_that_all_values_have_and_the_note_counts_the_others() -> None:
    cells = cells_of()
    failed = {"status": "failed", "error": "NaN", "perplexity": {}, "tasks": {}, "prune": None, "achieved": None}
    cells["norm-l2-0.25-seed1"] |= failed
    table = table_of(cells)
    rows = {row["value"]: row for row in table.rows}
    for value in ("l2", "l1"):
        two = [cells[f"norm-{value}-0.25-seed{seed}"]["perplexity"]["c4"]["perplexity"] for seed in (0, 2)]
        assert rows[value][PPL] == pytest.approx(statistics.fmean(two))
        assert rows[value]["seeds"] == 2
    assert (rows["l2"]["failed"], rows["l1"]["failed"]) == (1, 0)
    assert [note for note in table.notes if "left out" in note] == [
        "norm of 2ssp at 25\u00a0%: finished cells left out, whose seeds not all values have: 1. "
        "Means are over seeds: 0 and 2."
    ]


def test_a_value_that_always_failed_takes_no_seed_from_the_others() -> None:
    cells = cells_of()
    for seed in (0, 1, 2):
        cells[f"norm-l2-0.25-seed{seed}"] |= {"status": "failed", "error": "NaN", "perplexity": {}, "prune": None}
    rows = rows_of(cells)
    assert rows["norm", "2ssp", "l1"]["seeds"] == 3
    assert rows["norm", "2ssp", "l1"][PPL] > 1
    assert rows["norm", "2ssp", "l1"][f"{AGAINST}:shown"] is None  # there is nothing to hold it against
    assert rows["norm", "2ssp", "l2"][PPL] is None


def test_methods_are_groups_of_their_own_and_no_mean_is_bold() -> None:
    sizes = {"16": 0.40, "32": 0.33, "256": 0.31}
    cells = cells_of(
        {("calibration-size", of): ("samples", sizes) for of in ("2ssp", "slimgpt")}, seeds=(0, 1), noise=0.001
    )
    del cells["slimgpt-calibration-size-256-0.25-seed1"]
    table = table_of(cells)
    results = results_of(cells)
    assert "over 1 to 2 draws" in short_ablation_table(results, groups(results), losses(results, "c4")).notes[0]
    rows = {(row["method"], row["value"]): row for row in table.rows}
    assert len({row["group"] for row in table.rows}) == 3
    assert [rows[of, "32"]["seeds"] for of in ("2ssp", "slimgpt")] == [2, 1]
    defaults = [key for key, row in rows.items() if row.get(f"{AGAINST}:shown") == "default"]
    assert defaults == [("2ssp", "32"), ("slimgpt", "256")]  # each method's own
    assert set(table.bold) == {f"{key}:shown" for key in (AGAINST, "against:*", "against:accuracy")}
    marked = {table.rows[n]["value"] for places in table.bold.values() for n in places}
    assert marked == {"16"}  # two seeds do not tell the lowest mean, 256's, from the default's
    assert {column["better"] for column in as_json(table)["columns"]} == {None}
    assert AGAINST in comma_separated(table).splitlines()[0].split(",")


def test_without_the_default_among_the_values_the_column_is_empty() -> None:
    for choices in (
        {("alpha", "2ssp"): ("2ssp.alpha", {"0.5": 0.3, "3.0": 0.4})},
        {("balance", "2ssp"): ("2ssp.attentions", {"0": 0.3, "1": 0.4})},  # by itself the budget decides
    ):
        rows = table_of(cells_of(choices)).rows
        assert {row.get(f"{AGAINST}:shown") for row in rows} == {None}
        assert all(row[PPL] for row in rows)


@pytest.mark.parametrize("name", WHATS)
def test_the_default_is_the_methods_own(name: str, model: Model) -> None:
    what, values = WHATS[name], {"calibration-length": ("16", "32")}.get(name, ())
    cells = Ablation(what=(name,), values=values, sparsities=(0.25,), length=16).cells(model)[1:]
    found = {own_default(cell.ablation) for cell in cells if cell.ablation}
    method = get_method(what.method)
    if what.varies in ("samples", "length"):
        assert found == {str(getattr(method, what.varies))}
    elif what.varies in (NOTHING, ORDER):
        assert found == {method.name}
    elif what.varies == TEXT:
        assert found == {"c4"}
    else:
        own = method.options[what.varies].default
        assert found == {None if own is None else str(own)}
    if name not in ("balance", "calibration-length", "repeats"):
        assert found <= {cell.ablation.value for cell in cells if cell.ablation}


def test_no_default_is_guessed_of_cells_of_another_version_or_method() -> None:
    told = convert(ablation_cells(NORM, seeds=(0,))[1]["ablation"], AblationTerms)
    assert own_default(told) == "l2"
    lacking = {name: value for name, value in told.terms.items() if name not in ("samples", "length", "2ssp.norm")}
    assert own_default(structs.replace(told, terms=lacking, value="32")) is None  # of samples, or of length?
    assert own_default(structs.replace(told, of="of-another-package")) is None


def test_the_interval_of_a_mean_is_students() -> None:
    assert interval_of_mean([1.0]) is None
    assert interval_of_mean([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    low, high = interval_of_mean([0.0, 1.0] * 20) or (0, 0)
    assert 0.3 < low < 0.5 < high < 0.7


# --- in words ---


def test_a_better_value_is_named_with_its_size_and_what_carries_it(tmp_path: Path) -> None:
    told = said_of(tmp_path, NORM)
    assert told.headline.startswith("Better than the method's own default, by perplexity: norm l1 of 2SSP (\u2212")
    assert told.findings[0].better
    gap = told.findings[0].gap
    assert gap is not None
    assert gap.seeds == 3
    assert gap.difference == pytest.approx(-0.095, abs=0.02)  # exp(-0.1)
    assert "Against the default, l2: \u2212" in told.findings[0].text
    assert told.findings[0].text.endswith("the repeats over seeds carry it.")


def test_what_seeds_do_not_carry_is_no_winner(tmp_path: Path) -> None:
    told = said_of(tmp_path, LEVEL)
    assert told.headline.startswith("By perplexity, no value is told to be better than its method's own default.")
    assert "In 1 of 1 the default is best, or level with the best." in told.headline
    assert "the repeats over seeds do not carry it" in told.findings[0].text
    assert any("seeds are few" in caveat for caveat in told.caveats)


def test_of_one_seed_the_paired_interval_decides(tmp_path: Path) -> None:
    told = said_of(tmp_path / "a", NORM, seeds=(0,))
    assert told.findings[0].better
    assert "the paired interval carries it, for this one seed" in told.findings[0].text
    assert any("Of one seed" in caveat for caveat in told.caveats)
    losses = {"perplexity": 20.0, "nll": 3.0, "samples": 20, "length": 2048, "predictions": 40940}
    bare = {f"norm-{value}-0.25-seed0": {"perplexity": {"c4": losses}} for value in ("l1", "l2")}
    bare["norm-l1-0.25-seed0"] = {"perplexity": {"c4": {**losses, "nll": 2.9}}}  # no windows: no interval
    told = said_of(tmp_path / "b", NORM, seeds=(0,), change=bare)
    assert told.findings[0].unsure
    assert not told.findings[0].better
    assert "In 0 of 1 the default is best, or level" in told.headline
    assert "not known" in told.findings[0].text


def test_the_default_at_its_best_is_said_with_the_next_one(tmp_path: Path) -> None:
    worse: Choices = {("norm", "2ssp"): ("2ssp.norm", {"l2": 0.32, "l1": 0.42})}
    said = said_of(tmp_path, worse).findings[0]
    assert said.text.startswith("The default, l2, has the lowest perplexity")
    assert "Next is l1: +" in said.text


def test_a_value_alone_has_its_spread_and_one_without_a_default_no_winner(tmp_path: Path) -> None:
    told = said_of(
        tmp_path,
        {("repeats", "2ssp"): ("", {"as given": 0.3}), ("balance", "2ssp"): ("2ssp.attentions", {"0": 0.3, "1": 0.4})},
    )
    repeats, balance = told.findings
    assert re.search(r"as given: 1\.\d+× the dense model's, ± 0\.\d+ over 3 seeds", repeats.text)
    assert "default is not among the values" in balance.text
    assert told.headline.startswith("Nothing can be held against a default")


def test_a_value_of_another_size_is_not_in_the_running(tmp_path: Path) -> None:
    order: Choices = {("rows-columns", "2ssp"): ("", {"2ssp": 0.32, "published": 0.2, "equal": 0.4})}
    larger = {"achieved": {"blocks": 0.31, "model": 0.2}, "method": "2ssp-inverted"}
    change = {f"rows-columns-published-0.25-seed{seed}": larger for seed in (0, 1, 2)}
    said = said_of(tmp_path, order, change=change).findings[0]
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


# --- pictures ---


def test_numbers_have_an_axis_and_words_have_places(tmp_path: Path) -> None:
    alpha = {("alpha", "2ssp"): ("2ssp.alpha", {"3.0": 0.4, "0.5": 0.36, "1.5": 0.32})}
    results = read_results(make_ablation_folder(tmp_path, choices={**NORM, **SIZES, **alpha}, **FEW))
    norm, size, alphas = (places(some) for some in together(results).values())
    assert (norm, norm.log) == (Places(("l2", "l1"), (0, 1), False, "l2"), False)
    assert (size, size.log) == (Places(("4", "32", "256"), (4, 32, 256), True, "32"), True)
    assert (alphas, alphas.log) == (Places(("0.5", "1.5", "3.0"), (0.5, 1.5, 3.0), True, "1.5"), False)


def test_the_default_is_among_the_ticks() -> None:
    where = Places(tuple(map(str, range(31))), tuple(map(float, range(31))), True, "5")
    assert len(ticked(where)) <= 10
    assert 5 in ticked(where)


@pytest.mark.slow
def test_a_picture_has_a_panel_per_measure_and_says_each_mean(tmp_path: Path) -> None:
    few = {**FEW, "tasks": True, "texts": ("c4", "wikitext2")}  # of one text there is no panel of all texts
    results = read_results(make_ablation_folder(tmp_path, choices=SIZES, **few))
    (svg,) = save(ablation_figures(results), tmp_path / "plots").values()
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        f"ablation-calibration-size-2ssp.{kind}" for kind in ("png", "svg")
    }
    for label in ("perplexity over dense", "perplexity, c4", "mean acc", "default", "256"):
        assert f">{label}</text>" in svg, label
    said = re.findall(r'data-size="0.25"><title>([^<]*)</title>', svg)
    assert len(said) == 3 * 4  # values and measures
    row = next(row for row in ablation_table(results, groups(results)).rows if row["value"] == "4")
    assert any(re.fullmatch(rf"4, 25.% removed: perplexity, c4 {row[PPL]:.1f} ± .* over 3 seeds; against the default: "
                            r".*", each) for each in said)  # fmt: skip


# --- the page ---


def test_the_page_has_the_table_the_command_and_no_address(tmp_path: Path) -> None:
    html = page_of(make_ablation_folder(tmp_path, choices=NORM, **FEW))
    table = html.split('id="table"')[1]
    assert re.search(r'data-sort="l2">l2 <span class="tag">default</span>', table)
    assert re.search(r'<td class="n best" data-sort="-0\.[^>]*>−\d+\.\d\d % ± \d\.\d\d<', table)
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
    write_report(evil_ablation(tmp_path))
    html = (tmp_path / "report.html").read_text()
    elements = Elements(html)
    assert len(elements.scripts()) == 1
    assert not [tag for tag, attributes in elements.found if tag == "img" or "onerror" in attributes]
    assert html.count("&lt;img src=x onerror=") > 5
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) for path in (tmp_path / "plots").iterdir())


def test_a_folder_without_a_finished_cell_makes_a_page_too(tmp_path: Path) -> None:
    about = {"schema": 1, "kind": "ablate", "model": {"name": "m"}, "cells": ["dense", "norm-l1-0.5-seed0"]}
    (tmp_path / "compare.json").write_text(json.dumps(about))
    told = call("report", tmp_path)
    assert told.code == 0, told.err
    assert told.out.startswith("No verdict: nothing was measured yet. 2 of 2 cells")
    assert (tmp_path / "report.html").is_file()
    assert list((tmp_path / "plots").iterdir()) == []
