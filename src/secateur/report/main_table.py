"""The main table of a comparison, and the table of its differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import UNSET, Struct

from secateur.errors import OutputError
from secateur.folders import write_file
from secateur.judge.averages import Average, is_accuracy
from secateur.judge.inference import COUNTER
from secateur.judge.results import TaskResult
from secateur.judge.statistics import SURE, told_apart
from secateur.report.comparing import TIMED, accuracies, bold, exp, losses, speed
from secateur.report.looks import listed, number, percent, seconds, times
from secateur.report.results import MISSING, CellResult, Results, dumps, read_results
from secateur.report.short_table import by_text_and_task, short_table
from secateur.report.table import MAIN, Column, Table, as_json, comma_separated, latex, markdown, rows_of

NAME, DIFFERENCES = "main-table", "differences.csv"
BOLD = (
    "Bold: the best number among the methods at one sparsity asked, and every number that is level with it, the 95% "
    f"interval of the paired difference holding 0 (of right and wrong answers, McNemar's p being {SURE:g} or more); "
    "where there is no interval, the best number alone."
)
RUNNING, GENERATED = "running", "generated"  # parts of the page
_FIGURES = {  # of generated text: title, title on the page
    "greedy_agreement": "agreement with dense",
    "common_prefix_tokens": "tokens before it differs",
    "distinct_1": "distinct tokens",
    "distinct_2": "distinct pairs",
    "distinct_3": "distinct triples",
    "ended_share": "ended by itself",
}
_TIMES = {"prefill": "prefill", "token": "ms per token", "throughput": "throughput"}
Of = Callable[[CellResult], Any]


def write_main_table(folder: Path, base: str) -> None:
    """Write the tables of all cells that are there.

    Args:
        base: the method that differences are taken to.

    Raises:
        OutputError: a file cannot be written.
    """
    results = read_results(folder)
    table, compared = main_table(results), differences(results, base)
    against = difference_table(compared)
    title = f"{results.index.model.name}: perplexity and tasks after pruning."
    short = [markdown(short_table(results, measure)) for measure in by_text_and_task(results)[:1]]
    sections = [f"# {title}", "", *short, "## All cells, all columns", "", markdown(table)]
    if compared:
        sections += [f"## Differences, base {base}", "", markdown(against)]
    average = results.average
    content = {
        **as_json(table), "base": base, "grey": average.grey,
        "average": {"metric": average.metric, "tasks": average.tasks, "left_out": average.left_out},
        "differences": compared,
    }  # fmt: skip
    write(folder, {
        f"{NAME}.md": "\n".join(sections), f"{NAME}.csv": comma_separated(table), f"{NAME}.json": dumps(content),
        f"{NAME}.tex": latex(table, caption=title), DIFFERENCES: comma_separated(against),
    })  # fmt: skip


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write files of a folder atomically, by name.

    Raises:
        OutputError: the folder cannot be written.
    """
    for name, content in files.items():
        try:
            write_file(folder / name, content)
        except OSError as error:
            raise OutputError(f"{folder / name} cannot be written: {error.strerror or error}") from error


def main_table(results: Results) -> Table:
    """A row per cell that is there, in the index's order."""
    cells = [cell for cell in results.cells if cell.status != MISSING]
    columns = [*_sizes(results), *_judged(results, cells), *_costs(cells)]
    failed = any(cell.status == "failed" for cell in cells)
    columns.append(Column("error", "error", at("error"), hidden=not failed, page=""))
    rows = [{**row, "group": results.size_of(cell)} for row, cell in zip(rows_of(columns, cells), cells, strict=True)]
    best, unsure = _marks(results, cells)
    return Table(columns, rows, "group", best, unsure, _notes(results, cells, any(best.values())))


# --- columns ---


def at(path: str) -> Of:
    """A cell's value at a path of attributes; None where there is none."""

    def value(cell: object) -> Any:
        for name in path.split("."):
            cell = getattr(cell, name, None)
        return None if cell is UNSET else cell

    return value


def _hidden(path: str, title: str, key: str = "") -> Column[CellResult]:
    return Column(key or path, title, at(path), hidden=True)


def _sizes(results: Results) -> Iterator[Column[CellResult]]:
    yield _hidden("name", "cell")
    yield Column("label", "method", at("label"), page="")
    yield _hidden("method", "method")
    yield _hidden("status", "status")
    yield _hidden("matched_to", "matched to")
    yield Column("sparsity", "asked", at("sparsity"), ".4g", page="")
    for of, whose in (("blocks", "the blocks' parameters"), ("model", "all parameters")):
        page = None if whose == results.whose else ""
        yield Column(f"achieved_{of}", f"of the {of}", at(f"achieved.{of}"), ".2%", page=page,
                     hint=f"share of {whose} that is gone")  # fmt: skip
    yield Column("parameters", "parameters", at("parameters"), ",d")
    yield Column("weight_bytes", "bytes of weights", at("weight_bytes"), _megabytes, hidden=True, page=MAIN)


