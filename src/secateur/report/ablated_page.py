"""An ablation's page: the numbers of its plots, and its table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from secateur.report.ablated import Group, Measure, Value, against, beside_the_default, groups, measures, spread
from secateur.report.ablated_words import AblationVerdict, deviation, difference_in_words, shown, typeset
from secateur.report.html import make_html
from secateur.report.looks import method_name, number, percent, seconds, size_looks
from secateur.report.results_before import CellResult, Results, finite_or_none
from secateur.report.table import Entry

_DECADE = 10.0  # from this ratio on an axis is logarithmic
_SHORT = {"perplexity over dense": "all"}


def ablation_figures(results: Results) -> dict[str, Any]:
    """What the plots show, in plain JSON.

    Returns:
        `measures` (key, title, short, log, share), `sizes` (of the lines: size, name, colour, symbol, marker),
        `sparsities`, and `plots`, one per ablation and method: `name` (of a file), `what`, `title`, `numbers` (whether
        values are), `log` (whether their axis is), `values` (shown, x, default) and `lines`, one per size; a line's
        `points` have `value` (its place), `y` (by measure: mean, sd or None, `each` by seed), `against` and `hollow`.
    """
    known = measures(results)
    found = [beside_the_default(results, group) for group in groups(results)]
    looks = size_looks(sizes := sorted({group.sparsity for group in found}, key=lambda each: each or 0.0))
    together: dict[tuple[str, str], list[Group]] = {}
    for group in found:
        together.setdefault((group.what, group.of), []).append(group)
    return {
        "measures": [
            {"key": each.key, "title": each.title, "short": _short(each), "log": each.relative,
             "share": not each.relative} for each in known
        ],
        "start": known[0].key if known else None,
        "sparsities": results.sparsities,
        "methods": [],
        "sizes": [{"size": size, **vars(look)} for size, look in zip(sizes, looks, strict=True)],
        "plots": [_plot(some, known) for some in together.values()],
    }  # fmt: skip


def _short(measure: Measure) -> str:
    return _SHORT.get(measure.title, measure.title.removeprefix("perplexity, "))


def _plot(some: Sequence[Group], known: Sequence[Measure]) -> dict[str, Any]:
    """One ablation of one method: a line per size."""
    names = list(dict.fromkeys(value.shown for group in some for value in group.values))
    at = _numbers(names)
    if at:
        names = [name for _, name in sorted(zip(at, names, strict=True))]
        at.sort()
    what, of = some[0].what, some[0].of
    return {
        "name": "ablation-" + re.sub(r"[^A-Za-z0-9._-]+", "_", f"{what}-{of}"),
        "what": what,
        "title": f"{what}, {method_name(of)}",
        "numbers": bool(at),
        "log": bool(at) and at[0] > 0 and at[-1] / at[0] >= _DECADE,
        "values": [
            {"shown": name, "x": at[place] if at else place, "default": name == some[0].own}
            for place, name in enumerate(names)
        ],
        "lines": [
            {"size": group.sparsity, "points": [
                _point(group, value, names.index(value.shown), known)
                for value in sorted(group.values, key=lambda each: names.index(each.shown)) if value.cells
            ]} for group in some
        ],
    }  # fmt: skip


def _numbers(names: Sequence[str]) -> list[float]:
    """All values as numbers; nothing where one is a word, or where there is one only."""
    try:
        found = [float(name) for name in names]
    except ValueError:
        return []
    return found if len(found) > 1 and all(map(math.isfinite, found)) else []


def _point(group: Group, value: Value, place: int, known: Sequence[Measure]) -> dict[str, Any]:
    y, told = {}, {}
    for measure in known:
        if found := spread(group, value, measure.of):
            each = {str(seed): measure.of(value.cells[seed]) for seed in group.seeds}
            y[measure.key] = {"mean": found.mean, "sd": found.sd, "each": each}
        if gap := against(group, value, measure):
            told[measure.key] = typeset(difference_in_words(gap, measure))
    return {"value": place, "y": y, "against": told, "hollow": bool(value.matched_to)}


# --- the table ---


@dataclass(frozen=True)
class AblationColumn:
    """A column of numbers; `key` is the measure that it belongs to, "" if to none."""

    heading: str
    hint: str
    key: str
    entry: Callable[[Group, Value], Entry]


@dataclass(frozen=True)
class AblationRow:
    """One value of an ablation at one size; `first` of them, so that a line parts it from what stands above."""

    group: Group
    value: Value
    first: bool
    entries: list[Entry]


def ablation_columns(results: Results) -> list[AblationColumn]:
    found = [_mean("removed", f"share of {results.whose} that is gone", lambda cell: cell.removed, percent, percent)]
    for measure in measures(results):
        found += [
            _mean(
                measure.title, "mean and standard deviation over seeds", measure.of,
                partial(shown, measure=measure), partial(deviation, measure=measure), measure.key,
            ),
            AblationColumn(
                "against default", f"{measure.title}: difference to the method's own default, paired by seed",
                measure.key, partial(_against, measure=measure),
            ),
        ]  # fmt: skip
    found.append(_mean("pruning, CPU", "of the pruning itself", _cost("cpu_s"), seconds, seconds))
    found.append(_mean("forwards", "full-length forwards that it runs", _cost("forwards"), number, number))
    return found


def ablation_rows(results: Results, wanted: Sequence[AblationColumn]) -> list[AblationRow]:
    return [
        AblationRow(group, value, place == 0, [column.entry(group, value) for column in wanted])
        for group in (beside_the_default(results, each) for each in groups(results))
        for place, value in enumerate(group.values)
    ]


def _cost(name: str) -> Callable[[CellResult], float | None]:
    return lambda cell: finite_or_none((cell.data.get("prune") or {}).get(name))


def _mean(
    heading: str,
    hint: str,
    of: Callable[[CellResult], float | None],
    form: Callable[[float], str],
    spread_form: Callable[[float], str],
    key: str = "",
) -> AblationColumn:
    def entry(group: Group, value: Value) -> Entry:
        found = spread(group, value, of)
        if found is None:
            return Entry("–", None)
        return Entry(form(found.mean) + (f" ± {spread_form(found.sd)}" if found.sd else ""), found.mean)

    return AblationColumn(heading, hint, key, entry)


def _against(group: Group, value: Value, measure: Measure) -> Entry:
    """Bold here: told from the default, for better or worse; with a question mark: that is not known."""
    found = against(group, value, measure)
    if found is None:
        return Entry("default" if value is group.default else "–", None)
    words = typeset(difference_in_words(found, measure))
    return Entry(words, found.difference, best=bool(found.apart), unsure=found.apart is None)


def render_ablation(results: Results, said: AblationVerdict, drawn: Mapping[str, Any]) -> str:
    """The page's HTML.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    wanted = ablation_columns(results)
    cards = groupby(said.said, key=lambda each: (each.group.what, each.group.of))
    return make_html(
        "ablation.html", "ablation.js", results, drawn, verdict=said, columns=wanted,
        rows=ablation_rows(results, wanted), cards=[(what, of, list(some)) for (what, of), some in cards],
        sizes={each["size"]: each for each in drawn["sizes"]},
    )  # fmt: skip
