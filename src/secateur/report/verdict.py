"""The answer in words: which method, at which size. Computed from the data, honest about what they do not tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from secateur.report.comparing import LARGEST, Gap, accuracies, losses, ratio
from secateur.report.looks import listed, method_name, number, percent, times, title
from secateur.report.results import SIZE_TOLERANCE, CellResult, Results

TOLERANCES = (1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)  # perplexity over the dense model's
FEW_WINDOWS = 10


@dataclass(frozen=True)
class AtSize:
    """What is said of one size.

    Attributes:
        level: the cell with the best number, then those that the intervals do not tell from it.
        unsure: those of which that is not known, since there is no interval.
    """

    sparsity: float
    level: tuple[CellResult, ...]
    unsure: tuple[CellResult, ...]
    text: str


@dataclass(frozen=True)
class Smallest:
    """The smallest model within a tolerance: perplexity at most `tolerance` times the dense model's. Of models that are
    as small, but for SIZE_TOLERANCE, the best."""

    tolerance: float
    cell: CellResult
    ratio: float


@dataclass(frozen=True)
class Verdict:
    """All that is said.

    Attributes:
        headline, cost: which method, and what it costs, in a sentence each; `cost` may be empty.
        sizes: a paragraph per size.
        choices: the smallest model for how much is acceptable.
        caveats: what the reader must know.
    """

    headline: str
    cost: str
    sizes: tuple[AtSize, ...]
    choices: tuple[Smallest, ...]
    caveats: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """What a terminal is told."""
        return [self.headline, self.cost, "", *(f"{percent(each.sparsity)}: {each.text}" for each in self.sizes)]


def verdict(results: Results) -> Verdict:
    sizes = [_at_size(results, sparsity) for sparsity in results.sparsities]
    known = [each for each in sizes if each.level]
    return Verdict(
        headline=_headline(known) + to_come(results),
        cost=_cost(results, known),
        sizes=tuple(sizes),
        choices=tuple(_choices(results)),
        caveats=(*unfinished(results), *_reduced(results), *_disagreement(results), *_sizes_apart(results),
                 *_coverage(results)),
    )  # fmt: skip


def _headline(sizes: Sequence[AtSize]) -> str:
    if not sizes:
        return "No verdict: no pruned model has a perplexity yet."
    winners: dict[tuple[str, ...], list[str]] = {}
    for each in sizes:
        names = tuple(dict.fromkeys(method_name(cell.method) for cell in each.level))
        winners.setdefault(names, []).append(percent(each.sparsity))
    everywhere = set.intersection(*({cell.method for cell in each.level} for each in sizes))
    unsure = [percent(each.sparsity) for each in sizes if each.unsure]
    remark = f" At {listed(unsure)} intervals are missing: who is level is not known." if unsure else ""
    if len(winners) > 1 and everywhere:
        winner = next(cell.method for cell in sizes[0].level if cell.method in everywhere)
        what = "is lowest, or level with the lowest," if unsure else "is best, or level with the best,"
        at = listed([percent(each.sparsity) for each in sizes])
        return f"By perplexity, {method_name(winner)} {what} at every size ({at}).{remark}"
    clauses = [
        f"{names[0] if len(names) == 1 else f'{listed(names)} (level)'} at {listed(shares)}"
        for names, shares in winners.items()
    ]
    return f"{'Lowest' if unsure else 'Best by'} perplexity: {'; '.join(clauses)}.{remark}"


def to_come(results: Results) -> str:
    """So that nobody takes the best of a few for the best of all."""
    missing = len(results.missing)
    return (
        f" {missing} of {len(results.cells)} cells {'are' if missing > 1 else 'is'} still to come." if missing else ""
    )


def _cost(results: Results, sizes: Sequence[AtSize]) -> str:
    ratios = [(each.sparsity, ratio(results, each.level[0])) for each in sizes]
    clauses = [f"{times(over)} at {percent(sparsity)}" for sparsity, over in ratios if over]
    mean = ", on average over the texts" if len(results.averaged_texts) > 1 else ""
    return f"What the best one costs, in perplexity over the dense model's{mean}: {listed(clauses)}." if clauses else ""


# --- at one size ---


def _at_size(results: Results, sparsity: float) -> AtSize:
    cells = results.of_size(sparsity)
    ranking = losses(results).rank(cells)
    if not ranking.cells:
        return AtSize(sparsity, (), (), "No method has finished at this size.")
    best, level, unsure = ranking.cells[0], ranking.level, ranking.unsure
    words = [_best(results, best)]
    if len(cells) == 1:
        words.append("It is the only method that finished at this size.")
    if len(level) > 1:
        words.append(
            f"{listed([title(cell) for cell in level[1:]])} {'is' if len(level) == 2 else 'are'} level with it: "
            "the 95 % interval of the difference includes zero."
        )
    behind = [(cell, gap) for cell, gap in zip(ranking.cells, ranking.gaps, strict=True) if cell not in level]
    if behind:
        words.append(f"Next is {title(behind[0][0])}, {_distance(behind[0][1])}.")
    if unsure:
        who = listed([title(cell) for cell in unsure])
        words.append(f"Whether {who} {'differs' if len(unsure) == 1 else 'differ'} from it is not known: no interval.")
    words += [_size_of_best(results, cell) for cell in level if cell.off_target]
    if reduced := [title(cell) for cell in ranking.cells if cell.reduced and cell not in level]:
        words.append(f"{listed(reduced)} searched less than the paper does, and might do better.")
    if best.reduced:
        words.append("It is best although its search was reduced.")
    return AtSize(sparsity, level, unsure, " ".join(words))


def _best(results: Results, best: CellResult) -> str:
    values = listed([f"{number(results.perplexity(best, text))} on {text}" for text in results.averaged_texts])
    over = ratio(results, best)
    mean = " on average" if len(results.averaged_texts) > 1 else ""
    relative = f", {times(over)} the dense model's{mean}" if over is not None else ""
    return f"{title(best)} has the lowest perplexity: {values}{relative}."


def _times(nats: float) -> str:
    return times(math.exp(min(nats, LARGEST)))


def _distance(gap: Gap | None) -> str:
    if gap is None:
        return "at a distance that is not known"
    more = f"{_times(gap.difference)} the best one's perplexity"
    if gap.low is None or gap.high is None:
        return f"{more} (no interval)"
    return f"{more} (95 % interval {_times(gap.low)[:-1]} to {_times(gap.high)[:-1]})"


def _size_of_best(results: Results, cell: CellResult) -> str:
    """One that removes whole blocks ends beside the size asked for; whether it is better is asked at its own size."""
    missed = f"{title(cell)} removed {percent(cell.removed)} instead of {percent(cell.sparsity)}"
    partner = results.partner(cell)
    gap = losses(results).gap(partner, cell) if partner else None
    if gap is None:
        return f"{missed}, so it is not quite the same size as the others."
    over = f"{_times(gap.difference)} its perplexity"
    if gap.apart is None:
        return f"{missed}; 2SSP at that same size has {over} (no interval: whether they differ is not known)."
    if not gap.apart:
        return f"{missed}; 2SSP at that same size is level with it."
    return f"{missed}; 2SSP at that same size is {'better' if gap.difference < 0 else 'worse'}, {over}."


# --- over all sizes ---


def _choices(results: Results) -> list[Smallest]:
    """Of the methods at a size that was asked for: a 2SSP at another one's size is a size that only 2SSP was given."""
    running = [cell for cell in results.pruned if cell.done and not cell.matched_to and cell.parameters]
    judged = [(cell.parameters or 0, over, cell) for cell in running if (over := ratio(results, cell))]
    choices: list[Smallest] = []
    for tolerance in TOLERANCES:
        within = [each for each in judged if each[1] <= tolerance]
        least = min((parameters for parameters, _, _ in within), default=0)
        alike = [(over, cell) for parameters, over, cell in within if parameters <= least * (1 + SIZE_TOLERANCE)]
        if alike:
            over, cell = min(alike, key=lambda each: each[0])
            if not choices or choices[-1].cell is not cell:
                choices.append(Smallest(tolerance, cell, over))
    return choices


