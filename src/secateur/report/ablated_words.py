"""What an ablation says in words: which value is best, by how much against the method's own default, and whether the
repeats over seeds, or the paired interval of a single one, carry it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.report.ablated import (
    ALL,
    Against,
    Group,
    Measure,
    Value,
    beside_the_default,
    between,
    groups,
    left_out_in_words,
    measures,
)
from secateur.report.ablated import spread as over_seeds
from secateur.report.looks import listed, method_name, number, percent, times
from secateur.report.results_before import Results
from secateur.report.verdict import SAME_SIZE, to_come, unfinished

_NAMED = 4  # of what is better, in the headline
_NBSP = "\u00a0"


@dataclass(frozen=True)
class Said:
    """What is said of an ablation of one method at one size.

    Attributes:
        best: the value with the best number; None where nothing was measured.
        gap: of the best value to the default; where it is the default, of the next one to it. None where there is none.
    """

    group: Group
    best: Value | None
    gap: Against | None
    text: str

    @property
    def title(self) -> str:
        return f"{self.group.what}, {method_name(self.group.of)} at {percent(self.group.sparsity)}"

    @property
    def judged(self) -> bool:
        """Whether there is a default, and something to hold against it."""
        return self.group.default is not None and self.gap is not None

    @property
    def better(self) -> bool:
        """Whether another value than the default is told to be better."""
        return self.judged and self.best is not self.group.default and bool(self.gap and self.gap.apart)

    @property
    def unsure(self) -> bool:
        """Another value has the better number, and no interval says whether that is more than chance."""
        return self.judged and self.best is not self.group.default and bool(self.gap and self.gap.apart is None)


@dataclass(frozen=True)
class AblationVerdict:
    """All that is said; `caveats` are what the reader must know."""

    headline: str
    said: tuple[Said, ...]
    caveats: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """What a terminal is told."""
        return [self.headline, "", *(f"{each.title}: {each.text}" for each in self.said)]


def ablation_verdict(results: Results) -> AblationVerdict:
    """By perplexity over the dense model's, all texts together; without a dense model by the first other measure."""
    measure = next(iter(measures(results)), None)
    said = tuple(_said(beside_the_default(results, group), measure) for group in groups(results))
    return AblationVerdict(_headline(said, measure) + to_come(results), said, tuple(_caveats(results, said)))


def _headline(said: Sequence[Said], measure: Measure | None) -> str:
    judged = [each for each in said if each.judged]
    if measure is None or not any(each.best for each in said):
        return "No verdict: nothing was measured yet."
    by = "perplexity" if measure.relative else measure.title
    if not judged:
        return f"Nothing can be held against a default by {by}: no ablation has its method's own and another value."
    better = [each for each in judged if each.better]
    good = len(judged) - len(better) - sum(each.unsure for each in judged)
    rest = f"In {good} of {len(judged)} the default is best, or level with the best."
    if not better:
        return f"By {by}, no value is told to be better than its method's own default. {rest}"
    named = _named(better, measure)
    more = [f"{len(named) - _NAMED} more"] if len(named) > _NAMED else []
    return f"Better than the method's own default, by {by}: {listed([*named[:_NAMED], *more])}. {rest}"


def _named(better: Sequence[Said], measure: Measure) -> list[str]:
    """By ablation and value: by how much at which sizes."""
    found: dict[str, list[str]] = {}
    for each in better:
        if each.best and each.gap:
            name = f"{each.group.what} {each.best.shown} of {method_name(each.group.of)}"
            size = percent(each.group.sparsity)
            found.setdefault(name, []).append(f"{_points(each.gap.difference, measure)} at {size}")
    return [f"{name} ({', '.join(sizes)})" for name, sizes in found.items()]


def _said(group: Group, measure: Measure | None) -> Said:
    if measure is None:
        return Said(group, None, None, "Nothing was measured yet.")
    running, others = _running(group)
    means = [(value, found) for value in running if (found := over_seeds(group, value, measure.of))]
    if not means:
        return Said(group, None, None, "No value has been measured over common seeds yet.")
    sign = 1 if measure.relative else -1
    ranked = sorted(means, key=lambda each: sign * each[1].mean)
    best, found = ranked[0]
    what = "lowest perplexity" if measure.relative else f"highest {measure.title}"
    level = shown(found.mean, measure) + (" the dense model's" if measure.key == ALL else "")
    gap = None
    if len(ranked) == 1:
        words = [f"{best.shown}: {level}{_spread(found.mean, found.sd, group, measure)}."]
    elif best is group.default:
        words = [f"The default, {best.shown}, has the {what}: {level}."]
        gap = between(group, ranked[1][0], best, measure)
        words.append(f"Next is {ranked[1][0].shown}: {_gap(gap, measure)}.")
    else:
        words = [f"{best.shown} has the {what}: {level}."]
        if group.default in running and group.default is not None:
            gap = between(group, best, group.default, measure)
            words.append(f"Against the default, {group.default.shown}: {_gap(gap, measure)}.")
    if group.default is None and len(ranked) > 1:
        own = f", {group.own}," if group.own else ""
        words.append(f"The method's own default{own} is not among the values.")
    if others:
        sizes = [f"{value.shown} ({percent(_removed(group, value))} removed)" for value in others]
        words.append(f"Of another size, hence not in the running: {listed(sizes)}.")
    return Said(group, best, gap, " ".join(words))


