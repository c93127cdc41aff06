"""Tables in four forms say the same; what LaTeX and Markdown would take for commands is escaped."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import convert, structs
from oracles import PROPERTY

from secateur.judge.averages import average_over
from secateur.judge.results import TaskResult
from secateur.report.comparing import losses
from secateur.report.looks import percent
from secateur.report.main_table import Differences, difference_table, main_table
from secateur.report.main_table import differences as all_differences
from secateur.report.results import CellResult, Index, ModelFacts, Results
from secateur.report.short_table import by_text_and_task, short_table
from secateur.report.table import Column, Table, as_json, comma_separated, escape_latex, latex, markdown

NASTY = r"50 % of $x_1$ & {a\b} ~ #1 ^2 <p> | *x*"


def cell(
    name: str, method: str, sparsity: float | None, losses: list[float], right: int, **more: Any
) -> dict[str, Any]:
    """A finished cell with a text of equal windows and two tasks of 100 questions."""
    nll = sum(losses) / len(losses)
    text = {
        "perplexity": 2.7**nll, "nll": nll, "nll_stderr": 0.1, "samples": len(losses), "length": 8,
        "window_nll": losses, "window_predictions": [7.0] * len(losses),
    }  # fmt: skip
    tasks = {
        task: {
            "task": task, "metric": "acc", "value": n / 100, "stderr": 0.04, "documents": 100, "chance": 0.25,
            "fewshot": 0, "per_document": [1.0] * n + [0.0] * (100 - n),
        }
        for task, n in {"easy": right, "hard": 27}.items()
    }  # fmt: skip
    return {
        "name": name, "method": method, "label": name, "sparsity": sparsity, "status": "done", "error": None,
        "matched_to": None, "notes": {}, "achieved": {"blocks": sparsity or 0.0, "model": 0.1}, "parameters": 1000,
        "weight_bytes": 4000, "prune": None, "inference": None, "perplexity": {"wiki_text": text}, "tasks": tasks,
        **more,
    }  # fmt: skip


CELLS = {
    each["name"]: each
    for each in (
        cell("dense", "dense", None, [1.0, 2.0, 3.0, 4.0], 80),
        cell("2ssp-0.25", "2ssp", 0.25, [1.1, 2.1, 3.1, 4.2], 70),
        cell("window-0.25", "window", 0.25, [2.1, 3.2, 4.1, 5.2], 50, notes={"reduced": NASTY}),
        cell("2ssp-as-window-0.25", "2ssp", 0.24, [1.1, 2.1, 3.1, 4.1], 70, matched_to="window-0.25"),
        cell("2ssp-0.5", "2ssp", 0.5, [3.0, 3.0, 3.0, 3.0], 40, status="failed", error=NASTY, perplexity={}, tasks={}),
        cell("window-0.5", "window", 0.5, [5.0, 5.0, 5.0, 5.0], 30),
    )
}


def results_of(cells: dict[str, dict[str, Any]], *missing: str) -> Results:
    index = Index(model=ModelFacts(name="m"), cells=[*cells, *missing])
    return Results(index, (*convert(list(cells.values()), list[CellResult]), *(CellResult(name=n) for n in missing)))


def table_of(cells: dict[str, dict[str, Any]], *missing: str) -> Table:
    return main_table(results_of(cells, *missing))


def differences(cells: dict[str, dict[str, Any]], base: str) -> list[Differences]:
    return all_differences(results_of(cells), base)


def test_differences_are_to_the_base_at_the_same_sparsity_and_to_the_match() -> None:
    told = differences(CELLS, "2ssp")
    assert [(each.cell, each.against, each.kind) for each in told] == [
        ("window-0.25", "2ssp-0.25", "same sparsity asked"), ("window-0.25", "2ssp-as-window-0.25", "same size"),
    ]  # fmt: skip  # the base's cell at 0.5 failed
    found, task = told[0].perplexity["wiki_text"], told[0].tasks["easy"]
    assert found.difference == pytest.approx(1.025)
    assert 0 < (found.low or 0) <= found.difference <= (found.high or 0)
    assert (task.difference, task.p) == pytest.approx((-0.2, 2**-19))
    assert (task.high or 0) < 0
    assert structs.astuple(told[0].tasks["hard"]) == ("acc", 0, 0, 0, 1)
    table = difference_table(told)
    better = {(row["against"], row["measure"]): row["better"] for row in table.rows}
    assert better["2ssp-0.25", "nll, wiki_text"] == better["2ssp-0.25", "easy"] == "2ssp-0.25"
    assert better["2ssp-0.25", "hard"] == ""


def test_losses_that_are_no_numbers_or_too_far_apart_end_no_table() -> None:
    def losses(value: float | None) -> dict[str, Any]:
        text = {**CELLS["window-0.25"]["perplexity"]["wiki_text"], "window_nll": [value] * 4, "nll": value}
        return {**CELLS, "window-0.25": {**CELLS["window-0.25"], "perplexity": {"wiki_text": text}}}

    (broken, *_), (far, *_) = (differences(losses(value), "2ssp") for value in (None, 1e4))
    assert set(structs.astuple(broken.perplexity["wiki_text"])) == {None}
    assert (far.perplexity["wiki_text"].difference or 0) > 9000
    assert far.perplexity["wiki_text"].ratio is None
    assert [row["better"] for row in difference_table([broken]).rows if row["measure"] == "nll, wiki_text"] == [""]


def test_with_another_base_the_signs_turn() -> None:
    (one, *_), (other, *_) = differences(CELLS, "2ssp"), differences(CELLS, "window")
    assert (other.cell, other.against) == ("2ssp-0.25", "window-0.25")
    ours, theirs = one.perplexity["wiki_text"], other.perplexity["wiki_text"]
    assert (theirs.low, theirs.high) == pytest.approx((-(ours.high or 0), -(ours.low or 0)))


def test_tasks_at_chance_are_grey_and_move_no_average() -> None:
    average = results_of(CELLS).average
    assert (average.metric, average.tasks, set(average.grey)) == ("acc", ("easy",), {"hard"})
    assert "chance" in average.grey["hard"]
    rows = {row["name"]: row for row in table_of(CELLS).rows}
    assert rows["window-0.25"]["task_average"] == 0.5
    assert rows["2ssp-0.5"]["task_average"] is None  # it failed
    text = latex(table_of(CELLS), caption="c")
    assert r"\textcolor{gray}{27.0\%}" in text
    assert r"\textcolor{gray}{50" not in text
    other = {name: {**each, "tasks": {**each["tasks"]}} for name, each in CELLS.items()}
    other["window-0.25"]["tasks"]["hard"] = {**other["window-0.25"]["tasks"]["hard"], "value": 0.9}
    moved = {row["name"]: row for row in table_of(other).rows}
    assert {name: row["task_average"] for name, row in moved.items()} == {
        name: row["task_average"] for name, row in rows.items()
    }


def with_task(name: str, metric: str, value: float) -> dict[str, Any]:
    """All cells with another task, at which the dense model is not at chance."""
    task = {"metric": metric, "value": value, "stderr": 0.01, "chance": None, "documents": 100, "fewshot": 0,
            "per_document": []}  # fmt: skip
    return {
        n: each if not each["tasks"] else {**each, "tasks": {**each["tasks"], name: task}} for n, each in CELLS.items()
    }


@pytest.mark.parametrize(
    ("metric", "why"),
    [("acc_norm", "the average is of acc"), ("perplexity", "is no accuracy"), ("f1", "is no accuracy")],
)
def test_an_average_is_of_one_kind_of_accuracy(metric: str, why: str) -> None:
    cells = with_task("other", metric, 12.5)
    average = results_of(cells).average
    assert average.tasks == ("easy",)
    assert why in average.left_out["other"]
    assert results_of(cells).accuracy(convert(cells["window-0.25"], CellResult)) == 0.5
    text = markdown(table_of(cells))
    assert "Average of acc: the mean over easy." in text
    assert f"Left out of the average, other: {average.left_out['other']}" in text
    if metric != "acc_norm":  # neither in per cent nor with a best
        assert "1250" not in text
        assert "**12.5**" not in text
        assert not any(row["better"] for row in difference_table(differences(cells, "2ssp")).rows
                       if row["measure"] == "other")  # fmt: skip


def test_the_kind_that_most_tasks_have_is_averaged() -> None:
    kinds = (("a", "acc", 0.1), ("b", "acc_norm", 0.5), ("c", "acc_norm", 0.7))
    results = {name: TaskResult(metric=kind, value=value) for name, kind, value in kinds}
    assert average_over([results], {}).of(results) == pytest.approx(0.6)
    chance = {"b": TaskResult(metric="acc_norm", value=0.5, stderr=0.1, chance=0.5)}
    assert average_over([results], chance).tasks == ("a",)  # of one and one the first; the grey one has no say
    assert average_over([], {}).of({}) is None
    assert average_over([results], {}).of({**results, "c": TaskResult(metric="acc", value=1.0)}) is None


def test_right_and_wrong_answers_are_told_apart_by_mcnemars_test_and_others_by_the_interval() -> None:
    def judged(name: str, method: str, answers: list[float]) -> dict[str, Any]:
        made = cell(name, method, 0.25, [1.0, 2.0], 50)
        task = {**made["tasks"]["easy"], "value": sum(answers) / len(answers), "per_document": answers}
        return {**made, "tasks": {"t": task}}

    better, worse = [1.0] * 5 + [0.0] * 15, [0.0] * 20  # five disagreements, all one way: p = 1/16
    for answers, sure in ((better, False), ([each * 0.9 for each in better], True)):
        told = differences(
            {each["name"]: each for each in (judged("2ssp-0.25", "2ssp", worse), judged("x-0.25", "x", answers))},
            "2ssp",
        )
        found = told[0].tasks["t"]
        assert (found.low or 0) > 0  # the interval alone would be sure of both
        assert found.p == (None if sure else 1 / 16)
        assert [row["better"] for row in difference_table(told).rows if row["measure"] == "t"] == [
            "x-0.25" if sure else ""
        ]


def test_the_main_table_says_what_failed_what_is_missing_and_what_is_best() -> None:
    text = markdown(table_of(CELLS, "slimgpt-0.5"))
    assert "Not there yet: slimgpt-0.5" in text
    assert text.count("50 % of") == 3  # a note; the failed cell's row and its note
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "**" in lines["2ssp-0.25"]
    assert "**" not in lines["window-0.25"]
    assert "**" not in lines["2ssp-as-window-0.25"]  # it has the best numbers, at another size
    assert "**" not in lines["dense"]
    assert "**" not in lines["window-0.5"]  # alone at its sparsity, it is no best
    assert len({line.replace(r"\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def bold_of(table: Table, key: str) -> set[str]:
    """The cells whose number is bold, by what Markdown and LaTeX say."""
    place = [column.key for column in table.shown].index(key)
    label = [column.key for column in table.shown].index("label")
    lines = [line.strip("| ").split(" | ") for line in markdown(table).splitlines() if line.startswith("| ")][1:]
    found = {line[label] for line in lines if line[place].strip("*") != line[place] and "**" in line[place]}
    body = latex(table, caption="").split(r"\midrule", 1)[1].split(r"\bottomrule")[0].replace(r"\midrule", "")
    rows = [line.strip().removesuffix(r" \\").split(" & ") for line in body.strip().splitlines() if line.strip()]
    assert {row[label] for row in rows if r"\textbf" in row[place]} == found
    return found


def rivals(**more: Any) -> dict[str, dict[str, Any]]:
    """Three methods at one size: two whose difference changes sign from window to window, and one far off."""
    made = (
        cell("dense", "dense", None, [1.0, 2.0, 3.0, 4.0], 80),
        cell("2ssp-0.25", "2ssp", 0.25, [1.5, 2.4, 3.5, 4.4], 70),
        cell("slimgpt-0.25", "slimgpt", 0.25, [1.4, 2.5, 3.4, 4.6], 68),
        cell("window-0.25", "window", 0.25, [2.5, 3.5, 4.5, 5.5], 30),
    )
    return {each["name"]: {**each, **more.get(each["method"], {})} for each in made}


def test_bold_is_the_best_and_all_that_is_level_with_it() -> None:
    table = table_of(rivals())
    for key in ("perplexity:wiki_text", "task:easy", "task_average"):
        assert bold_of(table, key) == {"2ssp-0.25", "slimgpt-0.25"}, key
    assert bold_of(table, "task:hard") == set()  # it is grey
    assert table.notes[0].startswith("Bold: the best number among the methods at one sparsity asked, and every number")
    assert "below" not in table.notes[0]


def test_where_no_interval_is_known_the_lowest_alone_is_bold() -> None:
    def silent(name: str) -> dict[str, Any]:
        text = rivals()[name]["perplexity"]["wiki_text"]
        return {"perplexity": {"wiki_text": {**text, "window_nll": []}}}

    alone = {"2ssp": silent("2ssp-0.25"), "slimgpt": silent("slimgpt-0.25"), "window": silent("window-0.25")}
    assert bold_of(table_of(rivals(**alone)), "perplexity:wiki_text") == {"2ssp-0.25"}
    bench = {"slimgpt": {"perplexity": {"wiki_text": {"perplexity": 1.5, "nll": 0.4, "samples": 4, "length": 8}}}}
    assert bold_of(table_of(rivals(**bench)), "perplexity:wiki_text") == {"slimgpt-0.25"}


def test_a_failed_cell_is_never_bold_though_its_numbers_are_shown() -> None:
    low = {"wiki_text": {**CELLS["dense"]["perplexity"]["wiki_text"], "perplexity": 1.25}}
    failed = {"window": {"status": "failed", "error": "e", "perplexity": low}}
    table = table_of(rivals(**failed))
    assert "| 1.25 |" in markdown(table)
    assert bold_of(table, "perplexity:wiki_text") == {"2ssp-0.25", "slimgpt-0.25"}
    only = {**failed, "slimgpt": {"status": "failed", "error": "e"}}
    table = table_of(rivals(**only))  # the one that is left is the best of nothing
    assert bold_of(table, "perplexity:wiki_text") == set()
    assert not any(note.startswith("Bold") for note in table.notes)


def test_the_short_table_ranks_as_the_main_table_does_and_names_the_size_that_was_missed() -> None:
    achieved = {"window": {"achieved": {"blocks": 0.27, "model": 0.1}}, "slimgpt": {"achieved": {"blocks": 0.254}}}
    cells = rivals(**achieved)
    cells["2ssp-as-window-0.25"] = {**CELLS["2ssp-as-window-0.25"], "sparsity": 0.27}
    cells["2ssp-0.5"] = CELLS["2ssp-0.5"]
    results = results_of(cells)
    table, key = short_table(results, losses(results, "wiki_text")), "size:0.25"
    told = {row["label"]: row for row in table.rows}
    assert list(told) == ["dense", "2ssp-0.25", "slimgpt-0.25", "window-0.25", "2ssp-0.5"]
    main = main_table(results)
    bold = [{t.rows[n]["label"] for n in t.bold[k]} for t, k in ((main, "perplexity:wiki_text"), (table, key))]
    assert bold[0] == bold[1] == {"2ssp-0.25", "slimgpt-0.25"}
    assert str(told["window-0.25"][key]).endswith(f"({percent(0.27)})")
    assert "(" not in f"{told['slimgpt-0.25'][key]}{told['2ssp-0.25'][key]}"  # within half a point
    assert told["2ssp-0.5"] == {"label": "2ssp-0.5", "size:0.5": "failed"}
    text, tasks = by_text_and_task(results)
    assert "2ssp-as-window-0.25" in {row["label"] for row in short_table(results, text, matched=True).rows}
    by_task = short_table(results, tasks)
    assert {row["label"]: row.get(key) for row in by_task.rows if row["label"] in ("2ssp-0.25", "dense")} == {
        "2ssp-0.25": percent(0.7), "dense": percent(0.8)
    }  # fmt: skip
    assert {by_task.rows[n]["label"] for n in by_task.bold[key]} == {"2ssp-0.25", "slimgpt-0.25"}


def test_times_are_told_over_the_dense_models_of_the_same_run() -> None:
    other = {}
    done = {name: each for name, each in CELLS.items() if each["status"] == "done"}
    for slow, (name, each) in enumerate(done.items(), start=1):  # the machine is busier with each cell
        dense = {"prefill_ms": 100.0 * slow, "token_ms": 10.0 * slow}
        pruned = {key: 0.75 * value for key, value in dense.items()}
        other[name] = {**each, "inference": {"dense": dense, "pruned": pruned}}
    table = table_of(other)
    assert {row["prefill_ratio"] for row in table.rows} == {row["token_ratio"] for row in table.rows} == {0.75}
    assert "in one run; median over median." in markdown(table)
    shown = [column.key for column in table.shown]
    assert "prefill_ratio" in shown
    assert "prefill_ms" not in shown  # it compares hours, not models


def test_times_whose_rounds_are_stored_are_told_in_pairs() -> None:
    def timed(*values: float) -> dict[str, Any]:
        return {"prefill_ms": values[1], "token_ms": values[1], "prefill_ms_rounds": values, "token_ms_rounds": values}

    pair = {"dense": timed(4.0, 8.0, 16.0), "pruned": timed(2.0, 4.0, 16.0)}
    stored = {name: {**each, "inference": pair} for name, each in CELLS.items()}
    table = table_of(stored)
    assert [row["token_ratio"] for row in table.rows] == [
        None if row["status"] == "failed" else 0.5 for row in table.rows
    ]
    assert "in one run; the median of the ratios round by round." in markdown(table)
    old = {"dense": {"token_ms": 8.0}, "pruned": {"token_ms": 4.0}}
    mixed = markdown(table_of({**stored, "dense": {**CELLS["dense"], "inference": old}}))
    assert "round by round, where they are stored, else median over median." in mixed


def test_what_running_and_generating_gave_is_in_the_files_of_numbers_only() -> None:
    def timed(n: float) -> dict[str, Any]:
        return {"throughput_tokens_s": 10.0 * n, "throughput_tokens_s_rounds": [9.0 * n, 10.0 * n], "token_ms": 4.0,
                "kv_bytes_per_token": 512, "peak_memory_bytes": 7_000_000, "peak_memory_by": "a counter"}  # fmt: skip

    figures = {"greedy_agreement": 0.75, "distinct_2": 0.5, "ended_share": 0.25, "common_prefix_tokens": 3.5}
    more = {"inference": {"pruned": timed(1.5), "dense": timed(1)}, "generation": {"samples": [], "figures": figures}}
    table = table_of({**CELLS, "window-0.25": {**CELLS["window-0.25"], **more}})
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(comma_separated(table)))}
    found, other = rows["window-0.25"], rows["2ssp-0.25"]
    told = {"throughput_ratio": "1.5", "throughput_low": "1.5", "throughput_tokens_s": "15.0", "token_ratio": "1.0",
            "token_low": "", "dense_throughput_tokens_s": "10.0", "kv_bytes_per_token": "512",
            "running_peak_memory_bytes": "7000000", "running_peak_memory_by": "a counter",
            "generation:greedy_agreement": "0.75", "generation:distinct_2": "0.5", "generation:distinct_1": "",
            "generation:ended_share": "0.25", "generation:common_prefix_tokens": "3.5"}  # fmt: skip
    assert {key: found[key] for key in told} == told
    assert {other[key] for key in told} == {""}
    shown = {column.key for column in table.shown}
    assert shown & set(told) == {"token_ratio"}
    bare = {column.key for column in table_of(CELLS).columns}
    assert not bare & set(told)  # where nothing was measured, there is no column


def test_the_peak_while_pruning_is_a_devices_and_no_processs() -> None:
    def told(**prune: Any) -> str:
        table = table_of({"window-0.25": {**CELLS["window-0.25"], "prune": prune}})
        (row,) = csv.DictReader(io.StringIO(comma_separated(table)))
        titles = {column.key: column.title for column in table.columns}
        assert titles["prune_peak_device_memory_mb"] == "peak device memory while pruning, MB"
        return row["prune_peak_device_memory_mb"]

    assert told(peak_device_memory_bytes=12_500_000) == "12.5"
    assert told(peak_device_memory_bytes=None) == ""
    assert told(peak_memory_bytes=3_880_361_984) == ""  # an older cell's, of the whole process on a CPU


def test_csv_and_json_have_the_same_numbers() -> None:
    table = table_of(CELLS)
    told = json.loads(json.dumps(as_json(table)))
    rows = list(csv.DictReader(io.StringIO(comma_separated(table))))
    assert set(rows[0]) >= {"perplexity:wiki_text", "nll_stderr:wiki_text", "task:easy", "task_average", "parameters"}
    for ours, theirs in zip(rows, told["rows"], strict=True):
        for key, field in ours.items():
            value = theirs[key]
            assert field == ("" if value is None else str(value))
            if isinstance(value, float):
                assert float(field) == value


@PROPERTY
@given(st.text(alphabet=st.sampled_from("\\&%$#_{}~^<>|ab 1")))
def test_no_character_of_a_text_is_a_command_to_latex(text: str) -> None:
    escaped = escape_latex(text)
    commands = re.sub(
        r"\\textbackslash\{\}|\\textasciitilde\{\}|\\textasciicircum\{\}|\\textless\{\}|\\textgreater\{\}", "", escaped
    )
    commands = re.sub(r"\\[&%$#_{}]", "", commands)
    assert not set(commands) & set("\\&%$#_{}~^<>")
    assert all(character in escaped for character in text if character in "|ab 1&%$#_{}")


def test_every_row_of_the_latex_has_every_column() -> None:
    text = latex(table_of(CELLS), caption=NASTY)
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    cells = {len(re.findall(r"(?<!\\)&", line)) for line in body.splitlines() if line.endswith(r" \\")}
    assert len(cells) == 1
    assert text.count(r"\midrule") == 1 + 2  # under the heading, and between dense, 0.25 and 0.5


def test_spread_is_shown_behind_the_mean() -> None:
    table = Table(
        [Column("a", "a", form=".2f", sd=lambda _: None)], [{"a": 1.234, "a:sd": 0.056}, {"a": 2.0, "a:sd": None}]
    )
    assert "| 1.23 ± 0.06 |" in markdown(table)
    assert "| 2.00 |" in markdown(table)
    assert r"1.23 $\pm$ 0.06" in latex(table, caption="")
    assert comma_separated(table).splitlines() == ["a,a:sd", "1.234,0.056", "2.0,"]
