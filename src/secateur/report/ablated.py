"""An ablation as Python: one choice of one method, what its values give over seeds, and what each does against the
method's own default. The seeds draw the calibration, so two values are compared seed by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from secateur.errors import UnknownNameError
from secateur.judge.statistics import interval_of_mean, mean_and_sd, told_apart
from secateur.methods import get_method
from secateur.report.compared import (
    Gap,
    accuracy,
    accuracy_difference,
    accuracy_gap,
    loss_difference,
    loss_gap,
)  # fmt: skip
from secateur.report.looks import listed, percent
from secateur.report.results_before import CellResult, Results

ALL = "*"  # all texts together: the geometric mean of perplexity over the dense model's
ACCURACY = "accuracy"  # the mean over the tasks that count
TEXT = "c4"  # that both papers calibrate on
_MOST = 700.0  # nats whose exponential is still a number


@dataclass(frozen=True, eq=False)
class Value:
    """One value of the choice: a row of the table.

    Attributes:
        shown: the value, as the tables have it.
        method: of its cells; the inverted order of 2SSP has one of its own.
        cells: the finished ones, by seed.
        failed: how many are not.
        matched_to: the cell at whose achieved size its first one was made.
        taken_from: the ablation that its cells are of, where they are another one's.
    """

    shown: str
    method: str
    cells: Mapping[int, CellResult]
    failed: int
    matched_to: str | None
    taken_from: str | None = None


@dataclass(frozen=True)
class Group:
    """An ablation of one method at one sparsity: values that can be compared.

    Attributes:
        of: the method.
        values: in the order of the cells.
        own: the default of the method, as the tables show a value; None where it has no fixed one.
        default: the value that is the default; None where it is not there.
        seeds: that all values have of which any cell is finished. Means are over these: else they would be of other
            draws.
        left_out: finished cells of other seeds.
    """

    what: str
    of: str
    sparsity: float | None
    values: tuple[Value, ...]
    own: str | None
    default: Value | None
    seeds: tuple[int, ...]
    left_out: int


def groups(results: Results) -> list[Group]:
    """By ablation, method and sparsity, in the order of the cells. A matched cell belongs to the sparsity of the one
    that it stands beside."""
    found: dict[tuple[str, str, float | None], list[CellResult]] = {}
    for cell in results.pruned:
        if told := cell.data.get("ablation"):
            found.setdefault((told["what"], told["of"], results.size_of(cell)), []).append(cell)
    return [_group(*key, _values(cells), own_default(cells[0].data["ablation"])) for key, cells in found.items()]


def beside_the_default(results: Results, group: Group) -> Group:
    """A value that is alone, beside its method's default from another ablation of the folder: the same pruning, but for
    the one choice. The group itself where it has more values, or there is none."""
    value = group.values[0]
    if len(group.values) > 1 or group.own in (None, value.shown) or not value.cells:
        return group
    first = next(iter(value.cells.values())).data["ablation"]
    wanted = _settings({**first, "value": group.own})
    found = [
        cell for cell in results.pruned
        if cell.done and cell.method == group.of and not cell.matched_to and cell.sparsity == group.sparsity
        and wanted and _settings(cell.data.get("ablation") or {}) == wanted
        and cell.data["ablation"]["seed"] in value.cells
    ]  # fmt: skip
    if not found:
        return group
    default = _value(str(group.own), found, found[0].data["ablation"]["what"])
    return _group(group.what, group.of, group.sparsity, (default, value), group.own)


def _settings(told: Mapping[str, Any]) -> dict[str, str]:
    """The whole calibration and all options of a cell of an ablation; nothing where they are not known."""
    varied = _varied(told)
    if varied is None or len(varied) != 1:
        return {}
    return {name: str(each) for name, each in {**told["terms"], varied[0][0]: told["value"]}.items()}


def _values(cells: Sequence[CellResult]) -> tuple[Value, ...]:
    by_value: dict[str, list[CellResult]] = {}
    for cell in cells:
        by_value.setdefault(str(cell.data["ablation"]["value"]), []).append(cell)
    return tuple(_value(shown, some) for shown, some in by_value.items())


def _group(what: str, of: str, sparsity: float | None, values: tuple[Value, ...], own: str | None) -> Group:
    finished = [set(value.cells) for value in values if value.cells]
    seeds = sorted(set.intersection(*finished)) if finished else []
    return Group(
        what, of, sparsity, values, own, next((v for v in values if v.shown == own and v.cells), None), tuple(seeds),
        sum(map(len, finished)) - len(seeds) * len(finished),
    )  # fmt: skip


def left_out_in_words(group: Group) -> str:
    return (
        f"{group.what} of {group.of} at {percent(group.sparsity)}: finished cells left out, whose seeds not all values "
        f"have: {group.left_out}. Means are over seeds: {listed([str(seed) for seed in group.seeds])}."
    )


def _value(shown: str, cells: Sequence[CellResult], taken_from: str | None = None) -> Value:
    done = {cell.data["ablation"]["seed"]: cell for cell in cells if cell.done}
    return Value(shown, cells[0].method, done, len(cells) - len(done), cells[0].matched_to, taken_from)


def own_default(told: Mapping[str, Any]) -> str | None:
    """What the ablated choice is in the method by itself; None where the model or the budget decides.

    Args:
        told: a cell's `ablation`.
    """
    varied = _varied(told)
    if varied == []:  # an ablation of no option: the method as it is has its name
        return str(told["of"])
    return str(varied[0][1]) if varied and len(varied) == 1 and varied[0][1] is not None else None


def _varied(told: Mapping[str, Any]) -> list[tuple[str, Any]] | None:
    """What is varied, and what it is in the method by itself: what the `terms` lack, which name the whole calibration
    and all options but that. More than one of a cell that an earlier version made; None where the method is not known.

    An option that would not take the value is not what is varied: the order of rows and columns is no option, though
    2SSP has one of that name.
    """
    try:
        method = get_method(told.get("of", ""))
    except UnknownNameError:  # of a package that is not here
        return None
    options = {
        f"{method.name}.{name}": option.default for name, option in method.options.items()
        if option.accepts(option.parse(told["value"]))
    }  # fmt: skip
    own = {"text": TEXT, "samples": method.samples, "length": method.length, **options}
    return [(name, value) for name, value in own.items() if name not in told.get("terms", {})]


# --- what is measured ---


@dataclass(frozen=True)
class Measure:
    """What values are compared by.

    Attributes:
        key: ALL, a text after "perplexity:", or ACCURACY.
        of: a cell's number.
        difference, gap: of two cells, without and with an interval; of perplexities in nats.
    """

    key: str
    title: str
    of: Callable[[CellResult], float | None]
    difference: Callable[[CellResult, CellResult], float | None]
    gap: Callable[[CellResult, CellResult], Gap | None]

    @property
    def relative(self) -> bool:
        """Perplexities are compared by their ratio, accuracies by their difference."""
        return self.key != ACCURACY


def measures(results: Results) -> list[Measure]:
    """All texts together first where there is a dense model, then each, then the tasks."""
    found = [_over_dense(results, results.dense)] if results.dense and results.averaged_texts else []
    found += [_perplexity(results, text) for text in results.texts]
    tasks = results.average.tasks
    if tasks:
        found.append(
            Measure(
                ACCURACY, f"mean {results.average.metric}", lambda cell: accuracy(results, cell),
                lambda a, b: accuracy_difference(a, b, tasks), lambda a, b: accuracy_gap(a, b, tasks),
            )
        )  # fmt: skip
    return found


def _over_dense(results: Results, dense: CellResult) -> Measure:
    texts = results.averaged_texts
    return Measure(
        ALL, "perplexity over dense", lambda cell: _exp(loss_difference(cell, dense, texts)),
        lambda a, b: loss_difference(a, b, texts), lambda a, b: loss_gap(a, b, texts),
    )  # fmt: skip


def _perplexity(results: Results, text: str) -> Measure:
    return Measure(
        f"perplexity:{text}", f"perplexity, {text}", lambda cell: results.perplexity(cell, text),
        lambda a, b: loss_difference(a, b, (text,)), lambda a, b: loss_gap(a, b, (text,)),
    )  # fmt: skip


def _exp(nats: float | None) -> float | None:
    return math.exp(nats) if nats is not None and nats < _MOST else None


# --- over seeds ---


class Spread(NamedTuple):
    """A mean over seeds and its standard deviation; None for the latter of one seed."""

    mean: float
    sd: float | None


def spread(group: Group, value: Value, of: Callable[[CellResult], float | None]) -> Spread | None:
    """Over the group's seeds; None where one of them has no number."""
    found = [of(value.cells[seed]) for seed in group.seeds] if value.cells else []
    known = [each for each in found if each is not None]
    return Spread(*mean_and_sd(known)) if known and len(known) == len(found) else None


