"""EvoPress: Accurate Dynamic Model Compression via Evolutionary Search (arXiv 2410.14649), its depth pruning."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.engine.sweep import Kind, Part, Variant
from secateur.engine.tokens import Tokens
from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.methods.registry import Cost, method
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.evolution import Criterion, Generation, Selection, Space, Sweeps, WindowLosses, Windows, evolve
from secateur.surgery.apply import predict
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, Edit

KEY = "evopress"
SAMPLES, LENGTH = 64, 2048  # 131,072 tokens
_SIMULATED = 32  # generations whose cost is counted one by one when it is foretold

logger = logging.getLogger(__name__)

Units = Literal["modules", "blocks"]

BIBTEX = """@inproceedings{sieberling2025evopress,
  title     = {{EvoPress}: Accurate Dynamic Model Compression via Evolutionary Search},
  author    = {Oliver Sieberling and Denis Kuznedelev and Eldar Kurtic and Dan Alistarh},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
  url       = {https://arxiv.org/abs/2410.14649}
}"""


@dataclass(frozen=True)
class Plan:
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
    def asked(self) -> list[int]:
        """The numbers of tokens that its selections take."""
        return [self.initial_tokens, *(selection.tokens for selection in self.selections)]


def plan(
    layout: Layout, budget: Budget, *, units: Units, generations: int | None, offspring: int, initial: int,
    initial_tokens: int, survivors: str, selection_tokens: str, max_mutations: int,
) -> Plan:  # fmt: skip
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
    return Plan(
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
    gone = {kind: math.floor(budget.block_share(layout) * len(each) + 0.5) for kind, each in parts.items()}
    if not 0 < sum(gone.values()) < sum(len(each) for each in parts.values()):
        raise InfeasibleBudgetError(
            f"{budget.sparsity:.4g} of the parameters of the {budget.of} would be none or all of the modules there "
            f"are, {len(parts['attention'])} attention modules and {len(parts['mlp'])} MLPs"
        )
    return Space(parts, gone)


def _numbers(name: str, text: str) -> list[int]:
    """ "2, 1" or "2 1" -> [2, 1]."""
    words = re.split(r"[,\s]+", text.strip())
    if not all(word.isdecimal() and int(word) for word in words):
        raise InvalidOptionError(f"{name} takes whole numbers above 0 with commas between, as 2,1; not {text!r}")
    return [int(word) for word in words]


def reduced(made: Plan, tokens: int) -> str:
    """In a sentence, where a search is smaller than 2SSP's comparison has it; "" where it is nowhere.

    Args:
        tokens: of the calibration.
    """
    constants = {
        "generations": ([made.generations], [made.full]),
        "offspring": ([made.offspring], [32]),
        "initial candidates": ([made.initial], [64]),
        "initial tokens": ([made.initial_tokens], [2048]),
        "survivors": ([each.survivors for each in made.selections], [2, 1]),
        "tokens per selection": ([each.tokens for each in made.selections], [2048, 32768]),
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


class Counter:
    """Stands for `Sweeps` to count what a search will cost. The losses are made up: each variant has one, at random,
    the same on all tokens, so that a good parent stays for long and is seldom computed anew, as in a real search."""

    def __init__(self, layout: Layout, criterion: Criterion) -> None:
        kinds: tuple[Kind, ...] = ("attention", "mlp", "block")
        self._blocks = [(Part(k, "block"), frozenset(Part(k, kind) for kind in kinds)) for k in layout.blocks]
        self._kl = criterion == "kl"
        self._quality: dict[Variant, float] = {}
        self._dense: set[tuple[int, int]] = set()
        self._rng = torch.Generator().manual_seed(0)
        self.block_tokens = self.head_tokens = self.states = 0

    def __call__(self, variants: Sequence[Variant], samples: Sequence[int], length: int, label: str) -> Tensor:
        self.block_tokens += self._forwards(variants) * len(samples) * length
        self.head_tokens += (len(variants) + self._kl) * len(samples) * (length - 1)
        self.states = max(self.states, 2 * len(variants) * len(samples) * length)
        new = {(sample, length) for sample in samples} - self._dense
        if self._kl:
            self.block_tokens += len(self._blocks) * len(new) * length
            self._dense |= new
        for variant in variants:
            if variant not in self._quality:
                self._quality[variant] = float(torch.rand((), generator=self._rng))
        values = torch.tensor([self._quality[variant] for variant in variants], dtype=torch.float64)
        return values[:, None].repeat(1, len(samples)) * (length - 1)

    @property
    def kept(self) -> int:
        """Tokens whose dense states are kept."""
        return sum(length for _, length in self._dense)

    def _forwards(self, variants: Sequence[Variant]) -> int:
        """Block-forwards of a sweep: a block's distinct outputs, which a dropped block does not compute."""
        total = 0
        state = [0] * len(variants)
        for whole, parts in self._blocks:
            seen: dict[tuple[int, Variant], int] = {}
            for place, variant in enumerate(variants):
                state[place] = seen.setdefault((state[place], parts & variant), len(seen))
            total += sum(whole not in muted for _, muted in seen)
        return total


def _foretell(
    layout: Layout, samples: int, length: int, budget: Budget, *, criterion: Criterion, windows: Windows, **options: Any
) -> Cost:  # fmt: skip
    made = plan(layout, budget, **options)
    counter, run = Counter(layout, criterion), Run()
    score = WindowLosses(counter, torch.ones(samples, length), run, key=KEY, windows=windows, asked=made.asked)
    spent = []  # (block tokens, head tokens) after each generation
    for generation in _search(made, score, run):
        spent.append((counter.block_tokens, counter.head_tokens))
        best = generation.parents[0]
        if generation.number == _SIMULATED:
            break
    left = made.generations - (len(spent) - 1)
    half = len(spent) // 2  # the later generations are like each other
    block, head = (
        last + left * (last - middle) / max(1, len(spent) - 1 - half)
        for last, middle in zip(spent[-1], spent[half], strict=True)
    )
    after = layout
    for edit in _edits(best):
        after = predict(after, edit)
    return Cost(block_tokens=block, head_tokens=head, peak_states=counter.kept + counter.states, after=after)


def _search(made: Plan, score: WindowLosses, run: Run) -> Iterator[Generation]:
    return evolve(
        made.space, score, run, key=KEY, generations=made.generations, offspring=made.offspring, initial=made.initial,
        initial_tokens=made.initial_tokens, selections=made.selections, max_mutations=made.max_mutations,
    )  # fmt: skip


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
    bibtex=BIBTEX,
    foretell=_foretell,
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
    made = plan(
        model.layout(), budget, units=units, generations=generations, offspring=offspring, initial=initial,
        initial_tokens=initial_tokens, survivors=survivors, selection_tokens=selection_tokens,
        max_mutations=max_mutations,
    )  # fmt: skip
    sweeps = Sweeps(model, tokens, run, criterion=criterion)
    score = WindowLosses(sweeps, tokens.weights, run, key=KEY, windows=windows, asked=made.asked)
    if short := reduced(made, tokens.samples * tokens.length):
        run.note("reduced", short)
        logger.info("%s", short)
    curve = []
    for generation in _search(made, score, run):
        curve.append(generation.loss)
        run.note(f"best {criterion} by generation, in nats", curve)
        logger.info("evopress: generation %d: %s %.6f nats", generation.number, criterion, generation.loss)
    yield from _edits(generation.parents[0])
