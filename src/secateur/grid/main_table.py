"""The main table of a comparison, and the table of its differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from secateur.grid.cells import DENSE
from secateur.grid.differences import SAME_SIZE, CellFile, Cells, average_notes, average_of, differences
from secateur.grid.raw import RawFolder
from secateur.grid.render import Column, Row, Table, as_json, comma_separated, latex, markdown
from secateur.judge.averages import Average, is_accuracy
from secateur.judge.statistics import SURE, told_apart
from secateur.report.compared import bold, by_accuracy, by_loss
from secateur.report.figures import TIMED, speed
from secateur.report.results import dumps
from secateur.report.results_before import CellResult, Results
from secateur.report.table import GENERATED, can_be_best

NAME, DIFFERENCES = "main-table", "differences.csv"
BOLD = (
    "Bold: the best number among the methods at one sparsity asked, and every number that is level with it, the 95% "
    f"interval of the paired difference holding 0 (of right and wrong answers, McNemar's p being {SURE:g} or more); "
    "where there is no interval, the best number alone."
)
_RUNNING = [
    Column("prefill_ratio", "prefill, × dense", ".2f"),
    Column("token_ratio", "ms per token, × dense", ".2f"),
    Column("throughput_ratio", "throughput, × dense", hidden=True),
    *(
        Column(f"{kind}_{edge}", f"{name}, × dense, {quartile} quartile", hidden=True)
        for kind, name in (("prefill", "prefill"), ("token", "ms per token"), ("throughput", "throughput"))
        for edge, quartile in (("low", "lower"), ("high", "upper"))
    ),
    *(
        Column(f"{whose}{key}", f"{name}{remark}", hidden=True)
        for whose, remark in (("", ""), ("dense_", ", dense in the same run"))
        for key, name in (
            ("prefill_ms", "prefill ms"),
            ("token_ms", "ms per token"),
            ("throughput_tokens_s", "new tokens per second"),
        )
    ),
    Column("kv_bytes_per_token", "KV cache, bytes per token", hidden=True),
    Column("running_peak_memory_bytes", "peak memory while running, bytes", hidden=True),
    Column("running_peak_memory_by", "peak memory while running, how measured", hidden=True),
]


def write_main_table(folder: RawFolder, base: str) -> None:
    """Write the tables of all cells that are there."""
    index = folder.index() or {"cells": [], "settings": {}, "model": {}}
    cells = folder.cells(index["cells"])
    table, told = main_table(cells, index), differences(cells, base)
    against = difference_table(told)
    title = f"{index['model'].get('name')}: perplexity and tasks after pruning."
    sections = [f"# {title}", "", markdown(table)]
    if told:
        sections += [f"## Differences, base {base}", "", markdown(against)]
    average = average_of(cells)
    content = {
        **as_json(table),
        "base": base,
        "grey": average.grey,
        "average": {"metric": average.metric, "tasks": average.tasks, "left_out": average.left_out},
        "differences": told,
    }
    folder.write(f"{NAME}.md", "\n".join(sections))
    folder.write(f"{NAME}.csv", comma_separated(table))
    folder.write(f"{NAME}.json", dumps(content))
    folder.write(f"{NAME}.tex", latex(table, caption=title))
    folder.write(DIFFERENCES, comma_separated(against))


def main_table(cells: Cells, index: Mapping[str, Any]) -> Table:
    """A row per cell, in the index's order."""
    texts = list(dict.fromkeys(text for cell in cells.values() for text in cell["perplexity"]))
    tasks = list(dict.fromkeys(task for cell in cells.values() for task in cell["tasks"]))
    average = average_of(cells)
    columns = [
        Column("name", "cell", hidden=True),
        Column("label", "method"),
        Column("method", "method", hidden=True),
        Column("status", "status", hidden=True),
        Column("matched_to", "matched to", hidden=True),
        Column("sparsity", "asked", ".4g"),
        Column("achieved_blocks", "of the blocks", ".2%"),
        Column("achieved_model", "of the model", ".2%"),
        Column("parameters", "parameters", ",d"),
        Column("weight_bytes", "bytes of weights", ",d", hidden=True),
    ]
    columns += [Column(f"perplexity:{text}", f"perplexity, {text}", ".2f", "low") for text in texts]
    columns += [Column(f"nll_stderr:{text}", f"standard error of nll, {text}", ".4f", hidden=True) for text in texts]
    columns += [
        Column(f"task:{task}", task, ".1%", "high", grey=task in average.grey)
        if average.is_share(task)
        else Column(f"task:{task}", f"{task}, {average.metrics[task]}", ".4g")
        for task in tasks
    ]
    columns += [Column(f"task_stderr:{task}", f"standard error, {task}", hidden=True) for task in tasks]
    if average.tasks:
        columns.append(Column("task_average", f"average of {average.metric}", ".1%", "high"))
    columns += [
        Column("prune_cpu_s", "pruning, CPU s", ",.0f"),
        Column("prune_wall_s", "pruning, s", ",.0f", hidden=True),
        Column("forwards", "forwards", ",.0f"),
        Column("forwards_asked", "forwards asked", ",.0f", hidden=True),
        Column("prune_peak_device_memory_mb", "peak device memory while pruning, MB", hidden=True),
    ]
    if any(cell["inference"] for cell in cells.values()):
        columns += _RUNNING
    if any(cell.get("generation") for cell in cells.values()):
        columns += [
            Column(f"generation:{key}", f"{title}, greedy text", hidden=True) for key, title in GENERATED.items()
        ]
    failed = any(cell["status"] == "failed" for cell in cells.values())
    columns.append(Column("error", "error", hidden=not failed))
    rows = [_row(cell, cells, texts, tasks, average) for cell in cells.values()]
    best = _bold(cells, texts, average)
    return Table(columns, rows, group="group", bold=best, notes=_notes(cells, index, average, any(best.values())))


