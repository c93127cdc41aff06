"""The verdict says what the numbers say, and no more."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from compare_folders import make_compare_folder

from secateur.report.comparing import accuracies, losses, ratio
from secateur.report.main_table import difference_table, differences
from secateur.report.results import Results, read_results
from secateur.report.verdict import SAME_SIZE, Verdict, verdict

TWO = {"methods": ("2ssp", "slicegpt"), "sparsities": (0.25,), "texts": ("wikitext2",), "change": {}}


def said(folder: Path, **options: Any) -> tuple[Results, Verdict]:
    results = read_results(make_compare_folder(folder, **options))
    return results, verdict(results)


def edit(folder: Path, cell: str, **values: Any) -> None:
    file = folder / "cells" / cell / "cell.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_clear_winner_is_named_with_the_distance_to_the_next(tmp_path: Path) -> None:
    results, words = said(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 0.1 + 0.6931})
    assert words.headline == "Best by perplexity: 2SSP at 25\u00a0%."
    assert [cell.name for cell in words.sizes[0].level] == ["2ssp-0.25"]
    better, worse = (results.perplexity(cell, "wikitext2") or 0 for cell in results.pruned)
    assert f"Next is SliceGPT, {worse / better:.2f}× the best one's perplexity" in words.sizes[0].text
    over = ratio(results, results.cells[1])
    assert over is not None
    assert f"{over:.2f}×" in words.cost


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
    for name in ("2ssp-0.25", "slicegpt-0.25"):
        found = json.loads((folder / "cells" / name / "cell.json").read_text())["perplexity"]
        edit(folder, name, perplexity={text: each | {"window_nll": []} for text, each in found.items()})
    words = verdict(read_results(folder))
    size = words.sizes[0]
    assert ([cell.method for cell in size.level], [cell.method for cell in size.unsure]) == (["2ssp"], ["slicegpt"])
    assert "Whether SliceGPT differs from it is not known: no interval." in size.text
    assert words.headline.startswith("Lowest perplexity: 2SSP at 25")
    assert words.headline.endswith("At 25\u00a0% intervals are missing: who is level is not known.")
    award = words.measures["perplexity over dense"][0]
    assert award is not None
    assert [cell.method for cell in award.unsure] == ["slicegpt"]


def test_other_windows_are_never_compared(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO)
    found = json.loads((folder / "cells" / "2ssp-0.25" / "cell.json").read_text())["perplexity"]
    edit(folder, "2ssp-0.25", perplexity={text: each | {"length": 512} for text, each in found.items()})
    results = read_results(folder)
    one, other = results.pruned
    assert losses(results).gap(one, other) is None
    assert ratio(results, one) is None
    words = verdict(results)
    assert losses(results).rank(results.of_size(0.25)).cells == (other,)  # not even by its bare number
    assert results.perplexity(one, "wikitext2") is None
    assert any("2ssp-0.25 was judged on other windows of wikitext2" in caveat for caveat in words.caveats)


def test_texts_of_two_lengths_are_never_averaged(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **{**TWO, "texts": ("c4", "demo", "own")})
    for name in ("dense", "2ssp-0.25", "slicegpt-0.25"):
        found = json.loads((folder / "cells" / name / "cell.json").read_text())["perplexity"]
        edit(folder, name, perplexity={**found, "demo": found["demo"] | {"length": 512}})
    results = read_results(folder)
    cell = results.pruned[0]
    assert results.texts == ("c4", "demo", "own")
    assert results.averaged_texts == ("c4", "own")
    assert results.dense is not None
    gap = losses(results).gap(cell, results.dense)
    assert gap is not None
    assert ratio(results, cell) == pytest.approx(math.exp(gap.difference))
    assert results.perplexity(cell, "demo") is not None  # shown by itself
    assert [each.method for each in losses(results, "demo").rank(results.pruned).cells] == ["2ssp", "slicegpt"]
    words = verdict(results)
    assert "demo" not in words.sizes[0].text
    assert any(caveat.startswith("demo was cut to windows of another length") for caveat in words.caveats)


def test_texts_weigh_the_same(tmp_path: Path) -> None:
    results, _ = said(tmp_path, methods=("2ssp",), sparsities=(0.25,), change={})
    gaps = [losses(results, text).gap(results.pruned[0], results.cells[0]) for text in results.texts]
    together = losses(results).gap(results.pruned[0], results.cells[0])
    assert together is not None
    assert together.difference == pytest.approx(sum(gap.difference for gap in gaps if gap) / 3)
    assert together.low is not None
    assert together.high is not None
    assert together.low < together.difference < together.high


def test_what_texts_differ_in_is_no_uncertainty(tmp_path: Path) -> None:
    """A constant difference in each text is known exactly, whatever the texts' sizes."""
    folder = make_compare_folder(tmp_path, **{**TWO, "texts": ("c4", "demo")})
    found = json.loads((folder / "cells" / "2ssp-0.25" / "cell.json").read_text())["perplexity"]
    for text, more in (("c4", 0.1), ("demo", 0.5)):
        windows = [loss + more for loss in found[text]["window_nll"]]
        found[text] |= {"window_nll": windows, "nll": found[text]["nll"] + more}
    edit(folder, "slicegpt-0.25", perplexity=found)
    results = read_results(folder)
    one, other = results.pruned
    gap = losses(results).gap(other, one)
    assert gap is not None
    assert (gap.difference, gap.low, gap.high) == pytest.approx((0.3, 0.3, 0.3))
    assert gap.apart is True


