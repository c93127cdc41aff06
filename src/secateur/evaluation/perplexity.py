"""Perplexity over windows, as the papers take it."""

from __future__ import annotations

import math
from typing import Any

from secateur.engine.sweep import DENSE, sample_sweep
from secateur.engine.tokens import Tokens
from secateur.errors import NumericalError
from secateur.model.handle import Model
from secateur.run import Run


def perplexity(model: Model, tokens: Tokens, *, run: Run | None = None, label: str = "perplexity") -> dict[str, Any]:
    """exp of the mean negative log-likelihood over all counted predictions; each window predicts length - 1 tokens.

    Windows are taken one at a time, logits in chunks, so memory does not grow with the text. Perplexities of different
    window lengths must not be compared.

    Returns:
        `perplexity`; `nll` in nats per token and its standard error over windows (None for one window); what it was
        taken over.

    Raises:
        NumericalError: the model gives NaN or Inf.
    """
    result = perplexity_by_window(model, tokens, run=run, label=label)
    return {name: value for name, value in result.items() if not name.startswith("window_")}


def perplexity_by_window(
    model: Model, tokens: Tokens, *, run: Run | None = None, label: str = "perplexity"
) -> dict[str, Any]:
    """As `perplexity`, with what paired comparisons need: `window_nll` and `window_predictions`, each window's own."""
    sums = sample_sweep(model, tokens, [DENSE], run=run, memory_bytes=0, label=label)[0]  # one window at a time
    counts = tokens.weights[:, 1:].double().sum(dim=1)
    nll = float(sums.sum() / counts.sum())
    if not math.isfinite(nll):
        raise NumericalError("the model's loss is NaN or Inf; try --dtype float32")
    counted = counts > 0  # of chat data, a window may have nothing that counts
    windows = (sums / counts)[counted]
    return {
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "nll": nll,
        "nll_stderr": float(windows.std() / math.sqrt(len(windows))) if len(windows) > 1 else None,
        "text": tokens.source.get("name"),
        "samples": tokens.samples,
        "length": tokens.length,
        "predictions": int((tokens.weights[:, 1:] > 0).sum()),
        "window_nll": windows.tolist(),
        "window_predictions": counts[counted].tolist(),
    }