def _bold(cells: Cells, texts: Sequence[str], average: Average) -> dict[str, list[int]]:
    """Places of the rows that are bold, by the column's key; which, `report.compared.bold` says."""
    results = Results({"model": {}}, tuple(CellResult(name, cell) for name, cell in cells.items()))
    ranks = {f"perplexity:{text}": partial(by_loss, results, texts=[text]) for text in texts}
    ranks |= {
        f"task:{task}": partial(by_accuracy, results, tasks=[task])
        for task in average.metrics
        if can_be_best(average, task)
    }
    ranks["task_average"] = partial(by_accuracy, results, tasks=average.tasks)
    best = {key: bold(results, rank)[0] for key, rank in ranks.items()}
    return {key: [n for n, cell in enumerate(results.cells) if cell in found] for key, found in best.items()}


def _row(cell: CellFile, cells: Cells, texts: list[str], tasks: list[str], average: Average) -> Row:
    prune, achieved = cell["prune"] or {}, cell["achieved"] or {}
    peak = prune.get("peak_device_memory_bytes")
    row = {key: cell[key] for key in ("name", "label", "method", "status", "matched_to", "sparsity")}
    row |= {
        # a matched cell belongs to the sparsity of the one that it stands beside
        "group": cells[cell["matched_to"]]["sparsity"] if cell["matched_to"] in cells else cell["sparsity"],
        "achieved_blocks": achieved.get("blocks"),
        "achieved_model": achieved.get("model"),
        **{key: cell[key] for key in ("parameters", "weight_bytes", "error")},
        "prune_cpu_s": prune.get("cpu_s"),
        "prune_wall_s": prune.get("wall_s"),
        **{key: prune.get(key) for key in ("forwards", "forwards_asked")},
        "prune_peak_device_memory_mb": None if peak is None else peak / 1e6,
        **_running(cell),
        "task_average": average.of(cell["tasks"]),
    }
    generated = (cell.get("generation") or {}).get("figures", {})
    row |= {f"generation:{key}": generated.get(key) for key in GENERATED}
    for text in texts:
        result = cell["perplexity"].get(text, {})
        row |= {f"perplexity:{text}": result.get("perplexity"), f"nll_stderr:{text}": result.get("nll_stderr")}
    for task in tasks:
        result = cell["tasks"].get(task, {})
        row |= {f"task:{task}": result.get("value"), f"task_stderr:{task}": result.get("stderr")}
    return row


def _running(cell: CellFile) -> Row:
    """What running it costs: the cell's own figures, and those over the dense model's of the same run."""
    pair = cell["inference"] or {}
    ours, dense = pair.get("pruned", {}), pair.get("dense", {})
    row = {key: ours.get(key) for key in (*TIMED.values(), "kv_bytes_per_token")}
    row |= {f"dense_{key}": dense.get(key) for key in TIMED.values()}
    row |= {f"running_{key}": ours.get(key) for key in ("peak_memory_bytes", "peak_memory_by")}
    for kind in TIMED:
        found = speed(CellResult(cell["name"], cell), kind)
        row |= {f"{kind}_{part}": found and getattr(found, part) for part in ("ratio", "low", "high")}
    return row