# --- what the reader must know ---


def unfinished(results: Results) -> Iterator[str]:
    for cell in results.cells:
        if cell.status == "failed" and not cell.matched_to:
            why = cell.error or "no reason given"
            yield f"{title(cell)} at {percent(results.size_of(cell))} failed and is not judged: {why}"
    if missing := [cell.name for cell in results.missing]:
        yield (
            f"Not there yet (running, or still to come): {', '.join(missing)}. If the command was stopped, give it "
            "again: it goes on."
        )
    if results.dense is None:
        yield "The dense model was not judged, so nothing is said relative to it."


def _reduced(results: Results) -> list[str]:
    sizes: dict[str, list[str]] = {}
    for cell in results.pruned:
        if cell.done and cell.reduced:
            note = cell.notes.get("reduced") or "a smaller search than its paper's"
            sizes.setdefault(f"{title(cell)}: {note}", []).append(percent(cell.sparsity))
    return [f"{what} (at {listed(at)})" for what, at in sizes.items()]


def _disagreement(results: Results) -> Iterator[str]:
    """Sizes at which no cell can be best both by perplexity and by tasks, for all that the data tell."""
    for sparsity in results.sparsities:
        cells = results.of_size(sparsity)
        rankings = losses(results).rank(cells), accuracies(results).rank(cells)
        ours, theirs = ({*ranking.level, *ranking.unsure} for ranking in rankings)
        if ours and theirs and not ours & theirs:
            first, second = (title(ranking.cells[0]) for ranking in rankings)
            yield (
                f"At {percent(sparsity)} tasks and perplexity disagree: the former put {second} first, the latter "
                f"{first}. Decide by what the model is for."
            )


