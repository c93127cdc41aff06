"""An ablation: one choice of one method, what its values give over seeds, and what each does against the method's own
default. The seeds draw the calibration, so two values are compared seed by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from secateur.errors import UnknownNameError
from secateur.judge.statistics import interval_of_mean, mean_and_sd, told_apart
from secateur.methods import as_before, get_method
from secateur.report.comparing import ALL, LARGEST, Measure, accuracies, losses
from secateur.report.looks import listed, number, percent
from secateur.report.main_table import at, average_notes, cell_notes, failures, write
from secateur.report.results import DENSE, MISSING, AblationTerms, CellResult, Results, dumps, read_results
from secateur.report.short_table import by_text_and_task, in_form, measured, size_key
from secateur.report.table import Column, Row, Table, Value, as_json, comma_separated, latex, markdown, rows_of

NAME = "ablation-table"
TEXT = "c4"  # that both papers calibrate on
Of = Callable[[CellResult], float | None]


@dataclass(frozen=True, eq=False)
class AblatedValue:
    """One value of the choice: a row of the table.

    Attributes:
        shown: the value, as the tables have it.
        method: of its cells; the inverted order of 2SSP has one of its own.
        cells: the finished ones, by seed.
        failed: how many are not.
        matched_to: the cell at whose achieved size its first one was made.
    """

    shown: str
    method: str
    cells: Mapping[int, CellResult]
    failed: int
    matched_to: str | None


@dataclass(frozen=True)
class Group:
    """An ablation of one method at one sparsity: values that can be compared.

    Attributes:
        of: the method.
        values: in the order of the cells.
        own: the default of the method, as the tables show a value; None where it has no fixed one.
    """

    what: str
    of: str
    sparsity: float | None
    values: tuple[AblatedValue, ...]
    own: str | None

    @property
    def default(self) -> AblatedValue | None:
        """The value that is the default; None where it is not there."""
        return next((value for value in self.values if value.shown == self.own and value.cells), None)

    @property
    def seeds(self) -> list[int]:
        """That all values have of which any cell is finished. Means are over these, not over other draws in each."""
        finished = [set(value.cells) for value in self.values if value.cells]
        return sorted(set.intersection(*finished)) if finished else []

    @property
    def left_out(self) -> int:
        """How many finished cells are of other seeds."""
        return sum(len(value.cells) - len(self.seeds) for value in self.values if value.cells)


def groups(results: Results) -> list[Group]:
    """By ablation, method and sparsity, in the order of the cells. A matched cell belongs to the sparsity of the one
    that it stands beside."""
    by_group: dict[tuple[str, str, float | None], dict[str, list[CellResult]]] = {}
    for cell in results.pruned:
        if terms := cell.ablation:
            values = by_group.setdefault((terms.what, terms.of, results.size_of(cell)), {})
            values.setdefault(terms.value, []).append(cell)
    return [
        Group(*key, tuple(_choice(shown, cells) for shown, cells in values.items()),
              own_default(_terms(next(iter(values.values()))[0])))
        for key, values in by_group.items()
    ]  # fmt: skip


def _terms(cell: CellResult) -> AblationTerms:
    assert cell.ablation is not None  # narrows the type
    return cell.ablation


def _choice(shown: str, cells: Sequence[CellResult]) -> AblatedValue:
    done = {_terms(cell).seed: cell for cell in cells if cell.done}
    return AblatedValue(shown, cells[0].method, done, len(cells) - len(done), cells[0].matched_to)


def left_out_in_words(group: Group) -> str:
    return (
        f"{group.what} of {group.of} at {percent(group.sparsity)}: finished cells left out, whose seeds not all values "
        f"have: {group.left_out}. Means are over seeds: {listed([str(seed) for seed in group.seeds])}."
    )


def own_default(terms: AblationTerms) -> str | None:
    """What the ablated choice is in the method by itself; None where the model or the budget decides."""
    varied = _varied(terms, terms.value)
    if varied == []:  # an ablation of no option: the method as it is has its name
        return terms.of
    return str(varied[0][1]) if varied and len(varied) == 1 and varied[0][1] is not None else None


def _varied(terms: AblationTerms, value: str) -> list[tuple[str, Any]] | None:
    """What is varied, and what it is in the method by itself: what the `terms` lack, which name the whole calibration
    and all options but that. More than one of a cell that an earlier version made; None where the method is not known.

    An option that would not take the value is not what is varied: the order of rows and columns is no option, though
    2SSP has one of that name.
    """
    try:
        method = get_method(terms.of)
    except UnknownNameError:  # of a package that is not here
        return None
    options = {
        f"{method.name}.{name}": option.default for name, option in method.options.items()
        if option.accepts(option.parse(value))
    }  # fmt: skip
    own = {"text": TEXT, "samples": method.samples, "length": method.length, **options}
    missing = [(name, default) for name, default in own.items() if name not in terms.terms]
    known = {f"{method.name}.{name}" for name in method.options.keys() - as_before(method.name, method.complete({}))}
    return [(name, default) for name, default in missing if name not in known] or missing


# --- what is measured ---


def measures(results: Results) -> list[Measure]:
    """All texts together first where there is a dense model, then each, then the tasks."""
    overall = [losses(results)] if results.dense and results.averaged_texts else []
    return [*overall, *by_text_and_task(results)]


# --- over seeds ---


class Spread(NamedTuple):
    """A mean over seeds and its standard deviation; None for the latter of one seed."""

    mean: float
    sd: float | None


def spread(group: Group, value: AblatedValue, of: Of) -> Spread | None:
    """Over the group's seeds; None where one of them has no number."""
    numbers = [of(value.cells[seed]) for seed in group.seeds] if value.cells else []
    known = [each for each in numbers if each is not None]
    return Spread(*mean_and_sd(known)) if known and len(known) == len(numbers) else None