@dataclass(frozen=True)
class Against:
    """The difference of a value to the default: the mean over pairs of one seed.

    Of perplexities it is relative (0.02: 2 % higher), of accuracies in the measure itself.

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


def against(group: Group, value: Value, measure: Measure) -> Against | None:
    """A value against the default; None for the default itself, and where one of the two is not measured."""
    return None if group.default is None else between(group, value, group.default, measure)


def between(group: Group, value: Value, other: Value, measure: Measure) -> Against | None:
    """A value against another one, seed by seed."""
    if value is other or not value.cells or not other.cells or not group.seeds:
        return None
    pairs = [(value.cells[seed], other.cells[seed]) for seed in group.seeds]
    scale = _relative if measure.relative else float
    if len(pairs) == 1:
        gap = measure.gap(*pairs[0])
        if gap is None:
            return None
        low, high = (None if edge is None else scale(edge) for edge in (gap.low, gap.high))
        return Against(scale(gap.difference), None, low, high, 1, gap.apart)
    found = [measure.difference(*pair) for pair in pairs]
    known = [scale(each) for each in found if each is not None]
    if len(known) < len(found):
        return None
    mean, sd = mean_and_sd(known)
    low, high = interval_of_mean(known) or (None, None)
    return Against(mean, sd, low, high, len(known), told_apart(low, high))


def _relative(nats: float) -> float:
    return math.expm1(min(nats, _MOST))