def _judged(results: Results, cells: list[CellResult]) -> Iterator[Column[CellResult]]:
    average, texts = results.average, dict.fromkeys(text for cell in cells for text in cell.perplexity)
    for text in texts:
        windows = next(cell.perplexity[text] for cell in cells if text in cell.perplexity)
        yield Column(f"perplexity:{text}", f"perplexity, {text}", _of("perplexity", text, "perplexity"), ".2f", "low",
                     hint=f"{windows.samples} windows of {windows.length} tokens")  # fmt: skip
    for text in texts:
        yield Column(f"nll_stderr:{text}", f"standard error of nll, {text}", _of("perplexity", text, "nll_stderr"),
                     hidden=True)  # fmt: skip
    yield Column("ratio", "perplexity, × dense", losses(results).shown, number, files=False,
                 hint=f"geometric mean over {listed(results.averaged_texts)}")  # fmt: skip
    for task in results.tasks:
        share, metric, why = average.is_share(task), average.metrics[task], average.left_out.get(task)
        yield Column(
            f"task:{task}", task if share else f"{task}, {metric}", _of("tasks", task, "value"),
            ".1%" if share else ".4g", "high" if share else None, grey=share and task in average.grey,
            hint=metric + (f"; in no average: {why}" if why else ""),
        )  # fmt: skip
    for task in results.tasks:
        yield Column(f"task_stderr:{task}", f"standard error, {task}", _of("tasks", task, "stderr"), hidden=True)
    if average.tasks:
        yield Column("task_average", f"average of {average.metric}", results.accuracy, ".1%", "high",
                     hint=f"mean over {listed(average.tasks)}")  # fmt: skip


def _of(section: str, name: str, key: str) -> Of:
    """A figure of a text's or a task's result."""
    return lambda cell: getattr(getattr(cell, section).get(name), key, None)


def _costs(cells: list[CellResult]) -> Iterator[Column[CellResult]]:
    yield Column("prune_cpu_s", "pruning, CPU s", at("prune.cpu_s"), ",.0f", page="")
    yield Column("prune_wall_s", "pruning, s", at("prune.wall_s"), seconds, hidden=True, page=MAIN,
                 hint="wall-clock time of the pruning itself, in one run")  # fmt: skip
    yield Column("forwards", "forwards", at("prune.forwards"), ",.0f", page="")
    yield _hidden("prune.forwards_asked", "forwards asked", "forwards_asked")
    yield Column("prune_peak_device_memory_mb", "peak device memory while pruning, MB", _device_peak_mb, hidden=True)
    if any(cell.inference for cell in cells):
        yield from _running()
    if any(cell.generation for cell in cells):
        for key, title in _FIGURES.items():
            yield Column(f"generation:{key}", f"{title}, greedy text", at(f"generation.figures.{key}"),
                         number if key.endswith("_tokens") else percent, hidden=True, page=GENERATED)  # fmt: skip


def _running() -> Iterator[Column[CellResult]]:
    for kind, name in _TIMES.items():
        more: dict[str, Any] = {"form": times, "hidden": True, "page": RUNNING} if kind == "throughput" else {}
        yield Column(f"{kind}_ratio", f"{name}, × dense", partial(_timing, kind, "ratio"), **{"form": ".2f"} | more,
                     hint="over the dense model's in the same run")  # fmt: skip
    for kind, name in _TIMES.items():
        for edge, quartile in (("low", "lower"), ("high", "upper")):
            of = partial(_timing, kind, edge)
            yield Column(f"{kind}_{edge}", f"{name}, × dense, {quartile} quartile", of, hidden=True)
    for whose, prefix, remark in (("pruned", "", ""), ("dense", "dense_", ", dense in the same run")):
        for key, name in zip(TIMED.values(), ("prefill ms", "ms per token", "new tokens per second"), strict=True):
            yield _hidden(f"inference.{whose}.{key}", f"{name}{remark}", f"{prefix}{key}")
    yield Column("kv_bytes_per_token", "KV cache, bytes per token", at("inference.pruned.kv_bytes_per_token"),
                 _kilobytes, hidden=True, page=RUNNING, hint="of one sequence, with each token")  # fmt: skip
    for key, remark in (("bytes", "bytes"), ("by", "how measured")):
        path, name = f"inference.pruned.peak_memory_{key}", f"running_peak_memory_{key}"
        yield _hidden(path, f"peak memory while running, {remark}", name)
    yield Column("device_peak", "peak memory", _device_peak, _megabytes, page=RUNNING, files=False,
                 hint="weights and the most beside them, by torch's counter on the device")  # fmt: skip