class Against(NamedTuple):
    """The difference of a value to another: the mean over pairs of one seed. Of perplexities it is relative (0.02: 2 %
    higher), of accuracies in the measure itself.

    Attributes:
        sd: over the seeds; None for a single one.
        low, high: the 95 % interval: over the seeds by Student's t; of a single seed the paired bootstrap's over
            windows or documents. None where there is none.
        seeds: how many.
        apart: whether it is told from no difference; None where that is not known.
    """

    difference: float
    sd: float | None
    low: float | None
    high: float | None
    seeds: int
    apart: bool | None


def against(group: Group, value: AblatedValue, measure: Measure) -> Against | None:
    """A value against the default; None for the default itself, and where one of the two is not measured."""
    return None if group.default is None else between(group, value, group.default, measure)


def between(group: Group, value: AblatedValue, other: AblatedValue, measure: Measure) -> Against | None:
    """A value against another one, seed by seed."""
    if value is other or not value.cells or not other.cells or not group.seeds:
        return None
    pairs = [(value.cells[seed], other.cells[seed]) for seed in group.seeds]
    scale = _relative if measure.lower else float
    if len(pairs) == 1:
        gap = measure.gap(*pairs[0])
        if gap is None:
            return None
        low, high = (None if edge is None else scale(edge) for edge in (gap.low, gap.high))
        return Against(scale(gap.difference), None, low, high, 1, gap.apart)
    differences = [measure.difference(*pair) for pair in pairs]
    known = [scale(each) for each in differences if each is not None]
    if len(known) < len(differences):
        return None
    low, high = interval_of_mean(known) or (None, None)
    return Against(*mean_and_sd(known), low, high, len(known), told_apart(low, high))


def _relative(nats: float) -> float:
    return math.expm1(min(nats, LARGEST))


def signed(difference: float, measure: Measure) -> str:
    return f"{100 * difference:+.2f}{'%' if measure.lower else ' points'}"


def difference_in_words(gap: Against, measure: Measure) -> str:
    """A table's entry: +1.20% ± 0.31 with the spread over seeds, +1.20% (+0.40 to +2.00) with the interval of one."""
    if gap.sd is not None:
        return f"{signed(gap.difference, measure)} ± {100 * gap.sd:.2f}"
    if gap.low is None or gap.high is None:
        return signed(gap.difference, measure)
    return f"{signed(gap.difference, measure)} ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})"


# --- the table ---


class _Row(NamedTuple):
    """What a row is of: a value of a group, or the dense model."""

    group: Group | None
    value: AblatedValue | None
    dense: CellResult | None = None


