"""The verdict says what the numbers say, and no more."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare_folders import make_compare_folder

from secateur.report.comparing import Gap, accuracies, losses, ratio
from secateur.report.main_table import difference_table, differences
from secateur.report.results import SIZE_TOLERANCE, Results, read_results
from secateur.report.verdict import Verdict, verdict

TWO = {"methods": ("2ssp", "slicegpt"), "sparsities": (0.25,), "texts": ("wikitext2",), "change": {}}
OURS, THEIRS = "2ssp-0.25", "slicegpt-0.25"


def said(folder: Path, **options: Any) -> tuple[Results, Verdict]:
    results = read_results(make_compare_folder(folder, **options))
    return results, verdict(results)


def read(folder: Path, cell: str) -> Any:
    return json.loads((folder / "cells" / cell / "cell.json").read_text())


def edit(folder: Path, cell: str, **values: Any) -> None:
    (folder / "cells" / cell / "cell.json").write_text(json.dumps(read(folder, cell) | values))


def edit_texts(folder: Path, cell: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    found = read(folder, cell)["perplexity"]
    edit(folder, cell, perplexity={text: each | change(each) for text, each in found.items()})


def known(gap: Gap | None) -> Gap:
    assert gap is not None
    return gap


# --- who is best at a size ---


def test_a_clear_winner_is_named_with_the_distance_to_the_next(tmp_path: Path) -> None:
    results, words = said(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 0.1 + 0.6931})
    assert words.headline == "Best by perplexity: 2SSP at 25\u00a0%."
    assert [cell.name for cell in words.sizes[0].level] == [OURS]
    better, worse = (results.perplexity(cell, "wikitext2") or 0 for cell in results.pruned)
    assert f"Next is SliceGPT, {worse / better:.2f}× the best one's perplexity" in words.sizes[0].text
    assert f"{ratio(results, results.cells[1]):.2f}×" in words.cost


def test_what_the_interval_does_not_tell_apart_is_called_level(tmp_path: Path) -> None:
    _, words = said(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 0.1})
    assert {cell.method for cell in words.sizes[0].level} == {"2ssp", "slicegpt"}
    assert "(level)" in words.headline
    assert "the 95 % interval of the difference includes zero" in words.sizes[0].text
    assert "Next is" not in words.sizes[0].text


def test_pairing_tells_apart_what_the_spread_of_each_alone_hides(tmp_path: Path) -> None:
    results, words = said(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 0.15})
    better, worse = (cell.perplexity["wikitext2"] for cell in results.pruned)
    assert (worse.nll or 0) - (better.nll or 0) < (better.nll_stderr or 0) + (worse.nll_stderr or 0)
    assert len(words.sizes[0].level) == 1


def test_without_windows_it_is_not_known_who_is_best(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO)
    for name in (OURS, THEIRS):
        edit_texts(folder, name, lambda _: {"window_nll": []})
    words = verdict(read_results(folder))
    size = words.sizes[0]
    assert ([cell.method for cell in size.level], [cell.method for cell in size.unsure]) == (["2ssp"], ["slicegpt"])
    assert "Whether SliceGPT differs from it is not known: no interval." in size.text
    assert words.headline.startswith("Lowest perplexity: 2SSP at 25")
    assert words.headline.endswith("At 25\u00a0% intervals are missing: who is level is not known.")


@pytest.mark.parametrize("change", [{"length": 512}, {"nll": None, "perplexity": None}])
def test_other_windows_and_losses_that_are_no_numbers_rank_nowhere(change: dict[str, Any], tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO)
    edit_texts(folder, OURS, lambda _: change)
    results = read_results(folder)
    one, other = results.pruned
    assert losses(results).gap(one, other) is None
    assert ratio(results, one) is None
    assert losses(results).rank(results.of_size(0.25)).cells == (other,)  # not even by its bare number
    assert results.perplexity(one, "wikitext2") is None
    words = verdict(results)
    assert [cell.method for cell in words.sizes[0].level] == ["slicegpt"]
    told = any("2ssp-0.25 was judged on other windows of wikitext2" in caveat for caveat in words.caveats)
    assert told == ("length" in change)


# --- what is averaged ---


def test_texts_of_two_lengths_are_never_averaged(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **{**TWO, "texts": ("c4", "demo", "own")})
    for name in ("dense", OURS, THEIRS):
        edit_texts(folder, name, lambda each: {"length": 512} if each["text"] == "demo" else {})
    results, words = read_results(folder), verdict(read_results(folder))
    cell = results.pruned[0]
    assert (results.texts, results.averaged_texts) == (("c4", "demo", "own"), ("c4", "own"))
    dense = results.dense
    assert dense is not None
    assert ratio(results, cell) == pytest.approx(math.exp(known(losses(results).gap(cell, dense)).difference))
    assert results.perplexity(cell, "demo") is not None  # shown by itself
    assert [each.method for each in losses(results, "demo").rank(results.pruned).cells] == ["2ssp", "slicegpt"]
    assert "demo" not in words.sizes[0].text
    assert any(caveat.startswith("demo was cut to windows of another length") for caveat in words.caveats)


def test_texts_weigh_the_same(tmp_path: Path) -> None:
    results, _ = said(tmp_path, methods=("2ssp",), sparsities=(0.25,), change={})
    pair = results.pruned[0], results.cells[0]
    gaps = [known(losses(results, text).gap(*pair)) for text in results.texts]
    together = known(losses(results).gap(*pair))
    assert together.difference == pytest.approx(sum(gap.difference for gap in gaps) / 3)
    assert (together.low or math.inf) < together.difference < (together.high or -math.inf)


def test_what_texts_differ_in_is_no_uncertainty(tmp_path: Path) -> None:
    """A constant difference in each text is known exactly, whatever the texts' sizes."""
    folder = make_compare_folder(tmp_path, **{**TWO, "texts": ("c4", "demo")})
    found = read(folder, OURS)["perplexity"]
    for text, more in (("c4", 0.1), ("demo", 0.5)):
        windows = [loss + more for loss in found[text]["window_nll"]]
        found[text] |= {"window_nll": windows, "nll": found[text]["nll"] + more}
    edit(folder, THEIRS, perplexity=found)
    results = read_results(folder)
    gap = known(losses(results).gap(*results.pruned[::-1]))
    assert gap[:3] == pytest.approx((0.3, 0.3, 0.3))
    assert gap.apart is True


