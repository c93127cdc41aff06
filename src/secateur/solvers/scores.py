"""How much FFN neurons matter: scores of a block's neurons, from their activations and the weights around them.

With h the activations (the inputs of the down projection), W that projection's weight and C = E[h h^T], each function
is pure; `neuron_scores` takes the statistics of a whole model and calls one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from secateur.engine.tokens import Tokens
from secateur.engine.walk import Order, walk
from secateur.errors import InvalidOptionError, NumericalError
from secateur.model.handle import Model
from secateur.model.views import Block
from secateur.run import Run
from secateur.solvers.obs import damped_inverse, prune_bytes, prune_groups
from secateur.surgery.edits import keep

Norm = Literal["l2", "l1"]
Score = Literal["activation", "column", "norms", "ranges", "obs", "leverage", "elimination"]

_DTYPE = torch.float32  # of C
_SHARE = 32  # backward elimination takes a 32nd of a block's neurons at a time


def top_neurons(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` neurons of the highest scores (width,); ties go to the lower number."""
    return keep(torch.sort(scores, descending=True, stable=True).indices[:count])


def activation_norms(x: Tensor, weights: Tensor, norm: Norm) -> Tensor:
    """The norm over tokens of each neuron's activation, summed over samples: x (samples, tokens, width), weights of the
    tokens (samples, tokens) -> (width,) float64."""
    power = 1 if norm == "l1" else 2
    weighted = x.float() * weights[..., None] ** (1 / power)  # weight w: sum of w |x|, or root of the sum of w x^2
    return torch.linalg.vector_norm(weighted, ord=power, dim=1).cpu().double().sum(dim=0)


def by_column(activation: Tensor, down: Tensor) -> Tensor:
    """|h_j| |W_j|: what the FFN's output loses with a neuron, as if no other's went along with it; activation (width,),
    down (rows, width) -> (width,)."""
    return activation * torch.linalg.vector_norm(down, dim=0).to(activation)


def by_weights(activation: Tensor, maps: Sequence[Tensor], measure: Literal["norms", "ranges"]) -> Tensor:
    """|h_j| times the size of the weights around the neuron, see `relative_sizes`; activation (width,) -> (width,)."""
    return activation * relative_sizes(maps, measure).to(activation)


def relative_sizes(maps: Sequence[Tensor], measure: Literal["norms", "ranges"]) -> Tensor:
    """How large the weights around each neuron are: of each map the sizes over the largest, added up; (width,).

    Args:
        maps: each (width, n): a neuron's row of the gate and of the up projection, or of what there is in their place;
            its column of the down projection.
        measure: "norms", or "ranges": the largest weight less the smallest, as in the data-driven score of optipfair
            0.4.2 (there "MAW"; arXiv 2512.22671).
    """
    sizes = [torch.linalg.vector_norm(w, dim=1) if measure == "norms" else w.amax(dim=1) - w.amin(dim=1) for w in maps]
    return torch.stack([(size / size.max().clamp_min(1e-12)).cpu() for size in sizes]).sum(dim=0)


def saliencies(down: Tensor, moment: Tensor, *, damping: float = 0.01, name: str = "a map") -> Tensor:
    """W_j^T W_j / [C^-1]_jj: what the FFN's output loses with a neuron if the others make up for it (equation 4 of
    SlimGPT); down (rows, width), moment C (width, width) -> (width,)."""
    inverse, _ = damped_inverse(moment, damping, name)
    return down.to(inverse).square().sum(dim=0) / inverse.diagonal()


def leverages(moment: Tensor, *, damping: float = 0.01, name: str = "a map") -> Tensor:
    """Ridge leverage [C (C + lambda I)^-1]_jj: the share of a neuron's activation that no other can stand for;
    moment (width, width) -> (width,)."""
    inverse, ridge = damped_inverse(moment, damping, name)
    return 1 - ridge * inverse.diagonal()


