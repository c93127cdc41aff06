"""2SSP: A Two-Stage Framework for Structured Pruning of LLMs (arXiv 2501.17771)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from secateur.engine.loss import NegativeLogLikelihood
from secateur.engine.sweep import Part, sweeper_of
from secateur.engine.tokens import Tokens
from secateur.engine.walk import Order
from secateur.errors import InfeasibleBudgetError, InvalidOptionError
from secateur.methods.registry import Amount, method
from secateur.model.budget import COARSE, Budget, reachable
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.solvers.criterion import Criterion, dense_metric
from secateur.solvers.greedy import Screen, greedy_removal
from secateur.solvers.scores import Norm, Score, neuron_scores, scores_bytes, top_neurons
from secateur.surgery.edits import DropAttention, Edit, KeepNeurons


class Balance(NamedTuple):
    """Of the two stages: how many attention modules go, and each block's FFN width, by block number."""

    attentions: int
    widths: dict[int, int]


def attention_count(layout: Layout, sparsity: float, alpha: float) -> int:
    """Equation 5: N_attn = round(L * s^((|FFN| / |Attn|) / alpha)), rounded half up.

    |FFN| and |Attn| are one module's parameters, L the number of blocks that have an attention, s the share of the
    blocks' parameters to remove.
    """
    attention = [block.attention for block in layout.blocks.values() if block.attention]
    mlp = [block.mlp for block in layout.blocks.values() if block.mlp]
    if not attention or not mlp:
        return 0
    ratio = (sum(mlp) / len(mlp)) / (sum(attention) / len(attention))
    return math.floor(len(attention) * sparsity ** (ratio / alpha) + 0.5)


def balance(layout: Layout, budget: Budget, *, alpha: float = 1.5, attentions: int | None = None) -> Balance:
    """Balance the stages: the attention modules by equation 5, the rest of the budget from the FFNs, at one rate.

    Raises:
        InfeasibleBudgetError: the FFNs would have to lose everything, or less than nothing, or their widths are
            rounded so coarsely that the target is missed by more than a quarter of it.
        InvalidOptionError: alpha not positive, or more attention modules asked than there are.
    """
    modules = sum(block.attention > 0 for block in layout.blocks.values())
    if not alpha > 0:
        raise InvalidOptionError(f"alpha must be positive, not {alpha}")
    if attentions is not None and not 0 <= attentions <= modules:
        raise InvalidOptionError(f"{attentions} attention modules asked; the model has {modules}")
    balanced = _balance(layout, budget, alpha, attentions)
    if balanced is None:
        raise InfeasibleBudgetError(
            f"2ssp cannot remove {budget.sparsity:.4g} of the parameters of the {budget.of}; with these options it "
            f"reaches {reachable(lambda other: _balance(layout, other, alpha, attentions), budget)}"
        )
    return balanced


def _balance(layout: Layout, budget: Budget, alpha: float, attentions: int | None) -> Balance | None:
    """None where the budget is out of reach: equation 5's number jumps."""
    share = budget.block_share(layout)
    count = attention_count(layout, share, alpha) if attentions is None else attentions
    blocks = {number: block for number, block in layout.blocks.items() if block.mlp}
    sizes = [block.attention + block.attention_norms for block in layout.blocks.values() if block.attention]
    left = share * layout.block_parameters - (count * sum(sizes) / len(sizes) if count else 0)
    if not 0 < share < 1 or not blocks or left < 0:
        return None
    rate = left / sum(block.shape.width * block.neuron for block in blocks.values())
    widths = {n: budget.width(block.shape.width * (1 - rate), block.shape.width) for n, block in blocks.items()}
    taken = sum((block.shape.width - widths[n]) * block.neuron for n, block in blocks.items())
    missed = abs(taken - left) > COARSE * share * layout.block_parameters
    return None if missed or min(widths.values()) == 0 else Balance(count, widths)


@method(
    "2ssp",
    paper="https://arxiv.org/abs/2501.17771",
    unit="FFN neurons, then attention modules",
    samples=32,
    length=2048,
    bibtex="sandri2025ssp",
    edits=(KeepNeurons, DropAttention),
    needs="S forwards for the scores; then N rounds (equation 5) of one forward per attention module there is",
    shared="scores",
    amount=Amount(uniform=True),
)
def two_ssp(
    model: Model,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    alpha: float = 1.5,
    score: Score = "activation",
    norm: Norm = "l2",
    attentions: int | None = None,
    stage1_only: bool = False,
    screen: int | None = None,
    criterion: Criterion = "ppl",
    search_samples: int = 1,
    search_length: int | None = None,
    order: Order = "samples",
) -> Iterator[Edit]:
    """FFN neurons by activation norm, then whole attention modules by perplexity, balanced by equation 5.

    Args:
        alpha: balance of the stages in equation 5; larger removes more attention.
        score: of a neuron: activation (the paper's), that times the weights around it (column, norms, ranges), or from
            second moments (obs, leverage, elimination).
        norm: norm of a neuron's activations over tokens, l2 (the paper's) or l1 (its ablation).
        attentions: remove this many attention modules instead of equation 5's number.
        stage1_only: take the whole budget from the FFNs (the paper's ablation).
        screen: in stage 2 after its first round try only this many candidates per round, those of the lowest estimated
            losses; all if not given (the paper's).
        criterion: what stage 2 minimises, ppl (the paper's) or kl to the dense model.
        search_samples: calibration windows for stage 2.
        search_length: tokens of each of these; their whole length if not given.
        order: samples or blocks; how stage 1 walks (equal results, different memory).
    """
    if stage1_only and attentions:
        raise InvalidOptionError(f"stage1_only removes no attention; {attentions} asked")
    count, widths = balance(model.layout(), budget, alpha=alpha, attentions=0 if stage1_only else attentions)
    run.log("2ssp: %d attention modules go, FFN widths %s", count, sorted(set(widths.values())))
    search, sweeper = tokens.first(search_samples, search_length), sweeper_of(model, run)
    screened = None if screen is None else Screen(screen)
    metric = dense_metric(sweeper, search, criterion) if count else NegativeLogLikelihood()

    # Stage 1 scores the dense model to its end before the first edit; an edit inside the walk would be another method.
    scores = run.step(
        "scores",
        lambda: neuron_scores(model, tokens, score=score, norm=norm, order=order, run=run),
        scratch_bytes=scores_bytes(model, score),
    )
    for number, width in widths.items():
        yield KeepNeurons(number, top_neurons(scores[str(number)], width))

    sizes = {
        Part(number, "attention"): b.attention + b.attention_norms
        for number, b in model.layout().blocks.items()
        if b.attention
    }
    equal = None if attentions is not None else sizes  # a number that was asked for is a number
    for part, loss in greedy_removal(
        sweeper, search, list(sizes), count, metric=metric, key="2ssp stage 2", sizes=equal, screen=screened
    ):
        run.log("2ssp: without the attention of block %d: %s %.6f nats", part.block, criterion, loss)
        yield DropAttention(part.block)