def write_ablation_table(folder: Path) -> None:
    """Write the tables of all cells that are there.

    Raises:
        OutputError: a file cannot be written.
    """
    results = read_results(folder)
    table = ablation_table(results, groups(results))
    title = f"{results.index.model.name}: ablations."
    short = [markdown(short_ablation_table(results, groups(results), each)) for each in by_text_and_task(results)]
    write(folder, {
        f"{NAME}.md": "\n".join([f"# {title}\n", *short, "## All columns\n", markdown(table)]),
        f"{NAME}.csv": comma_separated(table), f"{NAME}.json": dumps(as_json(table)),
        f"{NAME}.tex": latex(table, caption=title),
    })  # fmt: skip


def ablation_table(results: Results, shown: Sequence[Group]) -> Table:
    """The dense row, then by ablation, method, sparsity and value in the order of the cells, all seeds in one.

    The lowest mean is not bold: it may be so by chance. Bold is what is told from the default, for better or worse.
    """
    cells = [cell for cell in results.cells if cell.status != MISSING]
    columns = list(_columns(results, cells))
    sources = [_Row(group, value) for group in shown for value in group.values]
    if results.dense:
        sources.insert(0, _Row(None, None, results.dense))
    rows = [
        {**row, "matched_to": source.value.matched_to if source.value else None, "group": _key(source.group)}
        for row, source in zip(rows_of(columns, sources), sources, strict=True)
    ]
    notes = [
        "Mean ± standard deviation over seeds: draws of the calibration windows (seed 0: the first ones).",
        "Against the default: the difference to the method's own default with the same seed, ± its standard deviation "
        "over seeds; of one seed, with the 95 % interval of a paired bootstrap over windows or documents. Relative for "
        "perplexity. Empty where the default is not among the values. Bold: told from it, for better or worse; the "
        "lowest mean of many values may be so by chance.",
        *(left_out_in_words(group) for group in shown if group.left_out),
        *average_notes(results.average), *failures(cells), *cell_notes(cells),
    ]  # fmt: skip
    keys = [column.key for column in columns if column.sort]
    bold, unsure = ({key: [place for place, row in enumerate(rows) if _apart(row, key) is sure] for key in keys}
                    for sure in (True, None))  # fmt: skip
    return Table(columns, rows, "group", bold, unsure, notes)


def short_ablation_table(results: Results, shown: Sequence[Group], measure: Measure) -> Table:
    """A row per value of an ablation, a column per size: the mean over seeds, with its standard deviation.

    Args:
        shown: of which groups.
    """
    sizes = sorted({group.sparsity for group in shown if group.sparsity is not None})
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    apart: set[tuple[int, str]] = set()
    for group in shown:
        for value in group.values:
            row = rows.setdefault((group.of, group.what, value.shown), {})
            over, key = spread(group, value, measure.shown), size_key(group.sparsity or 0.0)
            if over is None:
                continue
            sd = "" if over.sd is None else f" ± {number(over.sd, 2) if measure.lower else percent(over.sd)}"
            row[key] = in_form(measure, over.mean) + sd
            gap = against(group, value, measure)
            if gap and gap.apart:
                apart.add((list(rows).index((group.of, group.what, value.shown)), key))
    own = {(group.of, group.what): group.own for group in shown}
    several = len({group.of for group in shown}) > 1
    told: list[Row] = [
        {
            "what": f"{of}: {what}" if several else what,
            "value": value + (" (default)" if value == own[of, what] else ""),
            **row,
        }
        for (of, what, value), row in rows.items()
    ]
    columns: list[Column[Any]] = [Column("what", "ablation"), Column("value", "value"),
               *(Column(size_key(size), percent(size), form="s") for size in sizes)]  # fmt: skip
    draws = sorted({len(group.seeds) for group in shown}) or [0]
    how_many = f"{draws[-1]}" if draws[0] == draws[-1] else f"{draws[0]} to {draws[-1]}"
    over_seeds = f" Mean ± standard deviation over {how_many} draws of the calibration." if draws[-1] > 1 else ""
    notes = [
        f"{measured(results, measure)}{over_seeds} Bold: told from the default, for better or worse, by the 95% "
        "interval of the difference seed by seed (wide for few seeds; of one, over windows or documents)."
    ]
    return Table(
        columns, told, bold={size_key(s): [n for n, key in apart if key == size_key(s)] for s in sizes}, notes=notes
    )