def elimination(down: Tensor, moment: Tensor, *, damping: float = 0.01, name: str = "a map") -> Tensor:
    """The place of each neuron in backward elimination, the first to go 0: always those whose loss after the refit of
    all that is left is least; down (rows, width), moment (width, width) -> (width,)."""
    width = len(moment)
    step = max(1, width // _SHARE)
    schedule = [min(step, width - 1 - gone) for gone in range(0, width - 1, step)]
    order = prune_groups(down, 2 * moment, 1, schedule, damping=damping, name=name).order
    places = torch.empty(width, dtype=torch.float64)
    places[order] = torch.arange(width, dtype=torch.float64)
    return places


def neuron_scores(
    model: Model, tokens: Tokens, *, score: Score = "activation", norm: Norm = "l2", order: Order, run: Run
) -> dict[str, Tensor]:
    """Scores of every block's FFN neurons, all on the model as it is.

    - "activation": the mean over samples of the norm over tokens of its activation (2SSP's, section 3.1);
    - "column", "norms", "ranges": that times a measure of weights, see `by_column` and `by_weights`;
    - "obs", "leverage", "elimination": from the activations' second moment, see `saliencies` and the next; a block at a
      time, whatever the order asked.

    Returns:
        By block number (as a string, for the journal), (width,) float64.

    Raises:
        NumericalError: a score is NaN or Inf.
        InvalidOptionError: a norm for a score that takes none.
    """
    second = score in ("obs", "leverage", "elimination")
    if second and norm != "l2":
        raise InvalidOptionError(f"score {score} is of second moments and takes no norm; {norm} asked")
    scores: dict[int, Tensor] = {}

    for visit in walk(model, tokens, order="blocks" if second else order, run=run, label="neuron scores"):
        number = visit.block.number
        if second:
            if visit.block.has_mlp:
                moment = visit.second_moment("mlp_hidden", _DTYPE).mean
                scores[number] = _of_moment(visit.block, moment, score)
            continue

        def add(x: Tensor, weights: Tensor, number: int = number) -> None:
            norms = activation_norms(x, weights, norm) / tokens.samples
            scores[number] = scores[number] + norms if number in scores else norms

        visit.advance(mlp_hidden=add)
    if score not in ("activation", "obs", "leverage", "elimination"):
        for number, activation in scores.items():
            with model.open(number) as block:
                scores[number] = _of_weights(block, activation, score)
    for number, each in scores.items():
        if not torch.isfinite(each).all():
            raise NumericalError(f"block {number}: the FFN's activations have NaN or Inf; use another dtype")
    return {str(number): each for number, each in scores.items()}


def scores_bytes(model: Model, score: Score) -> int:
    """What taking the scores holds at its peak beside hidden states."""
    if score not in ("obs", "leverage", "elimination"):
        return 0
    widths = [block.shape.width for block in model.layout().blocks.values()]
    return prune_bytes(model.hidden_size, max(widths, default=0), _DTYPE)


def _of_moment(block: Block, moment: Tensor, score: Score) -> Tensor:
    if moment.is_meta:  # of a rehearsal
        return torch.arange(len(moment), dtype=torch.float64)
    down, name = block.weight("mlp_out").detach(), f"block {block.number}, neurons"
    match score:
        case "obs":
            made = saliencies(down, moment, name=name)
        case "leverage":
            made = leverages(moment, name=name)
        case _:
            made = elimination(down, moment, name=name)
    return made.cpu().double()


def _of_weights(block: Block, activation: Tensor, score: Score) -> Tensor:
    down = block.weight("mlp_out").detach()
    if down.is_meta:  # of a rehearsal
        return activation
    down = down.float().cpu()
    if score == "column":
        return by_column(activation, down)
    return by_weights(activation, maps_around(block), "norms" if score == "norms" else "ranges")


def maps_around(block: Block) -> list[Tensor]:
    """The maps around a block's neurons, each (width, n) float32, as `relative_sizes` takes them."""
    down = block.weight("mlp_out").detach().float()
    into = [block.weight(role).detach().float() for role in ("gate", "up", "gate_up") if role in block.roles]
    rows = [part for each in into for part in each.split(down.shape[1])]  # gate and up may be stacked
    return [*rows, down.T]
