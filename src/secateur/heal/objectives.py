"""What is minimised: the loss on labels, or the divergence from the dense model; logits in chunks, loss in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from secateur.engine.blocks import head_logits, head_logits_with_grad
from secateur.engine.loss import LOGIT_BYTES
from secateur.errors import InvalidOptionError
from secateur.heal.data import IGNORED
from secateur.model.handle import Model, require_same_vocabulary

Batch = Mapping[str, Tensor]


class Objective(Protocol):
    def total(self, batch: Batch) -> Tensor:
        """The loss summed over the batch's counted tokens; float32, differentiable."""


@dataclass(frozen=True)
class Labels:
    """-log p(token) of every counted token."""

    model: Model

    def total(self, batch: Batch) -> Tensor:
        states, targets = predicting(self.model, batch)

        def loss(states: Tensor, targets: Tensor) -> Tensor:
            logits = head_logits_with_grad(self.model, states).float()
            return F.cross_entropy(logits, targets.to(logits.device), reduction="sum")

        return _in_chunks(loss, self.model, states, targets)


@dataclass(frozen=True)
class Distillation:
    """KL(teacher || model) at every counted token; which token it is does not matter.

    Attributes:
        teacher: usually the dense model; it must have the same vocabulary.

    Raises:
        InvalidOptionError: it has not.
    """

    model: Model
    teacher: Model

    def __post_init__(self) -> None:
        model, teacher = self.model, self.teacher
        if teacher.hf is model.hf:
            raise InvalidOptionError("the model cannot be its own teacher; load the dense model apart")
        require_same_vocabulary(model, teacher, "distillation")

    def total(self, batch: Batch) -> Tensor:
        states, _ = predicting(self.model, batch)
        with torch.no_grad():
            wanted, _ = predicting(self.teacher, batch)

        def loss(states: Tensor, wanted: Tensor) -> Tensor:
            log_p = F.log_softmax(head_logits(self.teacher, wanted).float(), dim=-1)
            log_q = F.log_softmax(head_logits_with_grad(self.model, states).float(), dim=-1)
            return F.kl_div(log_q, log_p.to(log_q.device), log_target=True, reduction="sum")

        return _in_chunks(loss, self.model, states, wanted)


def predicting(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """The states after the last block that predict the batch's counted tokens, and these tokens.

    Returns:
        states (counted, hidden), differentiable; tokens (counted,).
    """
    caught: list[Tensor] = []

    def catch(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = model.blocks[-1].register_forward_hook(catch)
    try:  # of the head only one position is asked, and thrown away
        model.hf(input_ids=batch["input_ids"].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    (hidden,) = caught  # (rows, length, hidden)
    labels = batch["labels"][:, 1:]
    counts = labels != IGNORED
    return hidden[:, :-1][counts.to(hidden.device)], labels[counts]


@contextmanager
def recomputing(model: Model) -> Iterator[None]:
    """Of each block only the input is kept for the gradient, and all else is computed again: gradient checkpointing."""
    blocks: list[Any] = list(model.blocks)
    own = [block.__dict__.get("forward") for block in blocks]  # accelerate's, where a model is spread
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _in_chunks(loss: Callable[[Tensor, Tensor], Tensor], model: Model, states: Tensor, beside: Tensor) -> Tensor:
    """The sum of `loss` over chunks of rows. Where there are several, a chunk's logits are computed again when it is
    differentiated, so that only one chunk's exist at a time."""
    rows = max(1, LOGIT_BYTES // 4 // (4 * model.vocab_size))
    if len(states) <= rows:
        return loss(states, beside)
    total = states.new_zeros((), dtype=torch.float32)
    for some, besides in zip(states.split(rows), beside.split(rows), strict=True):
        total = total + checkpoint(loss, some, besides, use_reentrant=False)
    return total