def _apart(row: Row, key: str) -> bool | None:
    """Whether a value is told from the default; False where there is nothing to tell."""
    against = key.removesuffix(":shown")
    return False if row[against] is None else cast("bool | None", row[f"{against}:apart"])


def _key(group: Group | None) -> str:
    return f"{group.what} {group.of} {group.sparsity}" if group else DENSE


def _columns(results: Results, cells: Sequence[CellResult]) -> Iterator[Column[_Row]]:
    done = all(cell.done for cell in cells)
    yield Column("what", "ablation", lambda row: row.group.what if row.group else DENSE, page="")
    yield Column("value", "value", lambda row: row.value.shown if row.value else "", page="")
    yield Column("method", "method", lambda row: row.value.method if row.value else DENSE, page="")
    yield Column("sparsity", "asked", lambda row: row.group.sparsity if row.group else None, ".4g", page="")
    yield Column("seeds", "seeds", _seeds, "d", page="")
    yield Column("failed", "failed", lambda row: row.value.failed if row.value else 0, "d", hidden=done, page="")
    yield _mean("achieved", "removed", ".2%", lambda cell: cell.removed, hint=f"share of {results.whose}")
    for measure in measures(results):
        if measure.key == ALL:
            yield _mean(ALL, measure.title, number, measure.shown, files=False)
            yield from _against_columns(measure, files=False)
        elif measure.lower:
            yield _mean(measure.key, measure.title, ".2f", measure.shown)
            yield from _against_columns(measure)
    average = results.average
    for task in results.tasks:
        share = average.is_share(task)
        title = task if share else f"{task}, {average.metrics[task]}"
        yield _mean(
            f"task:{task}", title, ".1%" if share else ".4g", accuracies(results, task).shown, grey=task in average.grey
        )
    for measure in measures(results):
        if not measure.lower:
            yield _mean("task_average", f"average of {average.metric}", ".1%", results.accuracy)
            yield from _against_columns(measure)
    yield _mean("prune_cpu_s", "pruning, CPU s", ",.0f", at("prune.cpu_s"))
    yield _mean("forwards", "forwards", ",.0f", at("prune.forwards"))


def _seeds(row: _Row) -> int:
    if row.dense:
        return 1
    return len(row.group.seeds) if row.group and row.value and row.value.cells else 0


def _mean(key: str, title: str, form: str | Callable[[float], str], of: Of, **more: Any) -> Column[_Row]:
    """The mean over seeds, with its standard deviation; the dense model's own number."""

    def over_seeds(row: _Row) -> Spread | None:
        if row.dense:
            return None if (value := of(row.dense)) is None else Spread(value, None)
        return spread(row.group, row.value, of) if row.group and row.value else None

    return Column(
        key, title, lambda row: getattr(over_seeds(row), "mean", None), form,
        sd=lambda row: getattr(over_seeds(row), "sd", None), **more,
    )  # fmt: skip


def _against_columns(measure: Measure, *, files: bool = True) -> Iterator[Column[_Row]]:
    """In words for readers; its numbers in the files of numbers."""
    key, title = f"against:{measure.key}", f"{measure.title}, against the default"

    def of(row: _Row) -> Against | None:
        return against(row.group, row.value, measure) if row.group and row.value else None

    def words(row: _Row) -> Value:
        if gap := of(row):
            return difference_in_words(gap, measure)
        return "default" if row.group and row.value is row.group.default and row.value else None

    def part(name: str) -> Callable[[_Row], float | None]:
        return lambda row: getattr(of(row), name, None)

    yield Column(f"{key}:shown", title, words, "s", files=files, sort=key)
    yield Column(key, title, part("difference"), ".4g", sd=part("sd"), hidden=True, files=files)
    for edge in ("low", "high"):
        yield Column(f"{key}:{edge}", f"{title}, {edge}", part(edge), ".4g", hidden=True, files=files)
    yield Column(f"{key}:apart", "", part("apart"), hidden=True, files=False)
