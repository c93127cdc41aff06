"""Evolution of drop masks: the search of EvoPress (arXiv 2410.14649), for whatever may be dropped.

A (1 + lambda) evolutionary algorithm with level-switch mutation and multi-step selection: the paper's algorithm 1. What
the paper leaves open follows the authors' published search (github IST-DASLab/EvoPress, evo_drop_search.py), which
was read and not copied; where we go our own way, the docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.engine.sweep import Kind, Part, Sweeper, Variant
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, NumericalError
from secateur.run import Run
from secateur.solvers.criterion import Criterion, search_metric

Windows = Literal["drawn", "first"]
Window = tuple[int, int]  # a sample's number, and how many of its first tokens are taken
Score = Callable[..., list[float]]  # (variants, tokens, generation, step) -> their mean losses

_PATIENCE = 100  # draws in a row that bring nothing new, after which a space counts as exhausted


@dataclass(frozen=True)
class Space:
    """All drop masks that lose the same number of parts of each kind, and so the same share of parameters.

    Attributes:
        parts: what may go, by kind.
        gone: how many of each kind go.
    """

    parts: Mapping[Kind, tuple[Part, ...]]
    gone: Mapping[Kind, int]

    def draw(self, rng: torch.Generator) -> Variant:
        """A mask, uniformly."""
        chosen: set[Part] = set()
        for kind, parts in self.parts.items():
            order = torch.randperm(len(parts), generator=rng).tolist()
            chosen |= {parts[place] for place in order[: self.gone[kind]]}
        return frozenset(chosen)

    def mutate(self, parent: Variant, max_mutations: int, rng: torch.Generator) -> Variant:
        """Level-switch mutation: a dropped part returns and one of the same kind goes, once or a few times.

        The number of switches is the smaller of two uniform draws from 1 to `max_mutations`, which favours small
        steps; the kind is drawn anew for each. Later switches may undo earlier ones.
        """
        kinds = [kind for kind, parts in self.parts.items() if 0 < self.gone[kind] < len(parts)]
        variant = parent
        if not kinds:
            return variant
        for _ in range(1 + min(_below(max_mutations, rng), _below(max_mutations, rng))):
            parts = self.parts[kinds[_below(len(kinds), rng)]]
            present = [part for part in parts if part not in variant]
            lost = [part for part in parts if part in variant]
            variant = variant - {lost[_below(len(lost), rng)]} | {present[_below(len(present), rng)]}
        return variant


@dataclass(frozen=True)
class Selection:
    """One step of a selection: how many survive it, judged on how many tokens."""

    survivors: int
    tokens: int


@dataclass(frozen=True)
class Generation:
    """Where the search stands after a generation; number 0 is the initial draw.

    Attributes:
        parents: the survivors, fittest first.
        loss: the fittest's mean loss, on the tokens of the last step of the selection.
    """

    number: int
    parents: list[Variant]
    loss: float


def evolve(
    space: Space,
    score: Score,
    run: Run,
    *,
    key: str,
    generations: int,
    offspring: int,
    initial: int,
    initial_tokens: int,
    selections: Sequence[Selection],
    max_mutations: int,
) -> Iterator[Generation]:
    """Search for the mask of the least loss; yield the initial draw's best, then each generation's.

    The parents compete in the last step of each selection only (the algorithm is elitist), and in it on equal tokens.
    Candidates that were drawn before in the same generation are drawn again; if the space has hardly more to give,
    a generation has fewer.

    Args:
        score: mean losses of variants on so many tokens; see `WindowLosses`.
        selections: the last one's survivors are the next generation's parents.

    Raises:
        NumericalError: in a last step, no candidate has a finite loss.
    """
    parents_kept = selections[-1].survivors
    rng = run.rng(key, 0, "initial")
    candidates = _distinct(lambda: space.draw(rng), initial, ())
    parents, losses = _fittest(candidates, score(candidates, initial_tokens, 0, 0), parents_kept)
    _check(losses, f"{key}, initial draw")
    yield Generation(0, parents, losses[0])
    for number in range(1, generations + 1):
        rng = run.rng(key, number, "offspring")

        def child(parents: list[Variant] = parents, rng: torch.Generator = rng) -> Variant:
            return space.mutate(parents[_below(len(parents), rng)], max_mutations, rng)

        candidates = _distinct(child, offspring, parents)
        for step, selection in enumerate(selections):
            if step == len(selections) - 1:
                candidates = [*candidates, *parents]
            losses = score(candidates, selection.tokens, number, step)
            candidates, losses = _fittest(candidates, losses, selection.survivors)
        _check(losses, f"{key}, generation {number}")
        parents = candidates
        yield Generation(number, parents, losses[0])


def _below(limit: int, rng: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=rng))


def _distinct(draw: Callable[[], Variant], count: int, known: Sequence[Variant]) -> list[Variant]:
    """Up to `count` variants in the order drawn, all different and none of the known ones."""
    found: dict[Variant, None] = {}
    vain = 0
    while len(found) < count and vain < _PATIENCE:
        variant = draw()
        vain = vain + 1 if variant in found or variant in known else 0
        if not vain:
            found[variant] = None
    return list(found)


def _fittest(candidates: Sequence[Variant], losses: Sequence[float], count: int) -> tuple[list[Variant], list[float]]:
    """The `count` of the least loss; NaN and Inf lose, and equals are ranked by what they drop, lowest block first."""
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    best = sorted(range(len(finite)), key=lambda place: (finite[place], sorted(candidates[place])))[:count]
    return [candidates[place] for place in best], [finite[place] for place in best]


def _check(losses: Sequence[float], label: str) -> None:
    if math.isinf(losses[0]):
        raise NumericalError(
            f"{label}: every candidate's loss is NaN or Inf; use another dtype (float32, bfloat16) or other data"
        )


class WindowLosses:
    """Mean losses of variants on some windows of the calibration; what was computed once is never computed again.

    Each call takes `tokens` tokens: whole windows and, where they do not divide, the beginning of a last one. "drawn"
    draws them for each selection without replacement, as the authors do; "first" always takes the first ones. The
    losses are kept by variant and window, so an elite parent costs something on windows that it has not seen, only.

    For the KL divergence to the dense model it keeps that model's final hidden states (samples x length x hidden) of
    the windows met so far, on the CPU. They are not journaled: a resumed run computes again those that it needs.

    Args:
        tokens: of the calibration. Windows where nothing counts are left out.
        asked: the numbers of tokens that the calls will ask for, by the option that says so.

    Raises:
        InvalidOptionError: one is more than there are, or less than the two that a prediction takes.
    """

    def __init__(
        self,
        sweeper: Sweeper,
        tokens: Tokens,
        *,
        key: str,
        windows: Windows,
        criterion: Criterion,
        asked: Mapping[str, Sequence[int]],
    ) -> None:
        self._sweeper, self._tokens, self._run = sweeper, tokens, sweeper.run
        self._key, self._windows, self._criterion = key, windows, criterion
        self._known: dict[tuple[Variant, Window], float] = {}
        self._dense: dict[Window, Tensor] = {}  # (length, hidden)
        self._pools = {count: self._pool(count, option, asked) for option, counts in asked.items() for count in counts}

    def __call__(self, variants: Sequence[Variant], tokens: int, generation: int, step: int) -> list[float]:
        windows = self._take(tokens, generation, step)
        groups: dict[tuple[tuple[Variant, ...], int], list[int]] = {}  # samples, by the variants that lack them
        for sample, length in windows:
            lacking = tuple(variant for variant in variants if (variant, (sample, length)) not in self._known)
            if lacking:
                groups.setdefault((lacking, length), []).append(sample)
        label = f"{self._key} generation {generation}"
        sums: list[list[list[float]]] = self._run.step(
            f"{self._key}/{generation}/{step}",
            lambda: [
                self._sums(lacking, samples, length, label).tolist() for (lacking, length), samples in groups.items()
            ],
        )
        for ((lacking, length), samples), rows in zip(groups.items(), sums, strict=True):
            for variant, row in zip(lacking, rows, strict=True):
                for sample, value in zip(samples, row, strict=True):
                    self._known[variant, (sample, length)] = value
        counted = sum(float(self._tokens.weights[sample, 1:length].double().sum()) for sample, length in windows)
        return [sum(self._known[variant, window] for window in windows) / counted for variant in variants]

    def _take(self, tokens: int, generation: int, step: int) -> list[Window]:
        pool, lengths = self._pools[tokens]
        if self._windows == "drawn":
            rng = self._run.rng(self._key, generation, step, "windows")
            pool = [pool[place] for place in torch.randperm(len(pool), generator=rng).tolist()]
        return list(zip(pool, lengths, strict=False))

    def _pool(self, tokens: int, option: str, asked: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
        """The samples to choose from, and the lengths of those to take; the option, and what all of them ask for, are
        for messages."""
        weights, length = self._tokens.weights, self._tokens.length
        if tokens < 2:
            raise InvalidOptionError(f"{option}: a selection needs at least 2 tokens, not {tokens}")
        whole, rest = divmod(tokens, length)
        lengths = [length] * whole + [rest] * (rest >= 2)  # a single token predicts nothing
        counting = weights[:, 1 : length if whole else rest].any(dim=1)
        pool = [sample for sample, counts in enumerate(counting.tolist()) if counts]
        if tokens > (most := len(pool) * length):
            enough = {name: ",".join(str(min(each, most)) for each in counts) for name, counts in asked.items()}
            values = " with ".join(f'{name}="{few}"' if "," in few else f"{name}={few}" for name, few in enough.items())
            windows = math.ceil(max(max(counts) for counts in asked.values()) / length)
            raise InvalidOptionError(
                f"{option} asks for {tokens} tokens, and the calibration has {most} where tokens count, in {len(pool)} "
                f"windows of {length}; {values} would do, or {windows} windows"
            )
        return pool, lengths

    def _sums(self, variants: Sequence[Variant], samples: Sequence[int], length: int, label: str) -> Tensor:
        """Weighted sums of losses, (variants, samples): all variants at once over each window."""
        metric = search_metric(
            self._criterion, lambda: torch.stack([self._reference(sample, length) for sample in samples])
        )
        return self._sweeper.sums(self._cut(samples, length), variants, metric, label)

    def _reference(self, sample: int, length: int) -> Tensor:
        window = (sample, length)
        if window not in self._dense:  # one by one: equal to the last bit, whatever was met before
            states = self._sweeper.final_states(self._cut([sample], length))[0]
            self._dense[window] = states if states.is_meta else states.cpu()
            self._run.hold(states.numel() * states.element_size())
        return self._dense[window]

    def _cut(self, samples: Sequence[int], length: int) -> Tokens:
        place = torch.tensor(samples)
        return Tokens.of(self._tokens.ids[place, :length], self._tokens.weights[place, :length])
