"""All weights of a model in training: float32 while it lasts, then rounded once to their own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from secateur.model.handle import Model


@contextmanager
def whole(model: Model) -> Iterator[nn.Module]:
    """The model with float32 weights that want gradients, all of them; an error brings back those of before, of which
    a copy is kept on the CPU."""
    weights = list(model.hf.parameters())
    before = [weight.detach().to("cpu", copy=True) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
        weight.data = weight.data.float()
    try:
        yield model.hf
    except BaseException:
        for weight, old in zip(weights, before, strict=True):
            weight.data = old.to(weight.device)
        raise
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.data, weight.grad = weight.data.to(old.dtype), None
        model.hf.eval()