def test_windows_weigh_as_much_as_they_predict(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO, windows=4)
    for name, windows, nll in (("2ssp-0.25", [1, 1, 1, 1], 1), ("slicegpt-0.25", [2, 2, 1, 1], 1.5)):
        found = json.loads((folder / "cells" / name / "cell.json").read_text())["perplexity"]["wikitext2"]
        weights = {"window_nll": windows, "nll": nll, "window_predictions": [1, 1, 1e9, 1e9]}
        edit(folder, name, perplexity={"wikitext2": found | weights})
    results = read_results(folder)
    one, other = results.pruned
    gap = losses(results).gap(other, one)
    assert gap is not None
    assert gap.high == 1  # a sample of the two small windows only
    assert gap.low == 0


def test_tasks_are_level_on_the_page_where_the_table_does_not_tell_them_apart(tmp_path: Path) -> None:
    """Five answers of a hundred differ: the bootstrap's interval is without zero, McNemar's p is 0.06."""
    folder = make_compare_folder(tmp_path, **TWO)
    for name, right in (("dense", 60), ("2ssp-0.25", 50), ("slicegpt-0.25", 45)):
        task = {"metric": "acc", "value": right / 100, "stderr": 0.05, "documents": 100, "chance": 0.25, "fewshot": 0,
                "per_document": [1.0] * right + [0.0] * (100 - right)}  # fmt: skip
        edit(folder, name, tasks={"piqa": task})
    results = read_results(folder)
    ranking = accuracies(results).rank(results.of_size(0.25))
    gap = ranking.gaps[1]
    assert gap is not None
    assert gap.high is not None
    assert gap.high < 0
    assert [cell.method for cell in ranking.level] == ["2ssp", "slicegpt"]
    better = {row["measure"]: row["better"] for row in difference_table(differences(results, "2ssp")).rows}
    assert better["piqa"] == ""


