"""What a grid will take, part by part, before it is run: for `--dry-run`, and until its parts have been timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from secateur.errors import SecateurError
from secateur.forecast import Speed
from secateur.grid.cells import DENSE, Cell, in_words
from secateur.grid.index import digest
from secateur.grid.pruning import complete_options, foretell
from secateur.judge.generation import GREEDY
from secateur.judge.judging import Judging
from secateur.model.handle import Model

WINDOWS = 150  # of a text whose windows were not counted

PRUNE, PERPLEXITY, TASKS, INFERENCE, GENERATION = "prune", "perplexity", "tasks", "inference", "generation"
PARTS = (PRUNE, PERPLEXITY, TASKS, INFERENCE, GENERATION)  # of a cell, in the order in which they are run


@dataclass(frozen=True)
class Work:
    """Tokens of windows through one block, and through the LM head.

    Attributes:
        steps: what is done token by token, for so many sequences at once; there a "token" is one of each sequence.
    """

    block_tokens: float = 0.0
    head_tokens: float = 0.0
    steps: Mapping[int, Work] = field(default_factory=dict)

    def seconds(self, speed: Speed) -> float:
        own = self.block_tokens * speed.block_s + self.head_tokens * speed.head_s
        return own + sum(work.seconds(speed.steps[sequences]) for sequences, work in self.steps.items())


def steps(judging: Judging) -> set[int]:
    """The numbers of sequences that the judging will generate for at once: of what `Speed.steps` is needed."""
    beams = {decoding.num_beams for decoding in (GREEDY, *judging.decodings)} if judging.prompts else set()
    return beams | ({judging.batch_size} if judging.inference else set())


def estimates(
    cells: Sequence[Cell], model: Model, judging: Judging, *, windows: Mapping[str, int | None], task_tokens: float
) -> dict[str, dict[str, Any]]:
    """By cell: its `parts` (by name, Work); the share `removed`, as far as it is known; or `refused`, the reason. Of
    one that is the `same_as` another, there are no parts.

    Args:
        model: the dense one; it may be a hollow one.
        windows: of each text; None where they were not counted.
        task_tokens: of all tasks together.
    """
    told: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}  # the cell of an identity
    counted = sum(WINDOWS if n is None else n for n in windows.values())
    judged = functools.partial(_judging, model, judging, counted * judging.length, task_tokens)
    for cell in cells:
        known = cell
        if cell.matched_to is not None and cell.sparsity is None:
            other = told.get(cell.matched_to, {})
            if "removed" not in other:
                told[cell.name] = {"refused": f"{cell.matched_to}, whose size it is to have, is refused", "parts": {}}
                continue
            known = replace(cell, sparsity=other["removed"])
        told[cell.name] = _estimate(known, model, judged)
        if (same := first.setdefault(_identity(known), cell.name)) != cell.name and "refused" not in told[cell.name]:
            told[cell.name] |= {"same_as": same, "parts": {}}
    return told


def _identity(cell: Cell) -> str:
    """What makes two cells one: the second is not made again."""
    calibration = asdict(cell.calibration) if cell.calibration else None
    return digest({**cell.identity, "options": complete_options(cell)}, calibration)


def _estimate(cell: Cell, model: Model, judged: Callable[[float], dict[str, Work]]) -> dict[str, Any]:
    if cell.method == DENSE:
        return {"removed": 0.0, "parts": judged(1.0)}
    try:
        foretold = foretell(cell, model)
    except SecateurError as error:
        return {"refused": in_words(error), "parts": {}}
    pruning = Work(foretold.meter.block_tokens, foretold.meter.head_tokens)
    return {"removed": foretold.removed[cell.of], "parts": {PRUNE: pruning} | judged(1 - foretold.removed["blocks"])}


def _judging(model: Model, judging: Judging, text_tokens: int, task_tokens: float, kept: float) -> dict[str, Work]:
    """Args: kept: the share of the blocks' parameters that is there, which is about what a token costs."""
    blocks = len(model.numbers)
    parts = {PERPLEXITY: Work(text_tokens * blocks * kept, text_tokens)} if text_tokens else {}
    if task_tokens:
        parts[TASKS] = Work(task_tokens * blocks * kept, task_tokens)
    if judging.inference:
        rounds, both = judging.rounds + 1, blocks * (1 + kept)  # dense and pruned
        prompt, new = rounds * judging.batch_size * judging.prompt_length, rounds * judging.new_tokens
        parts[INFERENCE] = Work(prompt * both, steps={judging.batch_size: Work(new * both, 2 * new)})
    if judging.prompts:
        by_beams: dict[int, float] = {}
        for decoding in (GREEDY, *judging.decodings):
            tokens = decoding.max_new_tokens or decoding.max_length or 0
            by_beams[decoding.num_beams] = by_beams.get(decoding.num_beams, 0) + tokens * len(judging.prompts)
        parts[GENERATION] = Work(steps={n: Work(each * blocks * kept, each) for n, each in by_beams.items()})
    return parts
