"""Losses of next-token predictions, in float32, with logits in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.engine.blocks import head_logits, head_logits_with_grad
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError
from secateur.model.handle import Model
from secateur.run import Run

LOGIT_BYTES = 256 * 2**20  # a chunk of float32 logits
SLICE_BYTES = 4 * 2**20  # of these, at once through a softmax on a CPU: its copies stay in the cache


class Metric(Protocol):
    """A loss per predicted token, from logits.

    Attributes:
        heads: passes through the head that `prepare` takes.
    """

    @property
    def heads(self) -> int: ...

    def prepare(self, model: Model, sample: int, positions: slice) -> Tensor | None:
        """What the chunk needs once for all variants."""

    def loss(self, logits: Tensor, targets: Tensor, prepared: Tensor | None) -> Tensor:
        """logits (tokens, vocabulary) float32, targets (tokens,) -> losses (tokens,)."""


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """-log p(target), in nats; its mean's exponential is the perplexity."""

    heads = 0

    def prepare(self, model: Model, sample: int, positions: slice) -> None:
        return None

    def loss(self, logits: Tensor, targets: Tensor, prepared: Tensor | None) -> Tensor:
        rows = _slice_rows(logits)
        some = zip(logits.split(rows), targets.split(rows), strict=True)
        return torch.cat([F.cross_entropy(each, wanted, reduction="none") for each, wanted in some])


@dataclass(frozen=True)
class KLDivergence:
    """KL(reference || model) per token, in nats.

    Attributes:
        reference: the reference model's hidden states after its last block, (samples, length, hidden). Kept instead of
            logits, which are larger by vocabulary / hidden. They go through the final norm and head as these are when
            the loss is taken: a method that changes those must not keep using it.
    """

    reference: Tensor
    heads = 1

    def prepare(self, model: Model, sample: int, positions: slice) -> Tensor:
        logits = head_logits(model, self.reference[sample, positions]).float()
        return F.log_softmax(logits, dim=-1)

    def loss(self, logits: Tensor, targets: Tensor, prepared: Tensor | None) -> Tensor:
        assert prepared is not None  # narrows the type; `prepare` returned it
        return kl_divergence(logits, prepared)


def kl_divergence(logits: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || softmax(logits)) per row, in nats: logits and log-probabilities (tokens, vocabulary) float32."""
    rows = _slice_rows(logits)
    some = zip(logits.split(rows), log_q.split(rows), strict=True)
    return torch.cat([_kl(F.log_softmax(each, dim=-1), wanted) for each, wanted in some])


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) per row, of log-probabilities (rows, vocabulary)."""
    return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(dim=-1)


def _slice_rows(logits: Tensor) -> int:
    """Rows of float32 logits (tokens, vocabulary) to take at once; all of them where launches cost more than memory."""
    if logits.device.type != "cpu":
        return len(logits)
    return max(1, SLICE_BYTES // (4 * logits.shape[-1]))


def logit_bytes(model: Model, length: int) -> int:
    """A chunk of logits, twice: in the model's dtype and in float32, or, for KL, beside the reference's."""
    return 2 * min(LOGIT_BYTES, 4 * model.vocab_size * length)


@torch.no_grad()
def sample_losses(
    model: Model, hidden: Sequence[Tensor], tokens: Tokens, sample: int, metric: Metric, run: Run
) -> Tensor:
    """Weighted sums of losses over one sample's predictions, for several variants' hidden states.

    Args:
        hidden: per variant, the states after the last block for this sample, (length, hidden).

    Returns:
        (variants,) float64: sum over t of weight[t] * loss(prediction of token t), t from 1 to length - 1.
    """
    targets, weights = tokens.ids[sample, 1:], tokens.weights[sample, 1:].double()
    sums = torch.zeros(len(hidden), dtype=torch.float64)
    chunk = max(1, LOGIT_BYTES // (4 * model.vocab_size))
    for start in range(0, tokens.length - 1, chunk):
        positions = slice(start, min(start + chunk, tokens.length - 1))
        prepared = metric.prepare(model, sample, positions)
        if prepared is not None:
            run.meter.head_tokens += len(prepared)
        for variant, states in enumerate(hidden):
            logits = head_logits(model, states[positions]).float()
            losses = metric.loss(logits, targets[positions].to(logits.device), prepared)
            sums[variant] += (losses.cpu().double() * weights[positions]).sum()
            run.meter.head_tokens += len(losses)
    return sums


def require_slopes(model: Model) -> None:
    """
    Raises:
        InvalidOptionError: the model's dtype has no room for a mean loss's gradients, which would be 0.
    """
    if model.dtype == torch.float16:
        raise InvalidOptionError("gradients of the loss vanish in float16; take bfloat16 or float32 (--dtype)")


def loss_slopes(model: Model, hidden: Tensor, tokens: Tokens, samples: Tensor, metric: Metric) -> tuple[float, Tensor]:
    """The mean loss over some samples' counted predictions, and its gradient by the states after the last block.

    Each chunk of logits is differentiated at once, so that only one exists at a time.

    Args:
        hidden: (samples, length, hidden).
        samples: their places in `tokens`, (samples,).

    Returns:
        nats, 0 where nothing counts; (samples, length, hidden) in the states' dtype.
    """
    slopes, total = torch.zeros_like(hidden), 0.0
    counted = float(tokens.weights[samples, 1:].double().sum()) or 1.0
    chunk = max(1, LOGIT_BYTES // (4 * model.vocab_size))
    with model.open_ends():
        for place, sample in enumerate(samples.tolist()):
            for start in range(0, tokens.length - 1, chunk):
                positions = slice(start, min(start + chunk, tokens.length - 1))
                states = hidden[place, positions].detach().requires_grad_()
                with torch.enable_grad():
                    logits = head_logits_with_grad(model, states).float()
                    targets, weights = (
                        each[sample, 1:][positions].to(logits.device) for each in (tokens.ids, tokens.weights)
                    )
                    losses = metric.loss(logits, targets, metric.prepare(model, sample, positions))
                    loss = (losses * weights).sum() / counted
                total += loss.item()
                (slopes[place, positions],) = torch.autograd.grad(loss, states)
    return total, slopes