def _sizes_apart(results: Results) -> Iterator[str]:
    off: dict[str, list[str]] = {}
    for cell in results.pruned:
        if cell.done and not cell.matched_to and cell.off_target:
            off.setdefault(title(cell), []).append(f"{percent(cell.removed)} for {percent(cell.sparsity)}")
    if off:
        yield (
            "Whoever removes whole blocks or modules cannot meet every size: "
            f"{'; '.join(f'{name} {listed(sizes)}' for name, sizes in off.items())}. "
            "Where the table has 2SSP at that very size, compare with that."
        )


def _coverage(results: Results) -> Iterator[str]:
    windows = min((each.samples or 0 for each in results.windows.values()), default=0)
    if results.windows and windows < FEW_WINDOWS:
        yield f"Perplexity was taken on {windows} windows only; intervals from so few are rough."
    if apart := [text for text in results.texts if text not in results.averaged_texts]:
        yield (
            f"{listed(apart)} {'was' if len(apart) == 1 else 'were'} cut to windows of another length, and "
            "perplexities of different lengths are never averaged: left out of the mean over texts, and of what is "
            "said of a size."
        )
    for cell in results.done:
        if other := [text for text in cell.perplexity if not results.loss(cell, text)]:
            yield f"{cell.name} was judged on other windows of {listed(other)}; it is not compared there."
    if not results.tasks:
        yield NO_TASKS
    elif lacking := [cell.name for cell in results.pruned if cell.done and not cell.tasks]:
        yield f"Without tasks: {', '.join(lacking)}."
    average = results.average
    for task, why in average.left_out.items():
        yield f"{task} is {'grey and ' if task in average.grey else ''}in no average: {why}."
    if not any(cell.generation for cell in results.pruned if cell.done):
        yield "No text was generated. Generation can break before perplexity shows it."


NO_TASKS = "No tasks were run. Perplexity alone does not tell what a model can still do."