def test_times_without_a_spread_are_not_told_apart(tmp_path: Path) -> None:
    _, words = said(tmp_path / "a", **TWO)
    folder = make_compare_folder(tmp_path / "b", **TWO)
    for name in ("2ssp-0.25", "slicegpt-0.25"):
        found = json.loads((folder / "cells" / name / "cell.json").read_text())["inference"]
        found["pruned"] |= {"prefill_ms_iqr": None, "prefill_ms_rounds": []}
        edit(folder, name, inference=found)
    other = verdict(read_results(folder))
    known, unknown = (each.measures["prefill ms, over dense"][0] for each in (words, other))
    assert known is not None
    assert unknown is not None
    assert (len(known.level) + len(known.unsure), len(known.unsure)) in ((1, 0), (2, 0))
    assert (len(unknown.level), len(unknown.unsure)) == (1, 1)


def test_one_method_that_is_never_beaten_is_the_headline(tmp_path: Path) -> None:
    _, words = said(tmp_path)
    assert words.headline.startswith("By perplexity, 2SSP is best, or level with the best, at every size (25")


def test_methods_that_win_at_different_sizes_are_both_named(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **{**TWO, "sparsities": (0.25, 0.5)}, harms={"2ssp": 0.1, "slicegpt": 0.8})
    one, other = (json.loads((folder / "cells" / f"{m}-0.5" / "cell.json").read_text()) for m in TWO["methods"])
    edit(folder, "2ssp-0.5", perplexity=other["perplexity"])
    edit(folder, "slicegpt-0.5", perplexity=one["perplexity"])
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


def test_a_winner_that_missed_the_size_is_held_against_2ssp_at_its_own(tmp_path: Path) -> None:
    options = {"methods": ("2ssp", "shortgpt"), "sparsities": (0.25,), "change": {}}
    _, better = said(tmp_path / "a", **options, harms={"shortgpt": 0.2})
    assert "removed 26.3\u00a0% instead of 25\u00a0%; 2SSP at that same size is worse" in better.sizes[0].text
    _, worse = said(tmp_path / "b", **options, harms={"shortgpt": 0.5, "2ssp": 0.6})
    assert "2SSP at that same size is better" in worse.sizes[0].text
    folder = make_compare_folder(tmp_path / "c", **options, harms={"shortgpt": 0.2}, missing=["2ssp-as-shortgpt-0.25"])
    assert "not quite the same size" in verdict(read_results(folder)).sizes[0].text


def test_matched_cells_are_no_competitors(tmp_path: Path) -> None:
    results, words = said(tmp_path, methods=("2ssp", "shortgpt"), sparsities=(0.25,), change={})
    assert results.sparsities == [0.25]
    assert not any(cell.matched_to for each in words.sizes for cell in each.level)


def test_choices_are_the_smallest_within_each_tolerance(tmp_path: Path) -> None:
    results, words = said(tmp_path)
    assert words.choices
    for choice in words.choices:
        assert choice.ratio <= choice.tolerance
        assert not choice.cell.matched_to
        running = [cell for cell in results.pruned if not cell.matched_to]
        within = [cell for cell in running if (ratio(results, cell) or 1e9) <= choice.tolerance]
        least = min(cell.parameters or 0 for cell in within)
        assert (choice.cell.parameters or 0) <= least * (1 + SAME_SIZE)
        assert choice.ratio == min(
            ratio(results, cell) or 1e9 for cell in within if (cell.parameters or 0) <= least * (1 + SAME_SIZE)
        )
    sizes = [choice.cell.parameters or 0 for choice in words.choices]
    assert sizes == sorted(sizes, reverse=True)