def test_windows_weigh_as_much_as_they_predict(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO, windows=4)
    for name, windows, nll in ((OURS, [1, 1, 1, 1], 1), (THEIRS, [2, 2, 1, 1], 1)):
        weights = {"window_nll": windows, "nll": nll, "window_predictions": [1, 1, 1e9, 1e9]}
        edit_texts(folder, name, lambda _, weights=weights: weights)  # type: ignore[misc]  # mypy infers no defaults
    results = read_results(folder)
    gap = known(losses(results).gap(*results.pruned[::-1]))
    assert (gap.low, gap.high) == (0, 1)  # 1: a sample of the two small windows only


def test_tasks_are_level_on_the_page_where_the_table_does_not_tell_them_apart(tmp_path: Path) -> None:
    """Five answers of a hundred differ: the bootstrap's interval is without zero, McNemar's p is 0.06."""
    folder = make_compare_folder(tmp_path, **TWO)
    for name, right in (("dense", 60), (OURS, 50), (THEIRS, 45)):
        task = {"metric": "acc", "value": right / 100, "stderr": 0.05, "documents": 100, "chance": 0.25, "fewshot": 0,
                "per_document": [1.0] * right + [0.0] * (100 - right)}  # fmt: skip
        edit(folder, name, tasks={"piqa": task})
    results = read_results(folder)
    ranking = accuracies(results).rank(results.of_size(0.25))
    assert (known(ranking.gaps[1]).high or 0) < 0
    assert [cell.method for cell in ranking.level] == ["2ssp", "slicegpt"]
    better = {row["measure"]: row["better"] for row in difference_table(differences(results, "2ssp")).rows}
    assert better["piqa"] == ""


def test_tasks_that_tell_nothing_and_metrics_of_another_kind_are_in_no_average(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO)
    assert list(read_results(folder).average.grey) == ["winogrande"]
    for name in ("dense", OURS, THEIRS):
        tasks = read(folder, name)["tasks"]
        tasks["piqa"] |= {"metric": "acc_norm"}
        tasks["lambada"] = {**tasks["piqa"], "metric": "perplexity", "value": 40.0, "chance": None}
        tasks["winogrande"] |= {"value": 1.0} if name == OURS else {}
        edit(folder, name, tasks=tasks)
    results = read_results(folder)
    cell = results.pruned[0]
    assert results.average.tasks == ("hellaswag", "arc_easy")
    assert results.accuracy(cell) == pytest.approx(sum(cell.tasks[t].value or 0 for t in results.average.tasks) / 2)
    caveats = verdict(results).caveats
    for start in (
        "winogrande is grey and in no average", "piqa is in no average: its metric is acc_norm",
        "lambada is in no average: its metric, perplexity, is no accuracy.",
    ):  # fmt: skip
        assert any(caveat.startswith(start) for caveat in caveats), start


# --- the words ---


def test_one_method_that_is_never_beaten_is_the_headline_else_all_that_win(tmp_path: Path) -> None:
    _, words = said(tmp_path / "a")
    assert words.headline.startswith("By perplexity, 2SSP is best, or level with the best, at every size (25")
    folder = make_compare_folder(
        tmp_path / "b", **{**TWO, "sparsities": (0.25, 0.5)}, harms={"2ssp": 0.1, "slicegpt": 0.8}
    )
    one, other = (read(folder, f"{method}-0.5")["perplexity"] for method in ("2ssp", "slicegpt"))
    edit(folder, "2ssp-0.5", perplexity=other)
    edit(folder, "slicegpt-0.5", perplexity=one)
    assert verdict(read_results(folder)).headline == "Best by perplexity: 2SSP at 25\u00a0%; SliceGPT at 50\u00a0%."


