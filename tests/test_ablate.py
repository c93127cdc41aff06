"""Ablations: the grids of both papers, spread over seeds, and what the inverted order really removes."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles import write_texts
from studies import Loads, grid

from secateur.errors import InvalidOptionError, OutputExistsError, UnknownNameError
from secateur.grid import Ablation, Comparison, ablate, compare
from secateur.grid.ablate import NOTHING, ORDER, TEXT, WHATS
from secateur.grid.asked import WINDOWS
from secateur.grid.cells import Cell
from secateur.methods import get_method


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))[0]


def asked(text: Path, *what: str, **more: Any) -> Ablation:
    settings = {"sparsities": (0.25,), "seeds": (0, 3), "calibration": str(text), "samples": 2, "length": 24, **more}
    return Ablation(what=what, **settings)


@pytest.mark.slow
def test_a_row_is_the_mean_over_seeds_with_its_spread(text: Path, tmp_path: Path) -> None:
    cells = ablate(asked(text, "norm", seeds=(0, 3, 5)), grid(tmp_path / "out", text))
    assert len(cells) == 1 + 2 * 3
    told = json.loads((tmp_path / "out/ablation-table.json").read_text())
    rows = {(row["what"], row["value"]): row for row in told["rows"]}
    assert list(rows) == [("dense", ""), ("norm", "l2"), ("norm", "l1")]
    for value in ("l2", "l1"):
        row = rows["norm", value]
        ours = [cells[f"norm-{value}-0.25-seed{seed}"].perplexity["plain.txt"].perplexity for seed in (0, 3, 5)]
        assert len(set(ours)) == 3  # other windows, other neurons
        assert row["perplexity:plain.txt"] == pytest.approx(statistics.fmean(ours))
        assert row["perplexity:plain.txt:sd"] == pytest.approx(statistics.stdev(ours))
        assert (row["seeds"], row["failed"]) == (3, 0)
    assert rows["dense", ""]["perplexity:plain.txt:sd"] is None
    assert " ± " in (tmp_path / "out/ablation-table.md").read_text()


def test_the_inverted_order_removes_more_than_asked_and_is_judged_at_equal_size_too(text: Path, tmp_path: Path) -> None:
    cells = ablate(asked(text, "rows-columns", seeds=(0,)), grid(tmp_path / "out", text))
    by_value = {cell.ablation.value: cell for cell in cells.values() if cell.ablation}
    published, equal, matched = (by_value[value] for value in ("published", "equal", "2ssp-matched"))
    assert published.removed > 0.3
    assert equal.removed == pytest.approx(0.25, abs=0.02)
    assert matched.sparsity == published.removed
    assert matched.removed == pytest.approx(published.removed, abs=0.02)
    over = published.removed - 0.25
    assert f"{over:+.2%} against what was asked" in (tmp_path / "out/ablation-table.md").read_text()
    assert "In memory only" in published.notes["inverted"]


def test_what_is_matched_comes_before_what_matches_it(text: Path) -> None:
    matched, published = "2ssp-matched", "published"
    cells = asked(text, "rows-columns", seeds=(0,), values=(matched, published)).cells(Loads()())
    assert [cell.ablation.value for cell in cells if cell.ablation] == [published, matched]


@pytest.mark.slow
def test_the_inverted_order_has_the_alpha_that_was_given(text: Path, tmp_path: Path) -> None:
    gone = {}
    for alpha in (0.5, 3.0):
        wanted = asked(text, "rows-columns", seeds=(0,), values=("2ssp", "equal"), options={"2ssp": {"alpha": alpha}})
        cells = ablate(wanted, grid(tmp_path / str(alpha), text))
        ours, theirs = (cells[f"rows-columns-{value}-0.25-seed0"] for value in ("2ssp", "equal"))
        assert ours.options["alpha"] == theirs.options["alpha"] == alpha
        counts = [sum(not block.attention for block in cell.shape or ()) for cell in (ours, theirs)]
        assert counts[0] == counts[1]
        assert theirs.removed == pytest.approx(0.25, abs=0.02)
        gone[alpha] = counts[1]
    assert gone[0.5] < gone[3.0]


SOME_VALUES = {"calibration-size": ("2", "4"), "calibration-length": ("8", "16"), "groups": ("released", "paper")}
INVERTED = "2ssp-inverted"


@pytest.mark.slow
@pytest.mark.parametrize("name", WHATS)
def test_every_ablation_runs_and_says_what_was_asked_and_achieved(name: str, text: Path, tmp_path: Path) -> None:
    values = SOME_VALUES.get(name, ())
    if name == "calibration-source":
        values = (str(text), str(write_texts(tmp_path)[1]))
    options = {"secateur": {"search_samples": 1}} if "searched" in WHATS[name].values else {}  # of two windows
    wanted = asked(text, name, seeds=(0, 3), values=values, options=options)
    cells = ablate(wanted, grid(tmp_path / "out", text))
    assert {cell.status for cell in cells.values()} == {"done"}, [cell.error for cell in cells.values()]
    rows = json.loads((tmp_path / "out/ablation-table.json").read_text())["rows"][1:]
    assert len(rows) == len(values or WHATS[name].values or (0, 1, 2))
    for row in rows:
        assert (row["what"], row["sparsity"], row["seeds"], row["failed"]) == (name, 0.25, 2, 0)
        more = "published" in row["value"] or "matched" in row["value"]  # what the published variant really removes
        assert row["achieved"] == pytest.approx(0.25, abs=0.2 if more else 0.04)
        assert row["perplexity:plain.txt"] > 1
        assert row["perplexity:plain.txt:sd"] >= 0
        assert row["method"] == (INVERTED if row["value"] in ("published", "equal") else WHATS[name].method)


def test_the_same_pruning_in_two_ablations_is_made_once(text: Path, tmp_path: Path) -> None:
    cells = ablate(asked(text, "norm", "stage1-only", seeds=(0,)), grid(tmp_path / "out", text))
    assert cells["stage1-only-False-0.25-seed0"].same_as == "norm-l2-0.25-seed0"
    assert not cells["stage1-only-True-0.25-seed0"].same_as
    later = ablate(asked(text, "alpha", seeds=(0,), values=("1.5",)), grid(tmp_path / "out", text))
    assert later["alpha-1.5-0.25-seed0"].same_as == "norm-l2-0.25-seed0"  # of an earlier run in the folder


def cells_of(text: Path, what: str, **more: Any) -> list[Cell]:
    return asked(text, what, **{"seeds": (0,), **more}).cells(Loads()())[1:]


def test_repeats_are_of_any_method(text: Path) -> None:
    cells = cells_of(text, "repeats", seeds=(0, 1, 2), method="shortgpt")
    assert [cell.name for cell in cells] == [f"shortgpt-repeats-as_given-0.25-seed{seed}" for seed in range(3)]
    assert {cell.method for cell in cells} == {"shortgpt"}
    assert [cell.calibration.seed for cell in cells if cell.calibration] == [0, 1, 2]


def test_calibration_is_varied_by_size_length_and_source(text: Path) -> None:
    for what, more, shapes in (
        ("size", {"values": ("2", "4")}, [("2ssp", 2, 24), ("2ssp", 4, 24)]),
        ("size", {"values": ("4",), "method": "slimgpt"}, [("slimgpt", 4, 24)]),
        ("length", {"values": ("8", "16"), "samples": 3}, [("slimgpt", 3, 8), ("slimgpt", 3, 16)]),
    ):
        cells = [(cell.method, cell.calibration) for cell in cells_of(text, f"calibration-{what}", **more)]
        assert [(method, tokens.samples, tokens.length) for method, tokens in cells if tokens] == shapes
    sources = cells_of(text, "calibration-source", values=(str(text), "c4"))
    assert [cell.calibration.text for cell in sources if cell.calibration] == [str(text), "c4"]
    assert [cell.name for cell in sources] == [f"calibration-source-{t}-0.25-seed0" for t in ("plain.txt", "c4")]


def test_the_balance_is_swept_over_every_feasible_number(text: Path) -> None:
    for values, counts in (((), [0, 1, 2]), (("1", "4"), [1, 4])):  # three of four weigh more than a quarter
        assert [cell.options["attentions"] for cell in cells_of(text, "balance", values=values)] == counts


@pytest.mark.parametrize("name", WHATS)
def test_every_ablation_is_of_options_that_its_method_has_and_begins_with_what_is_normal(name: str) -> None:
    what = WHATS[name]
    method = get_method(what.method)
    if what.varies in (TEXT, ORDER, NOTHING, *WINDOWS):
        return
    option = method.options[what.varies]
    assert all(option.accepts(value) for value in what.values)
    assert not what.values or option.default in what.values
    assert {option.parse(str(value)) for value in what.values} == set(what.values)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"what": ("nrom",)}, UnknownNameError),
        ({"what": ("norm", "alpha"), "values": ("l1",)}, InvalidOptionError),
        ({"what": ("norm",), "values": ("l3",)}, InvalidOptionError),
        ({"what": ("rows-columns",), "values": ("both",)}, InvalidOptionError),
        ({"what": ("rows-columns",), "values": ("2ssp", "2ssp-matched")}, InvalidOptionError),
        ({"what": ("norm",), "method": "slimgpt"}, InvalidOptionError),
        ({"what": ("repeats",), "values": ("l1",)}, InvalidOptionError),
        ({"what": ("rows-columns",), "options": {"2ssp": {"norm": "l1"}}}, InvalidOptionError),  # alpha is honoured
        ({"what": ("rows-columns",), "options": {"2ssp": {"attentions": 1}}}, InvalidOptionError),
        ({"what": ("norm",), "seeds": (1, 1)}, InvalidOptionError),
        ({"what": ("balance",), "sparsities": (0.99,)}, InvalidOptionError),
        ({"what": ("rows-columns",), "method": "slimgpt"}, InvalidOptionError),
        ({"options": {"slicegpt": {"samples": 3}}}, InvalidOptionError),  # not ablated
        ({"method": "shortgpt", "what": ("repeats",), "options": {"2ssp": {"alpha": 2.0}}}, InvalidOptionError),
    ],
)
def test_what_cannot_be_ablated_is_refused(change: dict[str, Any], error: type[Exception], text: Path) -> None:
    with pytest.raises(error, match=r"no norm; .* alpha only" if "norm" in str(change.get("options")) else None):
        replace(asked(text, "norm"), **change).cells(Loads()())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"samples": 3}, "samples"),
        ({"length": 16}, "length"),
        ({"options": {"2ssp": {"samples": 3}}}, "samples"),
        ({"options": {"2ssp": {"alpha": 2.0}}}, r"2ssp\.alpha"),
        ({"of": "model"}, "of"),
        ({"text_field": "body"}, "text_field"),
        ({"samples": 3, "seeds": (0,), "values": ("l1",)}, "samples"),  # another value, of the same table
    ],
)
def test_rows_of_other_terms_are_refused(change: dict[str, Any], match: str, text: Path, ablated: Path) -> None:
    """Averaged with those that are there, they would pass for a spread over seeds."""
    before = {path: path.read_bytes() for path in ablated.rglob("*.json")}
    with pytest.raises(OutputExistsError, match=rf"\({match} differ\)"):
        ablate(replace(asked(text, "norm", values=("l2",), seeds=(3,)), **change), grid(ablated, text))
    assert {path: path.read_bytes() for path in ablated.rglob("*.json")} == before


@pytest.fixture(scope="module")
def ablated(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small ablation, to which nothing is added."""
    folder = tmp_path_factory.mktemp("ablated") / "out"
    ablate(asked(text, "norm", values=("l2",), seeds=(0,)), grid(folder, text))
    return folder


def test_seeds_values_and_other_ablations_may_be_added(text: Path, tmp_path: Path) -> None:
    for wanted in (
        asked(text, "norm", values=("l2",), seeds=(0,)),
        asked(text, "norm", values=("l2",), seeds=(3,), sparsities=(0.5,)),
        asked(text, "repeats", method="shortgpt", samples=3, seeds=(0,)),  # of another ablation, on its own terms
        asked(text, "repeats", method="window", seeds=(0,)),
    ):
        ablate(wanted, grid(tmp_path / "out", text))
    rows = json.loads((tmp_path / "out/ablation-table.json").read_text())["rows"]
    assert {(row["what"], row["method"]) for row in rows} == {
        ("dense", "dense"), ("norm", "2ssp"), ("repeats", "shortgpt"), ("repeats", "window")
    }  # fmt: skip


def test_a_comparison_s_folder_is_not_an_ablation_s(text: Path, tmp_path: Path) -> None:
    wanted = Comparison(methods=("2ssp",), sparsities=(0.25,), calibration=str(text), samples=2, length=24)
    compare(wanted, grid(tmp_path / "out", text))
    with pytest.raises(OutputExistsError, match="kind"):
        ablate(asked(text, "norm"), grid(tmp_path / "out", text))