def test_a_few_parameters_do_not_make_the_smaller_choice(tmp_path: Path) -> None:
    """Methods meet a size to within a neuron; who is a neuron below is not the one to take."""
    _, words = said(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 0.2})
    size = words.choices[-1].cell.parameters or 0
    for fewer, wanted in ((1, "2ssp-0.25"), (size // 10, "slicegpt-0.25")):
        edit(tmp_path, "2ssp-0.25", parameters=size)
        edit(tmp_path, "slicegpt-0.25", parameters=size - fewer)
        assert verdict(read_results(tmp_path)).choices[-1].cell.name == wanted


def test_failed_and_missing_cells_are_said_and_not_judged(tmp_path: Path) -> None:
    results, words = said(tmp_path, missing=["window-0.5"])
    assert words.headline.endswith(f" 1 of {len(results.cells)} cells is still to come.")
    assert any("SliceGPT at 50\u00a0% failed" in caveat and "block 7" in caveat for caveat in words.caveats)
    assert any(caveat.startswith("Not there yet (running, or still to come): window-0.5") for caveat in words.caveats)
    judged = losses(results).rank(results.of_size(0.5)).cells
    assert not {"window-0.5", "slicegpt-0.5"} & {cell.name for cell in judged}


def test_only_perplexity_is_said_to_be_little(tmp_path: Path) -> None:
    _, words = said(tmp_path, only_perplexity=True, windows=5)
    assert list(words.measures) == ["perplexity over dense", "time to prune, in one run each"]
    for told in ("No tasks were run", "No text was generated", "5 windows only"):
        assert any(told in caveat for caveat in words.caveats), told


def test_tasks_that_the_dense_model_cannot_do_count_in_no_average(tmp_path: Path) -> None:
    results, words = said(tmp_path)
    assert list(results.average.grey) == ["winogrande"]
    assert any(caveat.startswith("winogrande is grey and in no average") for caveat in words.caveats)
    cell = results.pruned[0]
    before = results.accuracy(cell)
    assert before is not None
    tasks = json.loads((tmp_path / "cells" / cell.name / "cell.json").read_text())["tasks"]
    edit(tmp_path, cell.name, tasks={**tasks, "winogrande": tasks["winogrande"] | {"value": 1.0}})
    again = read_results(tmp_path)
    assert again.accuracy(again.pruned[0]) == before


def test_a_metric_of_another_kind_is_in_no_average(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO)
    for name in ("dense", "2ssp-0.25", "slicegpt-0.25"):
        tasks = json.loads((folder / "cells" / name / "cell.json").read_text())["tasks"]
        tasks["piqa"] |= {"metric": "acc_norm"}
        tasks["lambada"] = {**tasks["piqa"], "metric": "perplexity", "value": 40.0, "chance": None}
        edit(folder, name, tasks=tasks)
    results = read_results(folder)
    cell = results.pruned[0]
    assert results.average.tasks == ("hellaswag", "arc_easy")
    values = [cell.tasks[task].value or 0.0 for task in results.average.tasks]
    assert results.accuracy(cell) == pytest.approx(sum(values) / 2)
    caveats = verdict(results).caveats
    assert any(caveat.startswith("piqa is in no average: its metric is acc_norm") for caveat in caveats)
    assert any(caveat == "lambada is in no average: its metric, perplexity, is no accuracy." for caveat in caveats)


def test_tasks_that_disagree_with_perplexity_are_said(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **TWO, harms={"2ssp": 0.1, "slicegpt": 1.5})
    one, other = (json.loads((folder / "cells" / f"{m}-0.25" / "cell.json").read_text()) for m in TWO["methods"])
    edit(folder, "2ssp-0.25", tasks=other["tasks"])
    edit(folder, "slicegpt-0.25", tasks=one["tasks"])
    words = verdict(read_results(folder))
    assert any("tasks and perplexity disagree: the former put SliceGPT first" in caveat for caveat in words.caveats)
    award = words.measures["mean acc on tasks"][0]
    assert award is not None
    assert [cell.method for cell in award.level] == ["slicegpt"]


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
    found = json.loads((folder / "cells" / "2ssp-0.25" / "cell.json").read_text())["perplexity"]
    edit(
        folder,
        "2ssp-0.25",
        perplexity={text: each | {"perplexity": None, "nll": None} for text, each in found.items()},
    )
    results = read_results(folder)
    assert [cell.method for cell in verdict(results).sizes[0].level] == ["slicegpt"]