def test_reduced_searches_are_said_where_they_lose_and_where_they_win(tmp_path: Path) -> None:
    note = {"notes": {"reduced": "30 of 400 generations"}}
    options = {"methods": ("2ssp", "evopress"), "sparsities": (0.25,), "change": {"evopress-0.25": note}}
    _, loses = said(tmp_path / "a", **options)
    assert "EvoPress searched less than the paper does, and might do better" in loses.sizes[0].text
    assert any("30 of 400 generations" in caveat for caveat in loses.caveats)
    _, wins = said(tmp_path / "b", **options, harms={"evopress": 0.1})
    assert "although its search was reduced" in wins.sizes[0].text
    assert "might do better" not in wins.sizes[0].text


@pytest.mark.parametrize(
    ("harms", "missing", "told"),
    [
        ({"shortgpt": 0.2}, [], "removed 26.3\u00a0% instead of 25\u00a0%; 2SSP at that same size is worse"),
        ({"shortgpt": 0.5, "2ssp": 0.6}, [], "2SSP at that same size is better"),
        ({"shortgpt": 0.2}, ["2ssp-as-shortgpt-0.25"], "not quite the same size"),
    ],
)
def test_a_winner_that_missed_the_size_is_held_against_2ssp_at_its_own(
    harms: dict[str, float], missing: list[str], told: str, tmp_path: Path
) -> None:
    options = {"methods": ("2ssp", "shortgpt"), "sparsities": (0.25,), "change": {}}
    results, words = said(tmp_path, **options, harms=harms, missing=missing)
    assert told in words.sizes[0].text
    assert results.sparsities == [0.25]
    assert not any(cell.matched_to for cell in words.sizes[0].level)  # it is no competitor


def test_choices_are_the_smallest_within_each_tolerance(tmp_path: Path) -> None:
    results, words = said(tmp_path)
    assert words.choices
    running = [cell for cell in results.pruned if cell.done and not cell.matched_to]
    for choice in words.choices:
        assert choice.cell in running
        within = [cell for cell in running if (ratio(results, cell) or 1e9) <= choice.tolerance]
        least = min(cell.parameters or 0 for cell in within) * (1 + SIZE_TOLERANCE)
        assert (choice.cell.parameters or 0) <= least
        assert choice.ratio == min(ratio(results, cell) or 1e9 for cell in within if (cell.parameters or 0) <= least)
    sizes = [choice.cell.parameters or 0 for choice in words.choices]
    assert sizes == sorted(sizes, reverse=True)


def test_a_few_parameters_do_not_make_the_smaller_choice(tmp_path: Path) -> None:
    """Methods meet a size to within a neuron; who is a neuron below is not the one to take."""
    _, words = said(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 0.2})
    size = words.choices[-1].cell.parameters or 0
    for fewer, wanted in ((1, OURS), (size // 10, THEIRS)):
        edit(tmp_path, OURS, parameters=size)
        edit(tmp_path, THEIRS, parameters=size - fewer)
        assert verdict(read_results(tmp_path)).choices[-1].cell.name == wanted


def test_failed_and_missing_cells_are_said_and_not_judged(tmp_path: Path) -> None:
    results, words = said(tmp_path, missing=["window-0.5"])
    assert words.headline.endswith(f" 1 of {len(results.cells)} cells is still to come.")
    assert any("SliceGPT at 50\u00a0% failed" in caveat and "block 7" in caveat for caveat in words.caveats)
    assert any(caveat.startswith("Not there yet (running, or still to come): window-0.5") for caveat in words.caveats)
    judged = losses(results).rank(results.of_size(0.5)).cells
    assert not {"window-0.5", "slicegpt-0.5"} & {cell.name for cell in judged}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"only_perplexity": True, "windows": 5}, "No tasks were run"),
        ({"only_perplexity": True, "windows": 5}, "No text was generated"),
        ({"only_perplexity": True, "windows": 5}, "5 windows only"),
        ({"change": {OURS: {"tasks": {}}}}, "Without tasks: 2ssp-0.25"),
        ({"missing": ["dense", OURS, THEIRS]}, "dense model was not judged"),
    ],
)
def test_what_was_not_measured_is_said(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    _, words = said(tmp_path, **{**TWO, **options})
    assert any(told in caveat for caveat in words.caveats)
    if "missing" in options:
        assert words.headline.startswith("No verdict")
        assert not words.choices


def test_tasks_that_disagree_with_perplexity_are_said(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 1.5})
    one, other = (read(folder, name)["tasks"] for name in (OURS, THEIRS))
    edit(folder, OURS, tasks=other)
    edit(folder, THEIRS, tasks=one)
    words = verdict(read_results(folder))
    assert any("tasks and perplexity disagree: the former put SliceGPT first" in caveat for caveat in words.caveats)
