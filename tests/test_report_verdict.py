"""The verdict says what the numbers say, and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_folders import make_compare_folder

from secateur.report.compared import by_loss, loss_gap, ratio
from secateur.report.comparison import Comparison, read_comparison
from secateur.report.verdict import Verdict, verdict

TWO = {"methods": ("2ssp", "slicegpt"), "sparsities": (0.25,), "texts": ("wikitext2",), "change": {}}


def said(folder: Path, **options: Any) -> tuple[Comparison, Verdict]:
    comparison = read_comparison(make_compare_folder(folder, **options))
    return comparison, verdict(comparison)


def edit(folder: Path, cell: str, **values: Any) -> None:
    file = folder / "cells" / cell / "cell.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_clear_winner_is_named_with_the_distance_to_the_next(tmp_path: Path) -> None:
    comparison, words = said(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 0.1 + 0.6931})
    assert words.headline == "Best by perplexity: 2SSP at 25\u00a0%."
    assert [cell.name for cell in words.sizes[0].level] == ["2ssp-0.25"]
    better, worse = (cell.perplexity("wikitext2") or 0 for cell in comparison.pruned)
    assert f"Next is SliceGPT, {worse / better:.2f}× the best one's perplexity" in words.sizes[0].text
    over = ratio(comparison, comparison.cells[1])
    assert over is not None
    assert f"{over:.2f}×" in words.cost


def test_what_the_interval_does_not_tell_apart_is_called_level(tmp_path: Path) -> None:
    _, words = said(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 0.1})
    assert {cell.method for cell in words.sizes[0].level} == {"2ssp", "slicegpt"}
    assert "(level)" in words.headline
    assert "the 95 % interval of the difference includes zero" in words.sizes[0].text
    assert "Next is" not in words.sizes[0].text


def test_pairing_tells_apart_what_the_spread_of_each_alone_hides(tmp_path: Path) -> None:
    comparison, words = said(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 0.15})
    better, worse = (cell.section("perplexity")["wikitext2"] for cell in comparison.pruned)
    assert worse["nll"] - better["nll"] < better["nll_stderr"] + worse["nll_stderr"]
    assert len(words.sizes[0].level) == 1


def test_without_windows_no_interval_is_claimed_and_no_tie(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO)
    for name in ("2ssp-0.25", "slicegpt-0.25"):
        results = json.loads((folder / "cells" / name / "cell.json").read_text())["perplexity"]
        edit(folder, name, perplexity={text: each | {"window_nll": None} for text, each in results.items()})
    words = verdict(read_comparison(folder))
    assert len(words.sizes[0].level) == 1
    assert "no interval" in words.sizes[0].text


def test_other_windows_are_never_compared(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO)
    results = json.loads((folder / "cells" / "2ssp-0.25" / "cell.json").read_text())["perplexity"]
    edit(folder, "2ssp-0.25", perplexity={text: each | {"length": 512} for text, each in results.items()})
    comparison = read_comparison(folder)
    one, other = comparison.pruned
    assert loss_gap(one, other, ("wikitext2",)) is None
    assert ratio(comparison, one) is None
    assert "distance is not known" in verdict(comparison).sizes[0].text


def test_texts_weigh_the_same(tmp_path: Path) -> None:
    comparison, _ = said(tmp_path, methods=("2ssp",), sparsities=(0.25,), change={})
    gaps = [loss_gap(comparison.pruned[0], comparison.cells[0], (text,)) for text in comparison.texts]
    together = loss_gap(comparison.pruned[0], comparison.cells[0], comparison.texts)
    assert together is not None
    assert together.difference == pytest.approx(sum(gap.difference for gap in gaps if gap) / 3)
    assert together.low is not None
    assert together.high is not None
    assert together.low < together.difference < together.high


def test_one_method_that_is_never_beaten_is_the_headline(tmp_path: Path) -> None:
    _, words = said(tmp_path)
    assert words.headline.startswith("By perplexity, 2SSP is best, or level with the best, at every size (25")


def test_methods_that_win_at_different_sizes_are_both_named(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **{**TWO, "sparsities": (0.25, 0.5)}, harms={"2ssp": 0.1, "slicegpt": 0.8})
    one, other = (json.loads((folder / "cells" / f"{m}-0.5" / "cell.json").read_text()) for m in TWO["methods"])
    edit(folder, "2ssp-0.5", perplexity=other["perplexity"])
    edit(folder, "slicegpt-0.5", perplexity=one["perplexity"])
    assert verdict(read_comparison(folder)).headline == "Best by perplexity: 2SSP at 25\u00a0%; SliceGPT at 50\u00a0%."


def test_reduced_searches_are_said_where_they_lose_and_where_they_win(tmp_path: Path) -> None:
    note = {"notes": {"reduced": "30 of 400 generations"}}
    options = {"methods": ("2ssp", "evopress"), "sparsities": (0.25,), "change": {"evopress-0.25": note}}
    _, loses = said(tmp_path / "a", **options)
    assert "EvoPress searched less than the paper does, and might do better" in loses.sizes[0].text
    assert any("30 of 400 generations" in caveat for caveat in loses.caveats)
    _, wins = said(tmp_path / "b", **options, harms={"evopress": 0.1})
    assert "although its search was reduced" in wins.sizes[0].text
    assert "might do better" not in wins.sizes[0].text


def test_a_winner_that_missed_the_size_is_held_against_2ssp_at_its_own(tmp_path: Path) -> None:
    options = {"methods": ("2ssp", "shortgpt"), "sparsities": (0.25,), "change": {}}
    _, better = said(tmp_path / "a", **options, harms={"shortgpt": 0.2})
    assert "removed 26.3\u00a0% instead of 25\u00a0%; 2SSP at that same size is worse" in better.sizes[0].text
    _, worse = said(tmp_path / "b", **options, harms={"shortgpt": 0.5, "2ssp": 0.6})
    assert "2SSP at that same size is better" in worse.sizes[0].text
    folder = make_compare_folder(tmp_path / "c", **options, harms={"shortgpt": 0.2}, missing=["2ssp-as-shortgpt-0.25"])
    assert "not quite the same size" in verdict(read_comparison(folder)).sizes[0].text


def test_matched_cells_are_no_competitors(tmp_path: Path) -> None:
    comparison, words = said(tmp_path, methods=("2ssp", "shortgpt"), sparsities=(0.25,), change={})
    assert comparison.sparsities == [0.25]
    assert not any(cell.matched_to for each in words.sizes for cell in each.level)


def test_choices_are_the_smallest_within_each_tolerance(tmp_path: Path) -> None:
    comparison, words = said(tmp_path)
    assert words.choices
    for choice in words.choices:
        assert choice.ratio <= choice.tolerance
        within = [cell for cell in comparison.pruned if (ratio(comparison, cell) or 1e9) <= choice.tolerance]
        assert choice.cell.parameters == min(cell.parameters or 0 for cell in within)
    sizes = [choice.cell.parameters or 0 for choice in words.choices]
    assert sizes == sorted(sizes, reverse=True)


def test_failed_and_missing_cells_are_said_and_not_judged(tmp_path: Path) -> None:
    comparison, words = said(tmp_path, missing=["window-0.5"])
    assert any("SliceGPT at 50\u00a0% failed" in caveat and "block 7" in caveat for caveat in words.caveats)
    assert any(caveat.startswith("Not run yet: window-0.5") for caveat in words.caveats)
    judged = by_loss(comparison, comparison.of_size(0.5)).cells
    assert not {"window-0.5", "slicegpt-0.5"} & {cell.name for cell in judged}


def test_only_perplexity_is_said_to_be_little(tmp_path: Path) -> None:
    _, words = said(tmp_path, only_perplexity=True, windows=5)
    assert [measure.name for measure in words.measures] == ["perplexity over dense", "time to prune"]
    for told in ("No tasks were run", "No text was generated", "5 windows only"):
        assert any(told in caveat for caveat in words.caveats), told


def test_tasks_that_the_dense_model_cannot_do_count_in_no_average(tmp_path: Path) -> None:
    comparison, words = said(tmp_path)
    assert list(comparison.chance_tasks) == ["winogrande"]
    assert "winogrande" not in comparison.counted_tasks
    assert any(caveat.startswith("winogrande is grey") for caveat in words.caveats)


def test_tasks_that_disagree_with_perplexity_are_said(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 1.5})
    one, other = (json.loads((folder / "cells" / f"{m}-0.25" / "cell.json").read_text()) for m in TWO["methods"])
    edit(folder, "2ssp-0.25", tasks=other["tasks"])
    edit(folder, "slicegpt-0.25", tasks=one["tasks"])
    words = verdict(read_comparison(folder))
    assert any("tasks and perplexity disagree: the former put SliceGPT first" in caveat for caveat in words.caveats)
    accuracy = next(measure for measure in words.measures if measure.name == "mean accuracy on tasks")
    assert accuracy.awards[0] is not None
    assert [cell.method for cell in accuracy.awards[0].level] == ["slicegpt"]


def test_a_cell_without_tasks_is_named(tmp_path: Path) -> None:
    _, words = said(tmp_path, change={"2ssp-0.25": {"tasks": {}}})
    assert any("Without tasks: 2ssp-0.25" in caveat for caveat in words.caveats)


def test_without_any_result_there_is_no_verdict(tmp_path: Path) -> None:
    _, words = said(tmp_path, **TWO, missing=["dense", "2ssp-0.25", "slicegpt-0.25"])
    assert words.headline.startswith("No verdict")
    assert not words.choices
    assert any("dense model was not judged" in caveat for caveat in words.caveats)


def test_a_loss_that_is_no_number_ranks_nowhere(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO)
    results = json.loads((folder / "cells" / "2ssp-0.25" / "cell.json").read_text())["perplexity"]
    edit(
        folder,
        "2ssp-0.25",
        perplexity={text: each | {"perplexity": None, "nll": None} for text, each in results.items()},
    )
    comparison = read_comparison(folder)
    assert [cell.method for cell in verdict(comparison).sizes[0].level] == ["slicegpt"]
