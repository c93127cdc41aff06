"""2SSP with rows and columns the other way round: an ablation, in memory only, never a checkpoint.

2SSP removes FFN neurons: rows of the input maps, columns of the output map. The variant of its authors' code removes
hidden directions instead: columns of the input maps, by the norm of what enters them, and rows of the output map, by
the norm of what leaves it; the FFN then reads some coordinates of the residual stream and writes some. Its second
stage is 2SSP's own.

As published it takes the whole sparsity from the FFNs AND removes equation 5's attention modules, so it removes more
than was asked. `equal` takes from the FFNs only what is left, and is the comparison at equal size.

No weight is touched: hooks mute the coordinates, which gives the same outputs as gathering and scattering around a
smaller FFN. What that FFN would have is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from secateur.engine.loss import NegativeLogLikelihood
from secateur.engine.sweep import Part, sweeper_of
from secateur.engine.tokens import Tokens
from secateur.engine.walk import walk
from secateur.errors import InfeasibleBudgetError, InvalidOptionError, NumericalError
from secateur.methods import Method, Options, get_method
from secateur.methods.two_ssp import attention_count
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import BlockLayout, Layout
from secateur.model.views import Block
from secateur.pruning import run_method
from secateur.run import Meter, Rehearsal, Run
from secateur.solvers.greedy import greedy_removal
from secateur.surgery.edits import DropAttention, Edit

PUBLISHED: Final = "published"
EQUAL: Final = "equal"
Amount = Literal["published", "equal"]
AMOUNTS: tuple[Amount, ...] = (PUBLISHED, EQUAL)
NAME = "2ssp-inverted"
DEFAULTS: Options = {"amount": PUBLISHED, "alpha": 1.5}  # its options


@dataclass(frozen=True)
class InvertedPlan:
    """What goes.

    Attributes:
        attentions: equation 5's number.
        kept: of the hidden directions, on either side of each FFN.
        hidden: how many there are.
    """

    attentions: int
    kept: int
    hidden: int


def complete(given: Options) -> Options:
    """The given options, and the others at their defaults.

    Raises:
        InvalidOptionError: another option. Of 2SSP's own the variant has `alpha` only.
    """
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise InvalidOptionError(
            f"2SSP with rows and columns inverted has no {', '.join(unknown)}; of 2ssp's options it takes alpha only"
        )
    return {**DEFAULTS, **given}


def plan(layout: Layout, budget: Budget, amount: Amount, *, alpha: float = 1.5) -> InvertedPlan:
    """Keep round(D (1 - s P / (L |FFN|))) directions as published; for equal size what the attentions take is left out.

    Raises:
        InfeasibleBudgetError: nothing would stay of the FFNs, or the attention modules alone take more than is asked.
        InvalidOptionError: another amount; alpha not positive.
    """
    if amount not in AMOUNTS:
        raise InvalidOptionError(f"amount is one of {', '.join(AMOUNTS)}, not {amount!r}")
    if not alpha > 0:
        raise InvalidOptionError(f"alpha must be positive, not {alpha}")
    share = budget.block_share(layout)
    count, hidden = attention_count(layout, share, alpha), layout.ends.hidden
    sizes = [block.attention + block.attention_norms for block in layout.blocks.values() if block.attention]
    wanted = share * layout.block_parameters
    if amount == EQUAL and count:
        wanted -= count * sum(sizes) / len(sizes)
    per_direction = sum(_direction(block) for block in layout.blocks.values())
    rate = wanted / (hidden * per_direction) if amount == EQUAL else wanted / _ffn(layout)
    kept = math.floor(hidden * (1 - rate) + 0.5)
    if not 0 < kept <= hidden:
        raise InfeasibleBudgetError(
            f"2SSP with rows and columns inverted cannot remove {budget.sparsity:.4g} of the {budget.of}: "
            f"{kept} of {hidden} directions would stay beside {count} attention modules that go"
        )
    return InvertedPlan(count, kept, hidden)


def _ffn(layout: Layout) -> int:
    return sum(block.mlp for block in layout.blocks.values())


def _direction(block: BlockLayout) -> int:
    """Parameters of one hidden direction on both sides of a block's FFN: a column of each input map, a row of the
    output map and its bias."""
    return (block.mlp_rows + 1) * block.shape.width + block.mlp_bias


@dataclass(frozen=True)
class InvertedResult:
    """What was done, in the numbers that a smaller model would have.

    Attributes:
        after: the layout without the attention modules; the FFNs in it are whole, since they are only muted.
    """

    plan: InvertedPlan
    after: Layout

    @property
    def muted(self) -> int:
        """Parameters of the directions that are not kept."""
        return (self.plan.hidden - self.plan.kept) * sum(_direction(block) for block in self.after.blocks.values())

    @property
    def parameters(self) -> int:
        return self.after.parameters - self.muted

    @property
    def block_parameters(self) -> int:
        return self.after.block_parameters - self.muted

    def achieved(self, before: Layout) -> dict[str, float]:
        return {
            "blocks": 1 - self.block_parameters / before.block_parameters,
            "model": 1 - self.parameters / before.parameters,
        }


@contextmanager
def inverted(
    model: Model, tokens: Tokens, budget: Budget, run: Run, *, amount: Amount = PUBLISHED, alpha: float = 1.5
) -> Iterator[InvertedResult]:
    """Prune `model` so for the time of the context. Attention modules are gone for good, FFNs whole again after.

    Args:
        tokens: of whose windows the first one serves the second stage, as in 2SSP.
        alpha: of equation 5, as in 2SSP.

    Raises:
        InfeasibleBudgetError, InvalidOptionError: see `plan`.
        NumericalError: a norm is NaN or Inf.
    """
    before = model.layout()
    made = plan(before, budget, amount, alpha=alpha)
    norms = run.step("norms", lambda: direction_norms(model, tokens, run))
    with ExitStack() as stack:
        for number, block in before.blocks.items():
            if block.mlp:
                stack.enter_context(_muted(model, number, norms[str(number)], made.kept))
        search = _attentions_only(made.attentions)
        after = run_method(model, search, tokens, budget, run).after
        yield InvertedResult(made, after)


def direction_norms(model: Model, tokens: Tokens, run: Run) -> dict[str, Tensor]:
    """Of every hidden direction, the sum over windows of the norm over tokens, at the FFN's input and at its output.

    Returns:
        By block number, (2, hidden) float64.
    """
    sums: dict[int, Tensor] = {}
    windows: dict[int, int] = {}

    def look(number: int, side: int) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            windows[number] = windows.get(number, -1) + (side == 0)  # walked window by window, and enters first
            weights = tokens.weights[windows[number]].to(x.device)  # (length,)
            weighted = x.reshape(len(weights), -1).float() * weights[:, None].sqrt()
            sums[number][side] += torch.linalg.vector_norm(weighted, dim=0).cpu().double()

        return add

    for visit in walk(model, tokens, order="samples", run=run, label="2ssp inverted"):
        number, block = visit.block.number, visit.block
        if not block.has_mlp:
            visit.advance()
            continue
        sums.setdefault(number, torch.zeros(2, model.hidden_size, dtype=torch.float64))
        with _watched(block, look(number, 0), look(number, 1)):
            visit.advance()
    for number, total in sums.items():
        if not torch.isfinite(total).all():
            raise NumericalError(f"block {number}: the FFN's input or output has NaN or Inf; use another dtype")
    return {str(number): total for number, total in sums.items()}


@contextmanager
def _watched(block: Block, enters: Callable[[Tensor], None], leaves: Callable[[Tensor], None]) -> Iterator[None]:
    first = block.linear(block.family.mlp_in[0])
    handles = [
        first.register_forward_pre_hook(lambda module, args: enters(args[0])),
        block.mlp_out.register_forward_hook(lambda module, args, output: leaves(output)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _muted(model: Model, number: int, norms: Tensor, kept: int) -> Iterator[None]:
    """The block's FFN reads and writes only the `kept` directions of the largest norms (2, hidden)."""
    masks = torch.zeros_like(norms)
    for mask, each in zip(masks, norms, strict=True):
        mask[torch.sort(each, descending=True, stable=True).indices[:kept]] = 1

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * masks[0].to(args[0]), *args[1:])

    def write(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * masks[1].to(output)

    with model.open(number) as block:
        handles = [block.linear(path).register_forward_pre_hook(read) for path in block.family.mlp_in]
        handles.append(block.mlp_out.register_forward_hook(write))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rehearsed(model: Model, samples: int, length: int, budget: Budget, **options: Any) -> tuple[Meter, InvertedResult]:
    """What it will take and leave; the model may be a hollow one. Errors are those of `inverted`."""
    run, tokens = Rehearsal(), Tokens.of(torch.zeros(samples, length, dtype=torch.long))
    with inverted(model.hollow(), tokens, budget, run, **options) as result:
        return run.meter, result


def _attentions_only(count: int) -> Method:
    """2SSP's second stage by itself, as a method for the driver; it is not registered."""

    def search(model: Model, tokens: Tokens, budget: Budget, run: Run) -> Iterator[Edit]:
        """Attention modules by perplexity on the first window."""
        candidates = [Part(number, "attention") for number, block in model.layout().blocks.items() if block.attention]
        removal = greedy_removal(
            sweeper_of(model, run), tokens.first(1), candidates, count, metric=NegativeLogLikelihood(),
            key=f"{NAME} stage 2",
        )  # fmt: skip
        for part, _ in removal:
            yield DropAttention(part.block)

    return replace(get_method("2ssp"), name=NAME, prune=search, samples=1, edits=(DropAttention,))
