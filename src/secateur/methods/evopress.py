"""EvoPress: Accurate Dynamic Model Compression via Evolutionary Search (arXiv 2410.14649), its depth pruning."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from secateur.engine.sweep import Kind, Part, Variant, sweeper_of
from secateur.engine.tokens import Tokens
from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.methods.registry import method
from secateur.model.budget import Budget, reachable
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.criterion import Criterion
from secateur.solvers.evolution import Selection, Space, WindowLosses, Windows, evolve
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, Edit

KEY = "evopress"
SAMPLES, LENGTH = 64, 2048  # 131,072 tokens

Units = Literal["modules", "blocks"]


@dataclass(frozen=True)
class Search:
    """The search that the options ask for.

    Attributes:
        space: the masks among which it looks.
        full: the generations of the paper, n (L - n) / 1.5 rounded down (its table 8), for n of L blocks.
        selections: the steps of a generation's selection.
    """

    space: Space
    full: int
    generations: int
    offspring: int
    initial: int
    initial_tokens: int
    selections: tuple[Selection, ...]
    max_mutations: int

    @property
    def asked(self) -> dict[str, list[int]]:
        """The numbers of tokens that its selections take, by option."""
        steps = [selection.tokens for selection in self.selections]
        return {"initial_tokens": [self.initial_tokens], "selection_tokens": steps}


def search_of(
    layout: Layout, budget: Budget, *, units: Units, generations: int | None, offspring: int, initial: int,
    initial_tokens: int, survivors: str, selection_tokens: str, max_mutations: int,
) -> Search:  # fmt: skip
    """Check the options and lay out the search.

    Raises:
        InfeasibleBudgetError: the budget is no whole block, or all.
        InvalidOptionError: constants with which the search cannot run.
    """
    space = search_space(layout, budget, units)
    n = budget.whole_blocks(layout)
    full = max(1, int(n * (len(layout.blocks) - n) / 1.5))
    kept, tokens = _numbers("survivors", survivors), _numbers("selection_tokens", selection_tokens)
    if len(kept) != len(tokens):
        raise InvalidOptionError(f"{len(kept)} survivors for {len(tokens)} selection_tokens; one of each a step")
    for name, value in (
        ("generations", 1 if generations is None else generations), ("offspring", offspring),
        ("initial", initial), ("max_mutations", max_mutations),
    ):  # fmt: skip
        if value < 1:
            raise InvalidOptionError(f"{name} must be at least 1, not {value}")
    if any(later > earlier for earlier, later in pairwise([offspring, *kept])):
        raise InvalidOptionError(f"survivors {survivors} of {offspring} offspring; each step keeps at most what it got")
    if kept[-1] > initial:
        raise InvalidOptionError(f"{kept[-1]} parents are chosen from {initial} initial candidates; draw more")
    return Search(
        space, full, full if generations is None else generations, offspring, initial, initial_tokens,
        tuple(Selection(*step) for step in zip(kept, tokens, strict=True)), max_mutations,
    )  # fmt: skip


def search_space(layout: Layout, budget: Budget, units: Units) -> Space:
    """The masks that meet the budget: n of the blocks, or n attention modules and, apart from them, n MLPs, where n
    is the budget's number of whole blocks. Where blocks lack modules: of each kind the budget's share of those there.

    Raises:
        InfeasibleBudgetError: nothing would go, or everything.
    """
    n = budget.whole_blocks(layout)
    if units == "blocks":
        return Space({"block": tuple(Part(number, "block") for number in layout.blocks)}, {"block": n})
    parts: dict[Kind, tuple[Part, ...]] = {
        "attention": tuple(Part(number, "attention") for number, block in layout.blocks.items() if block.attention),
        "mlp": tuple(Part(number, "mlp") for number, block in layout.blocks.items() if block.mlp),
    }

    def counts(budget: Budget) -> dict[Kind, int] | None:
        gone = {kind: math.floor(budget.block_share(layout) * len(each) + 0.5) for kind, each in parts.items()}
        return gone if 0 < sum(gone.values()) < sum(map(len, parts.values())) and budget.whole_blocks(layout) else None

    if (gone := counts(budget)) is None:
        raise InfeasibleBudgetError(
            f"{budget.sparsity:.4g} of the parameters of the {budget.of} would be none or all of the modules there "
            f"are, {len(parts['attention'])} attention modules and {len(parts['mlp'])} MLPs; "
            f"{reachable(counts, budget)} can be reached"
        )
    return Space(parts, gone)


def _numbers(name: str, text: str) -> list[int]:
    """ "2, 1" or "2 1" -> [2, 1]."""
    words = re.split(r"[,\s]+", text.strip())
    if not all(word.isdecimal() and int(word) for word in words):
        raise InvalidOptionError(f"{name} takes whole numbers above 0 with commas between, as 2,1; not {text!r}")
    return [int(word) for word in words]


def reduced(search: Search, tokens: int) -> str:
    """In a sentence, where a search is smaller than 2SSP's comparison has it; "" where it is nowhere.

    Args:
        tokens: of the calibration.
    """
    constants = {
        "generations": ([search.generations], [search.full]),
        "offspring": ([search.offspring], [32]),
        "initial candidates": ([search.initial], [64]),
        "initial tokens": ([search.initial_tokens], [2048]),
        "survivors": ([selection.survivors for selection in search.selections], [2, 1]),
        "tokens per selection": ([selection.tokens for selection in search.selections], [2048, 32768]),
        "calibration tokens": ([tokens], [SAMPLES * LENGTH]),
    }
    smaller = [
        f"{name} {_listed(ours)} (in full {_listed(theirs)})"
        for name, (ours, theirs) in constants.items()
        if len(ours) < len(theirs) or any(our < their for our, their in zip(ours, theirs, strict=False))
    ]
    return f"A reduced EvoPress search: {'; '.join(smaller)}." if smaller else ""


def _listed(numbers: Sequence[int]) -> str:
    return " then ".join(f"{number:,}" for number in numbers)


def _edits(variant: Variant) -> list[Edit]:
    """What makes a variant real, ascending."""
    edits: dict[Kind, type[DropAttention | DropMLP | DropBlock]] = {
        "attention": DropAttention,
        "mlp": DropMLP,
        "block": DropBlock,
    }
    return [edits[part.kind](part.block) for part in sorted(variant)]


@method(
    KEY,
    paper="https://arxiv.org/abs/2410.14649",
    unit="attention modules and MLPs, or whole blocks",
    samples=SAMPLES,
    length=LENGTH,
    bibtex="sieberling2025evopress",
    edits=(DropAttention, DropMLP, DropBlock),
    needs="per generation: every candidate on the first step's tokens, the survivors on the next one's",
)
def evopress(
    model: Model,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    units: Units = "modules",
    generations: int | None = None,
    offspring: int = 32,
    initial: int = 64,
    initial_tokens: int = 2048,
    survivors: str = "2,1",
    selection_tokens: str = "2048,32768",
    max_mutations: int = 3,
    criterion: Criterion = "kl",
    windows: Windows = "drawn",
) -> Iterator[Edit]:
    """Attention modules and MLPs, chosen by an evolutionary search for the least divergence from the dense model.

    The constants are those with which 2SSP (arXiv 2501.17771) compares: the authors' example script
    (IST-DASLab/EvoPress, example_scripts/drop_search.sh), with C4 for calibration. The EvoPress paper itself has the
    same search (its table 8) on 8 million tokens of FineWeb-Edu in sequences of 8,192 (4,096 for Llama-2). 2SSP
    takes its 131,072 tokens in sequences of 8,192, 4,096 (Llama, Phi-3) or 2,048 (Qwen2); here always 2,048. A run with
    less than these constants says so in its record, on its card and in the command's output.

    A selection's tokens are drawn anew each time, without replacement, as the authors do. The fitness of successive
    generations, in the record, is therefore taken on different tokens and need not fall; with windows "first" it does.

    Args:
        units: modules drops n attention modules and, apart from them, n MLPs, for a budget of n whole blocks; blocks
            drops n blocks.
        generations: of the search; n (L - n) / 1.5 of L blocks if not given.
        offspring: candidates per generation, each a mutation of a parent.
        initial: random candidates from which the first parents are chosen.
        initial_tokens: tokens for that choice.
        survivors: how many candidates each step of a selection keeps; the last number is that of the parents.
        selection_tokens: on how many tokens each step judges.
        max_mutations: the most modules that a mutation exchanges.
        criterion: what is minimised, kl to the dense model (the paper's) or ppl.
        windows: drawn takes other calibration windows for each selection, first always the first ones.
    """
    search = search_of(
        model.layout(), budget, units=units, generations=generations, offspring=offspring, initial=initial,
        initial_tokens=initial_tokens, survivors=survivors, selection_tokens=selection_tokens,
        max_mutations=max_mutations,
    )  # fmt: skip
    score = WindowLosses(
        sweeper_of(model, run), tokens, key=KEY, windows=windows, criterion=criterion, asked=search.asked
    )
    if short := reduced(search, tokens.samples * tokens.length):
        run.note("reduced", short)
        run.log("%s", short)
    curve = []
    for generation in evolve(
        search.space, score, run, key=KEY, generations=search.generations, offspring=search.offspring,
        initial=search.initial, initial_tokens=search.initial_tokens, selections=search.selections,
        max_mutations=search.max_mutations,
    ):  # fmt: skip
        curve.append(generation.loss)
        run.log("evopress: generation %d: %s %.6f nats", generation.number, criterion, generation.loss)
    run.note(f"best {criterion} by generation, in nats", curve)
    yield from _edits(generation.parents[0])
