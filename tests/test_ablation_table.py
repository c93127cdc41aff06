"""An ablation's table: values are paired with the default seed by seed, and no mean is over other draws than its row's
neighbours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import pytest
from ablation_folders import Choices, ablation_cells
from msgspec import to_builtins
from secateur.grid.ablation_table import ablation_table
from secateur.grid.render import as_json, comma_separated, latex, markdown
from secateur.report.ablated import own_default
from studies import Loads

from secateur.grid.ablate import NOTHING, ORDER, TEXT, WHATS, Ablation
from secateur.judge.statistics import interval_of_mean, paired_bootstrap
from secateur.methods import get_method
from secateur.model.handle import Model

NORM: Choices = {("norm", "2ssp"): ("2ssp.norm", {"l2": 0.32, "l1": 0.30})}
PPL, AGAINST = "perplexity:c4", "against:perplexity:c4"


@pytest.fixture(scope="module")
def model() -> Model:
    return Loads()()


def cells_of(choices: Choices = NORM, **more: Any) -> dict[str, dict[str, Any]]:
    return {cell["name"]: cell for cell in ablation_cells(choices, **more)}


def rows_of(cells: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(row["what"], row["method"], row["value"]): row for row in ablation_table(cells).rows}


def loss(cell: Mapping[str, Any]) -> float:
    return float(cell["perplexity"]["c4"]["nll"])


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
    assert f"| {shown} |" in markdown(ablation_table(cells))


def test_one_seed_has_the_paired_interval_over_windows() -> None:
    cells = cells_of(seeds=(0,))
    row = rows_of(cells)["norm", "2ssp", "l1"]
    ours, theirs = (cells[f"norm-{v}-0.25-seed0"]["perplexity"]["c4"] for v in ("l1", "l2"))
    wanted = paired_bootstrap(ours["window_nll"], theirs["window_nll"], ours["window_predictions"])
    edges = [math.expm1(wanted[key]) for key in ("difference", "low", "high")]
    assert [row[AGAINST], row[f"{AGAINST}:low"], row[f"{AGAINST}:high"]] == pytest.approx(edges)
    assert row[f"{AGAINST}:sd"] is None
    low, high = (f"{100 * edge:+.2f}" for edge in edges[1:])
    assert row[f"{AGAINST}:shown"].endswith(f"({low} to {high})")


def test_means_are_over_the_seeds_that_all_values_have_and_the_note_counts_the_others() -> None:
    cells = cells_of()
    failed = {"status": "failed", "error": "NaN", "perplexity": {}, "tasks": {}, "prune": None, "achieved": None}
    cells["norm-l2-0.25-seed1"] |= failed
    table = ablation_table(cells)
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


def test_methods_are_groups_of_their_own_and_nothing_is_bold() -> None:
    sizes = {"16": 0.40, "32": 0.33, "256": 0.31}
    cells = cells_of(
        {("calibration-size", of): ("samples", sizes) for of in ("2ssp", "slimgpt")}, seeds=(0, 1), noise=0.001
    )
    del cells["slimgpt-calibration-size-256-0.25-seed1"]
    table = ablation_table(cells)
    rows = {(row["method"], row["value"]): row for row in table.rows}
    assert len({row["group"] for row in table.rows}) == 3
    assert [rows[of, "32"]["seeds"] for of in ("2ssp", "slimgpt")] == [2, 1]
    defaults = [key for key, row in rows.items() if row.get(f"{AGAINST}:shown") == "default"]
    assert defaults == [("2ssp", "32"), ("slimgpt", "256")]  # each method's own
    assert "**" not in markdown(table)
    assert r"\textbf" not in latex(table, caption="c")
    assert {column["better"] for column in as_json(table)["columns"]} == {None}
    assert AGAINST in comma_separated(table).splitlines()[0].split(",")


def test_without_the_default_among_the_values_the_column_is_empty() -> None:
    for choices in (
        {("alpha", "2ssp"): ("2ssp.alpha", {"0.5": 0.3, "3.0": 0.4})},
        {("balance", "2ssp"): ("2ssp.attentions", {"0": 0.3, "1": 0.4})},  # by itself the budget decides
    ):
        rows = ablation_table(cells_of(choices)).rows
        assert {row.get(f"{AGAINST}:shown") for row in rows} == {None}
        assert all(row[PPL] for row in rows)


@pytest.mark.parametrize("name", WHATS)
def test_the_default_is_the_methods_own(name: str, model: Model) -> None:
    what, values = WHATS[name], {"calibration-length": ("16", "32")}.get(name, ())
    cells = Ablation(what=(name,), values=values, sparsities=(0.25,), length=16).cells(model)[1:]
    found = {own_default(to_builtins(cell.ablation)) for cell in cells}
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
    told = ablation_cells(NORM, seeds=(0,))[1]["ablation"]
    assert own_default(told) == "l2"
    lacking = {name: value for name, value in told["terms"].items() if name not in ("samples", "length", "2ssp.norm")}
    assert own_default({**told, "terms": lacking, "value": "32"}) is None  # of samples, or of length?
    assert own_default({**told, "of": "of-another-package"}) is None


def test_the_interval_of_a_mean_is_students() -> None:
    assert interval_of_mean([1.0]) is None
    assert interval_of_mean([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    low, high = interval_of_mean([0.0, 1.0] * 20) or (0, 0)
    assert 0.3 < low < 0.5 < high < 0.7
