"""How faithful a pruned model is to its dense one, on one's own text: loss, divergence, agreement."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.engine.blocks import head_logits
from secateur.engine.loss import LOGIT_BYTES, NegativeLogLikelihood, kl_divergence
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError
from secateur.judge.perplexity import window_groups, window_states
from secateur.judge.results import Fidelity
from secateur.model.handle import Model, require_same_vocabulary
from secateur.run import Run


def fidelity(
    model: Model, dense: Model, tokens: Tokens, *, run: Run | None = None, label: str = "fidelity"
) -> Fidelity:
    """Compare each counted prediction of a model with the dense model's at the same place.

    One window at a time goes through a block, as many one after the other as `perplexity` holds of both models; of a
    window's logits only a chunk of the counted places exists at once.

    Args:
        tokens: every prediction is weighed by its token's weight; of chat data read with `count="responses"` only
            what the assistant says counts.

    Raises:
        InvalidOptionError: the models have different vocabularies.
        NumericalError: NaN or Inf.
    """
    run = run or Run()
    require_same_vocabulary(model, dense, "fidelity")
    blocks = len(model.numbers) + len(dense.numbers)
    sums = torch.zeros(tokens.samples, 4, dtype=torch.float64)
    counted = tokens.weights[:, 1:].any(dim=1).nonzero()[:, 0].tolist()
    with run.progress(label, blocks * tokens.samples) as done, model.open_ends(), dense.open_ends():
        done(blocks * (tokens.samples - len(counted)))
        for group in window_groups(counted, tokens.length, model, dense):
            ours, theirs = (window_states(each, tokens.ids[group], run, done) for each in (model, dense))
            for place, sample in enumerate(group):
                states = (ours[place], theirs[place])
                sums[sample] = _window(model, dense, states, tokens.ids[sample], tokens.weights[sample, 1:], run)
    counts = tokens.weights[:, 1:].double().sum(dim=1)
    if not sums.isfinite().all():
        raise NumericalError("the loss or the divergence is NaN or Inf; try --dtype float32")
    return _summary(sums, counts, tokens)


@torch.no_grad()
def _window(
    model: Model, dense: Model, states: tuple[Tensor, Tensor], ids: Tensor, weights: Tensor, run: Run
) -> Tensor:
    """Weighed sums over one window's predictions: loss, dense loss, KL and agreement, (4,) float64.

    Args:
        states: of the model and the dense one after their last block, (length, hidden) each.
        ids: (length,); weights: (length - 1,), of the predictions.
    """
    nll, sums = NegativeLogLikelihood(), torch.zeros(4, dtype=torch.float64)
    places = weights.nonzero()[:, 0]  # prompts and the like need no logits
    for some in places.split(max(1, LOGIT_BYTES // (2 * 4 * model.vocab_size))):
        ours = head_logits(model, states[0][some.to(states[0].device)]).float()
        theirs = head_logits(dense, states[1][some.to(states[1].device)]).float().to(ours.device)
        targets = ids[some + 1].to(ours.device)
        columns = (
            nll.loss(ours, targets, None),
            nll.loss(theirs, targets, None),
            kl_divergence(ours, F.log_softmax(theirs, dim=-1)),
            ours.argmax(dim=-1) == theirs.argmax(dim=-1),
        )
        sums += weights[some].double() @ torch.stack([column.double().cpu() for column in columns], dim=1)
        run.meter.head_tokens += 2 * len(some)
    return sums


def _summary(sums: Tensor, counts: Tensor, tokens: Tokens) -> Fidelity:
    """Means and standard errors: sums (samples, 4), counts (samples,)."""
    loss, dense_loss, kl, top1 = (sums.sum(dim=0) / counts.sum()).tolist()
    counted = counts > 0
    windows = sums[counted] / counts[counted, None]
    several = len(windows) > 1
    errors = (windows.std(dim=0) / math.sqrt(len(windows))).tolist() if several else [None] * 4
    return Fidelity(
        loss=loss, loss_stderr=errors[0], dense_loss=dense_loss, kl=kl, kl_stderr=errors[2], top1_agreement=top1,
        top1_agreement_stderr=errors[3], text=tokens.source.get("name"), count=tokens.source.get("count"),
        samples=tokens.samples, length=tokens.length, predictions=int((tokens.weights[:, 1:] > 0).sum()),
        bos=bool(tokens.source.get("bos")),
        window_nll=windows[:, 0].tolist(), window_kl=windows[:, 2].tolist(), window_top1=windows[:, 3].tolist(),
        window_predictions=counts[counted].tolist(),
    )  # fmt: skip