def _timing(kind: str, part: str, cell: CellResult) -> float | None:
    return getattr(speed(cell, kind), part, None)


def _device_peak_mb(cell: CellResult) -> float | None:
    peak = at("prune.peak_device_memory_bytes")(cell)
    return None if peak is None else peak / 1e6


def _device_peak(cell: CellResult) -> float | None:
    """Of accelerators only: of a CPU it is what could be seen of it, and stands in the files of numbers."""
    counted = at("inference.pruned.peak_memory_by")(cell) == COUNTER
    return at("inference.pruned.peak_memory_bytes")(cell) if counted else None


def _megabytes(size: float) -> str:
    return f"{number(size / 1e6)} MB"


def _kilobytes(size: float) -> str:
    return f"{number(size / 1e3)} kB"


def _marks(results: Results, cells: list[CellResult]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Places of the rows that are bold, and of those of which that is not known, by the column's key."""
    average = results.average
    measures = {f"perplexity:{text}": losses(results, text) for text in results.texts}
    measures |= {f"task:{t}": accuracies(results, t) for t in results.tasks if average.is_share(t)}
    measures["task_average"] = accuracies(results)
    marks = {key: bold(results, measure) for key, measure in measures.items() if key[5:] not in average.grey}
    best, unsure = (
        {key: [place for place, cell in enumerate(cells) if cell in both[which]] for key, both in marks.items()}
        for which in (0, 1)
    )
    return best, unsure


# --- notes ---


def _notes(results: Results, cells: list[CellResult], any_bold: bool) -> list[str]:
    notes = [BOLD] if any_bold else []
    texts = {
        text: f"{result.samples} windows of {result.length:,} tokens"
        for cell in cells for text, result in cell.perplexity.items()
    }  # fmt: skip
    if texts:
        notes.append(f"Perplexity: {_alike(texts)}. Lower is better; not to be compared across lengths.")
    if results.dense and results.dense.tasks:
        notes.append(f"Tasks: {_alike({task: _asked(result) for task, result in results.dense.tasks.items()})}.")
    notes += average_notes(results.average)
    if any(cell.matched_to for cell in cells):
        notes.append(
            "A row 'at the size of' has as many parameters removed as that method really removed. It is never bold: "
            "compare it with that method only."
        )
    if any(cell.inference for cell in cells):
        notes.append(
            f"× dense: the time over the dense model's, timed in turn with it in one run; {_how(cells)}. The dense row "
            "is against itself: so far off one is chance."
        )
    notes += [*cell_notes(cells), *failures(cells)]
    if missing := [cell.name for cell in results.missing]:
        notes.append(f"Not there yet: {', '.join(missing)}.")
    return notes


def average_notes(average: Average) -> list[str]:
    """What the task average is the mean of, and why other tasks are not in it."""
    over = [f"Average of {average.metric}: the mean over {', '.join(average.tasks)}."] if average.tasks else []
    return over + [f"Left out of the average, {task}: {why}." for task, why in average.left_out.items()]


def cell_notes(cells: list[CellResult]) -> list[str]:
    """The cells' own, each once: cells of one method say the same at every sparsity."""
    first: dict[str, str] = {}
    for cell in cells:
        for note in cell.notes.values():
            first.setdefault(note, cell.name)
    return [f"{name}: {note}" for note, name in first.items()]


def failures(cells: list[CellResult]) -> list[str]:
    return [f"{cell.name} failed: {cell.error}" for cell in cells if cell.status == "failed"]


def _how(cells: list[CellResult]) -> str:
    stored = [bool(cell.inference.dense.token_ms_rounds) for cell in cells if cell.inference]
    paired, unpaired = "the median of the ratios round by round", "median over median"
    if all(stored):
        return paired
    return f"{paired}, where they are stored, else {unpaired}" if any(stored) else unpaired


def _asked(result: TaskResult) -> str:
    shots = f", {result.fewshot}-shot" if result.fewshot is not None else ""
    by = f", by {result.harness}" if result.harness else ""
    return f"{result.metric}{shots}, {result.documents} documents{by}"


def _alike(facts: Mapping[str, str]) -> str:
    """Names with what is said of them; those of which the same is said, together."""
    groups: dict[str, list[str]] = {}
    for name, fact in facts.items():
        groups.setdefault(fact, []).append(name)
    return "; ".join(f"{', '.join(names)} ({fact})" for fact, names in groups.items())


# --- differences ---

SAME_SPARSITY, SAME_SIZE = "same sparsity asked", "same size"


class LossDifference(Struct, frozen=True):
    """In nats per token, below 0 where the cell is better; None where it is no number."""

    difference: float | None
    low: float | None
    high: float | None
    ratio: float | None


class TaskDifference(Struct, frozen=True):
    """In the metric, of an accuracy above 0 where the cell is better; McNemar's exact p of right and wrong answers."""

    metric: str
    difference: float
    low: float | None
    high: float | None
    p: float | None


class Differences(Struct, frozen=True):
    """A cell against another one: by text and by task, with 95% intervals."""

    cell: str
    against: str
    kind: str
    perplexity: dict[str, LossDifference]
    tasks: dict[str, TaskDifference]


def differences(results: Results, base: str) -> list[Differences]:
    """Each cell against the base method's at the same sparsity asked, and against 2SSP's at its own size; paired over
    the same windows and documents.

    Args:
        base: a method's name.
    """
    return [
        _differences(results, cell, other, kind)
        for cell in results.pruned if not cell.matched_to and (cell.perplexity or cell.tasks)
        for other in results.done if (kind := _kind(cell, other, base))
    ]  # fmt: skip


def _kind(cell: CellResult, other: CellResult, base: str) -> str | None:
    if other.matched_to == cell.name:
        return SAME_SIZE
    alike = other.method == base != cell.method and other.matched_to is None and other.sparsity == cell.sparsity
    return SAME_SPARSITY if alike else None


def _differences(results: Results, cell: CellResult, other: CellResult, kind: str) -> Differences:
    by_text, by_task = {}, {}
    for text in cell.perplexity:
        if text in other.perplexity:
            gap = losses(results, text).gap(cell, other)
            difference, low, high = gap[:3] if gap else (None, None, None)
            by_text[text] = LossDifference(difference, low, high, exp(difference))
    for task, result in cell.tasks.items():
        if gap := accuracies(results, task).gap(cell, other):
            by_task[task] = TaskDifference(result.metric, *gap)
    return Differences(cell.name, other.name, kind, by_text, by_task)


def difference_table(compared: list[Differences]) -> Table:
    """A row per pair of cells and text or task."""
    columns: list[Column[Any]] = [
        Column("cell", "cell"),
        Column("against", "against"),
        Column("kind", "at the"),
        Column("measure", "measure"),
        Column("difference", "difference", form="+.4f"),
        Column("low", "95% from", form="+.4f"),
        Column("high", "to", form="+.4f"),
        Column("ratio", "ratio of perplexities", form=".3f"),
        Column("p", "McNemar p", form=".3g"),
        Column("better", "better"),
    ]
    rows = []
    for each in compared:
        named: list[tuple[str, LossDifference | TaskDifference]] = [
            *((f"nll, {text}", found) for text, found in each.perplexity.items()), *each.tasks.items(),
        ]  # fmt: skip
        rows += [
            {"cell": each.cell, "against": each.against, "kind": each.kind, "measure": measure,
             **{column.key: getattr(found, column.key, None) for column in columns[4:9]},
             "better": _better(each, found)}
            for measure, found in named
        ]  # fmt: skip
    notes = [
        "A difference is the cell's value less that of what it is compared against: of the loss in nats per token "
        "(below 0: the cell is better), or of the task's metric (of an accuracy above 0: the cell is better). "
        "Intervals: paired bootstrap over windows or documents. Better: where the interval excludes 0; where answers "
        f"are right or wrong, where McNemar's exact p is below {SURE:g}. Empty: not told apart, or not known."
    ]
    if any(each.kind == SAME_SIZE for each in compared):
        notes.append("`same size`: 2SSP with as many parameters removed.")
    return Table(columns, rows, notes=notes)


def _better(each: Differences, found: LossDifference | TaskDifference) -> str:
    """Which of the two is better as far as the test tells; "" where it does not, there is none, or it is not known
    which way a metric is better."""
    lower = isinstance(found, LossDifference)
    p = None if isinstance(found, LossDifference) else found.p
    known = isinstance(found, LossDifference) or is_accuracy(found.metric)
    if not told_apart(found.low, found.high, p) or not known or found.difference is None:
        return ""
    return each.cell if (found.difference < 0) == lower else each.against