def _notes(cells: Cells, index: Mapping[str, Any], average: Average, any_bold: bool) -> list[str]:
    notes = [BOLD] if any_bold else []
    texts = {
        text: f"{result['samples']} windows of {result['length']:,} tokens"
        for cell in cells.values()
        for text, result in cell["perplexity"].items()
    }
    if texts:
        notes.append(f"Perplexity: {_alike(texts)}. Lower is better; not to be compared across lengths.")
    dense = cells.get(DENSE, {"tasks": {}})
    if dense["tasks"]:
        notes.append(f"Tasks: {_alike({task: _asked(result) for task, result in dense['tasks'].items()})}.")
    notes += average_notes(average)
    if any(cell["matched_to"] for cell in cells.values()):
        notes.append(
            "A row 'at the size of' has as many parameters removed as that method really removed. It is never bold: "
            "compare it with that method only."
        )
    if any(cell["inference"] for cell in cells.values()):
        notes.append(
            f"× dense: the time over the dense model's, timed in turn with it in one run; {_how(cells)}. The dense row "
            "is against itself: so far off one is chance."
        )
    first: dict[str, str] = {}  # cells of one method say the same at every sparsity
    for name, cell in cells.items():
        for note in cell["notes"].values():
            first.setdefault(note, name)
    notes += [f"{name}: {note}" for note, name in first.items()]
    notes += [f"{name} failed: {cell['error']}" for name, cell in cells.items() if cell["status"] == "failed"]
    if missing := [name for name in index["cells"] if name not in cells]:
        notes.append(f"Not there yet: {', '.join(missing)}.")
    return notes


def _how(cells: Cells) -> str:
    stored = ["token_ms_rounds" in cell["inference"]["dense"] for cell in cells.values() if cell["inference"]]
    paired, unpaired = "the median of the ratios round by round", "median over median"
    if all(stored):
        return paired
    return f"{paired}, where they are stored, else {unpaired}" if any(stored) else unpaired


def _asked(result: Mapping[str, Any]) -> str:
    shots = f", {result['fewshot']}-shot" if result.get("fewshot") is not None else ""
    by = f", by {result['harness']}" if "harness" in result else ""
    return f"{result['metric']}{shots}, {result['documents']} documents{by}"


def _alike(facts: Mapping[str, str]) -> str:
    """Names with what is said of them; those of which the same is said, together."""
    groups: dict[str, list[str]] = {}
    for name, fact in facts.items():
        groups.setdefault(fact, []).append(name)
    return "; ".join(f"{', '.join(names)} ({fact})" for fact, names in groups.items())


def difference_table(told: list[dict[str, Any]]) -> Table:
    """A row per pair of cells and text or task."""
    columns = [
        Column("cell", "cell"),
        Column("against", "against"),
        Column("kind", "at the"),
        Column("measure", "measure"),
        Column("difference", "difference", "+.4f"),
        Column("low", "95% from", "+.4f"),
        Column("high", "to", "+.4f"),
        Column("ratio", "ratio of perplexities", ".3f"),
        Column("p", "McNemar p", ".3g"),
        Column("better", "better"),
    ]
    rows = []
    for each in told:
        for kind in ("perplexity", "tasks"):
            for name, found in each[kind].items():
                measure = f"nll, {name}" if kind == "perplexity" else name
                better = _better(each, found, lower=kind == "perplexity")
                rows.append(
                    {**{key: each[key] for key in ("cell", "against", "kind")}, "measure": measure, **found,
                     "better": better}
                )  # fmt: skip
    notes = (
        "A difference is the cell's value less that of what it is compared against: of the loss in nats per token "
        "(below 0: the cell is better), or of the task's metric (of an accuracy above 0: the cell is better). "
        "Intervals: paired bootstrap over windows or documents. Better: where the interval excludes 0; where answers "
        f"are right or wrong, where McNemar's exact p is below {SURE:g}. Empty: not told apart, or not known.",
        *(["`same size`: 2SSP with as many parameters removed."] if any(e["kind"] == SAME_SIZE for e in told) else []),
    )
    return Table(columns, rows, notes=notes)


def _better(each: Mapping[str, Any], found: Mapping[str, Any], *, lower: bool) -> str:
    """Which of the two is better as far as the test tells; "" where it does not, there is none, or it is not known
    which way a metric is better."""
    if not told_apart(found["low"], found["high"], found.get("p")) or not is_accuracy(found.get("metric", "acc")):
        return ""
    return str(each["cell"] if (found["difference"] < 0) == lower else each["against"])
