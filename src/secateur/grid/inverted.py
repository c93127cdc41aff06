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
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from secateur.engine.loss import NegativeLogLikelihood
from secateur.engine.sweep import Part, sweeper_of
from secateur.engine.tokens import Tokens
from secateur.engine.walk import walk
from secateur.errors import InfeasibleBudgetError, InvalidOptionError, NumericalError
from secateur.methods import get_method
from secateur.methods.two_ssp import attention_count
from secateur.model.budget import Budget, shares
from secateur.model.handle import Model
from secateur.model.layout import BlockLayout, Layout
from secateur.run import Run
from secateur.solvers.greedy import greedy_removal
from secateur.surgery.edits import DropAttention, Edit

PUBLISHED: Final = "published"
Size = Literal["published", "equal"]
SIZES: tuple[Size, ...] = get_args(Size)
NAME = "2ssp-inverted"


@dataclass(frozen=True)
class Inversion:
    """What goes.

    Attributes:
        attentions: equation 5's number.
        kept: of the hidden directions, on either side of each FFN.
        hidden: how many there are.
    """

    attentions: int
    kept: int
    hidden: int

    def counted(self, layout: Layout) -> Layout:
        """The layout of a model whose FFNs are muted, with the parameters that smaller ones would have."""
        gone = self.hidden - self.kept
        blocks = {n: replace(block, mlp=block.mlp - gone * _direction(block)) for n, block in layout.blocks.items()}
        return replace(layout, blocks=blocks)


def invert(layout: Layout, budget: Budget, amount: Size, *, alpha: float = 1.5) -> Inversion:
    """Keep round(D (1 - s P / (L |FFN|))) directions as published; for equal size what the attentions take is left out.

    Raises:
        InfeasibleBudgetError: nothing would stay of the FFNs, or the attention modules alone take more than is asked.
        InvalidOptionError: alpha not positive.
    """
    if not alpha > 0:
        raise InvalidOptionError(f"alpha must be positive, not {alpha}")
    share = budget.block_share(layout)
    count, hidden = attention_count(layout, share, alpha), layout.ends.hidden
    sizes = [block.attention + block.attention_norms for block in layout.blocks.values() if block.attention]
    wanted = share * layout.block_parameters
    if amount == "equal":
        if count:
            wanted -= count * sum(sizes) / len(sizes)
        rate = wanted / (hidden * sum(map(_direction, layout.blocks.values())))
    else:
        rate = wanted / sum(block.mlp for block in layout.blocks.values())
    kept = math.floor(hidden * (1 - rate) + 0.5)
    if not 0 < kept <= hidden:
        raise InfeasibleBudgetError(
            f"2SSP with rows and columns inverted cannot remove {budget.sparsity:.4g} of the {budget.of}: "
            f"{kept} of {hidden} directions would stay beside {count} attention modules that go"
        )
    return Inversion(count, kept, hidden)


def _direction(block: BlockLayout) -> int:
    """Parameters of one hidden direction on both sides of a block's FFN: a column of each input map, a row of the
    output map and its bias."""
    return (block.mlp_rows + 1) * block.shape.width + block.mlp_bias


def prune(
    model: Model, tokens: Tokens, budget: Budget, run: Run, *, amount: Size = PUBLISHED, alpha: float = 1.5
) -> Iterator[Edit]:
    """Both stages; the FFNs stay muted, so the model is to be judged and thrown away.

    Args:
        amount: as published, or at equal size.
        alpha: of equation 5, as in 2SSP.

    Raises:
        InfeasibleBudgetError, InvalidOptionError: see `invert`.
        NumericalError: a norm is NaN or Inf.
    """
    before = model.layout()
    inversion = invert(before, budget, amount, alpha=alpha)
    norms = run.step("norms", lambda: direction_norms(model, tokens, run))
    for number, block in before.blocks.items():
        if block.mlp:
            _mute(model, number, norms[str(number)], inversion.kept)
    removal = greedy_removal(
        sweeper_of(model, run), tokens.first(1),
        [Part(number, "attention") for number, block in before.blocks.items() if block.attention],
        inversion.attentions, metric=NegativeLogLikelihood(), key=f"{NAME} stage 2",
    )  # fmt: skip
    for part, _ in removal:
        yield DropAttention(part.block)
    achieved = shares(before, inversion.counted(model.layout()))[budget.of]
    run.note(
        "inverted",
        f"{achieved:.2%} of the {budget.of} removed, {achieved - budget.sparsity:+.2%} against what was asked: "
        f"{inversion.kept} of {inversion.hidden} hidden directions stay on either side of each FFN, and "
        f"{inversion.attentions} attention modules go. In memory only: its FFNs are muted, not smaller.",
    )


# Not registered: nobody may save what it leaves.
_OURS = get_method("2ssp")
METHOD = replace(_OURS, name=NAME, prune=prune, edits=(DropAttention,), amount=replace(_OURS.amount, shared=None))


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
        enters, leaves = look(number, 0), look(number, 1)
        with (
            block.linear(block.family.mlp_in[0]).register_forward_pre_hook(lambda _, args, to=enters: to(args[0])),
            block.mlp_out.register_forward_hook(lambda _, args, output, to=leaves: to(output)),
        ):
            visit.advance()
    for number, total in sums.items():
        if not torch.isfinite(total).all():
            raise NumericalError(f"block {number}: the FFN's input or output has NaN or Inf; use another dtype")
    return {str(number): total for number, total in sums.items()}


def _mute(model: Model, number: int, norms: Tensor, kept: int) -> None:
    """The block's FFN reads and writes only the `kept` directions of the largest norms (2, hidden) from now on."""
    masks = torch.zeros_like(norms)
    for mask, side in zip(masks, norms, strict=True):
        mask[torch.sort(side, descending=True, stable=True).indices[:kept]] = 1

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * masks[0].to(args[0]), *args[1:])

    with model.open(number) as block:
        for path in block.family.mlp_in:
            block.linear(path).register_forward_pre_hook(read)
        block.mlp_out.register_forward_hook(lambda module, args, output: output * masks[1].to(output))
