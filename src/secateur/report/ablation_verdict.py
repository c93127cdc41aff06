"""What an ablation says in words: which value is best, by how much against the method's own default, and whether the
repeats over seeds, or the paired interval of a single one, carry it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from secateur.report.ablation import (
    AblatedValue,
    Against,
    Group,
    between,
    groups,
    left_out_in_words,
    measures,
    signed,
    spread,
)
from secateur.report.comparing import ALL, Measure
from secateur.report.looks import NBSP, listed, method_name, number, percent, times
from secateur.report.results import SIZE_TOLERANCE, Results
from secateur.report.table import typeset
from secateur.report.verdict import NO_TASKS, to_come, unfinished

_NAMED = 4  # of what is better, in the headline


@dataclass(frozen=True)
class Finding:
    """What is said of an ablation of one method at one size.

    Attributes:
        best: the value with the best number; None where nothing was measured.
        gap: of the best value to the default; where it is the default, of the next one to it. None where there is none.
    """

    group: Group
    best: AblatedValue | None
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
    findings: tuple[Finding, ...]
    caveats: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """What a terminal is told."""
        return [self.headline, "", *(f"{each.title}: {each.text}" for each in self.findings)]


def ablation_verdict(results: Results) -> AblationVerdict:
    """By perplexity over the dense model's, all texts together; without a dense model by the first other measure."""
    measure = next(iter(measures(results)), None)
    findings = tuple(_finding(group, measure) for group in groups(results))
    caveats = (*unfinished(results), *_caveats(results, findings))
    return AblationVerdict(_headline(findings, measure) + to_come(results), findings, caveats)


def _headline(findings: Sequence[Finding], measure: Measure | None) -> str:
    judged = [each for each in findings if each.judged]
    if measure is None or not any(each.best for each in findings):
        return "No verdict: nothing was measured yet."
    by = "perplexity" if measure.lower else measure.title
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


def _named(better: Sequence[Finding], measure: Measure) -> list[str]:
    """By ablation and value: by how much at which sizes."""
    sizes: dict[str, list[str]] = {}
    for each in better:
        if each.best and each.gap:
            name = f"{each.group.what} {each.best.shown} of {method_name(each.group.of)}"
            points = f"{_points(each.gap.difference, measure)} at {percent(each.group.sparsity)}"
            sizes.setdefault(name, []).append(points)
    return [f"{name} ({', '.join(at)})" for name, at in sizes.items()]


def _finding(group: Group, measure: Measure | None) -> Finding:
    if measure is None:
        return Finding(group, None, None, "Nothing was measured yet.")
    running, others = _running(group)
    means = [(value, over) for value in running if (over := spread(group, value, measure.shown))]
    if not means:
        return Finding(group, None, None, "No value has been measured over common seeds yet.")
    sign = 1 if measure.lower else -1
    ranked = sorted(means, key=lambda each: sign * each[1].mean)
    best, over = ranked[0]
    what = "lowest perplexity" if measure.lower else f"highest {measure.title}"
    level = _shown(over.mean, measure) + (" the dense model's" if measure.key == ALL else "")
    gap = None
    if len(ranked) == 1:
        words = [f"{best.shown}: {level}{_spread(over.mean, over.sd, group, measure)}."]
    elif best is group.default:
        gap = between(group, ranked[1][0], best, measure)
        words = [f"The default, {best.shown}, has the {what}: {level}."]
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
    return Finding(group, best, gap, " ".join(words))


def _running(group: Group) -> tuple[list[AblatedValue], list[AblatedValue]]:
    """Values of one size, the default's (else the first one's), and those of another one."""
    made = [value for value in group.values if value.cells]
    size = _removed(group, group.default or made[0]) if made else None
    running: list[AblatedValue] = []
    others: list[AblatedValue] = []
    for value in made:
        removed = _removed(group, value)
        apart = value.matched_to or (None not in (removed, size) and abs((removed or 0) - (size or 0)) > SIZE_TOLERANCE)
        (others if apart else running).append(value)
    return running, others


def _removed(group: Group, value: AblatedValue) -> float | None:
    return getattr(spread(group, value, lambda cell: cell.removed), "mean", None)


def _shown(value: float, measure: Measure) -> str:
    return times(value) if measure.key == ALL else number(value) if measure.lower else percent(value)


def _spread(mean: float, sd: float | None, group: Group, measure: Measure) -> str:
    """Two digits of a standard deviation, for it is known no better."""
    if sd is None:
        return ", of one seed"
    shown = number(sd, 2) if measure.lower else percent(sd)
    return f", ± {shown} over {len(group.seeds)} seeds ({percent(sd / mean)} of it)"


def _points(difference: float, measure: Measure) -> str:
    return typeset(signed(difference, measure))


def _gap(gap: Against | None, measure: Measure) -> str:
    if gap is None:
        return "a difference that is not known"
    words = _points(gap.difference, measure)
    if gap.sd is not None:
        words += f" ± {100 * gap.sd:.2f} over {gap.seeds} seeds"
    if gap.apart is None or gap.low is None or gap.high is None:
        return f"{words}; there is no interval, so it is not known whether that is chance"
    words += f" (95{NBSP}% interval {_points(gap.low, measure)} to {_points(gap.high, measure)})"
    if gap.seeds > 1:
        return f"{words}; the repeats over seeds {'carry' if gap.apart else 'do not carry'} it"
    return f"{words}; the paired interval {'carries' if gap.apart else 'does not carry'} it, for this one seed"


def _caveats(results: Results, findings: Sequence[Finding]) -> Iterator[str]:
    yield from (left_out_in_words(each.group) for each in findings if each.group.left_out)
    fewest = min((len(each.group.seeds) for each in findings if each.group.seeds), default=4)
    if fewest == 1:
        yield "Of one seed: how much the draw of the calibration matters is not known there."
    elif fewest < 4:
        yield f"{fewest} seeds are few: intervals over them are wide, and what they do not carry may be real."
    if any(len(each.group.values) > 2 for each in findings):
        yield "The best of many values is so by chance too: no interval here is corrected for how many were tried."
    if not results.tasks:
        yield NO_TASKS
    yield from (f"{task} is in no average: {why}." for task, why in results.average.left_out.items())