def _running(group: Group) -> tuple[list[Value], list[Value]]:
    """Values of one size, the default's (else the first one's), and those of another one."""
    there = [value for value in group.values if value.cells]
    size = _removed(group, group.default or there[0]) if there else None
    running: list[Value] = []
    others: list[Value] = []
    for value in there:
        removed = _removed(group, value)
        apart = value.matched_to or (None not in (removed, size) and abs((removed or 0) - (size or 0)) > SAME_SIZE)
        (others if apart else running).append(value)
    return running, others


def _removed(group: Group, value: Value) -> float | None:
    found = over_seeds(group, value, lambda cell: cell.removed)
    return found.mean if found else None


def shown(value: float, measure: Measure) -> str:
    """A number of a measure, as people read it."""
    return times(value) if measure.key == ALL else number(value) if measure.relative else percent(value)


def deviation(sd: float, measure: Measure) -> str:
    """A standard deviation, in the measure's unit: two digits, for it is known no better."""
    return number(sd, 2) if measure.relative else percent(sd)


def _spread(mean: float, sd: float | None, group: Group, measure: Measure) -> str:
    if sd is None:
        return ", of one seed"
    return f", ± {deviation(sd, measure)} over {len(group.seeds)} seeds ({percent(sd / mean)} of it)"


def difference_in_words(gap: Against, measure: Measure) -> str:
    """A table's entry: +1.20% ± 0.31 with the spread over seeds, +1.20% (+0.40 to +2.00) with the interval of one."""
    text = _signed(gap.difference, measure)
    if gap.sd is not None:
        return f"{text} ± {100 * gap.sd:.2f}"
    if gap.low is None or gap.high is None:
        return text
    return f"{text} ({100 * gap.low:+.2f} to {100 * gap.high:+.2f})"


def _signed(difference: float, measure: Measure) -> str:
    return f"{100 * difference:+.2f}{'%' if measure.relative else ' points'}"


def typeset(text: str) -> str:
    """As a page has it, where there is a minus sign and no line begins with a unit."""
    return text.replace("-", "\u2212").replace("%", f"{_NBSP}%").replace(" points", f"{_NBSP}points")


def _points(difference: float, measure: Measure) -> str:
    return typeset(_signed(difference, measure))


def _interval(gap: Against, measure: Measure) -> str:
    return f"{_points(gap.low or 0.0, measure)} to {_points(gap.high or 0.0, measure)}"


def _gap(gap: Against | None, measure: Measure) -> str:
    if gap is None:
        return "a difference that is not known"
    text = _points(gap.difference, measure)
    if gap.sd is not None:
        text += f" ± {100 * gap.sd:.2f} over {gap.seeds} seeds"
    if gap.apart is None or gap.low is None or gap.high is None:
        return f"{text}; there is no interval, so it is not known whether that is chance"
    text += f" (95{_NBSP}% interval {_interval(gap, measure)})"
    if gap.seeds > 1:
        return f"{text}; the repeats over seeds {'carry' if gap.apart else 'do not carry'} it"
    return f"{text}; the paired interval {'carries' if gap.apart else 'does not carry'} it, for this one seed"


def _caveats(results: Results, said: Sequence[Said]) -> list[str]:
    told = unfinished(results)
    told += [
        f"{each.title}: the default, {value.shown}, is taken from {value.taken_from}: the same pruning."
        for each in said for value in each.group.values if value.taken_from
    ]  # fmt: skip
    told += [left_out_in_words(each.group) for each in said if each.group.left_out]
    counts = sorted({len(each.group.seeds) for each in said} - {0})
    if counts and counts[0] == 1:
        told.append("Of one seed: how much the draw of the calibration matters is not known there.")
    elif counts and counts[0] < 4:
        told.append(f"{counts[0]} seeds are few: intervals over them are wide, and what they do not carry may be real.")
    if any(len(each.group.values) > 2 for each in said):
        told.append(
            "The best of many values is so by chance too: no interval here is corrected for how many were tried."
        )
    if not results.tasks:
        told.append("No tasks were run. Perplexity alone does not tell what a model can still do.")
    told += [f"{task} is in no average: {why}." for task, why in results.average.left_out.items()]
    return told
