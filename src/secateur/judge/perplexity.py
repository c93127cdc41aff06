"""Perplexity over windows, as the papers take it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from secateur.engine.sweep import DENSE, sample_sweep
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, NumericalError
from secateur.model.handle import Model
from secateur.run import Run


def perplexity(model: Model, tokens: Tokens, *, run: Run | None = None, label: str = "perplexity") -> dict[str, Any]:
    """exp of the mean negative log-likelihood over all counted predictions; each window predicts length - 1 tokens.

    Windows are taken one at a time, logits in chunks, so memory does not grow with the text. Perplexities of different
    window lengths must not be compared; `ratio` refuses to.

    Returns:
        `perplexity`; `nll` in nats per token and its standard error over windows (None for one window); what it was
        taken over: `text`, `samples`, `length`, `predictions` (how many were counted) and the tokens' `fingerprint`.

    Raises:
        NumericalError: the model gives NaN or Inf.
    """
    result = perplexity_by_window(model, tokens, run=run, label=label)
    return {name: value for name, value in result.items() if not name.startswith("window_")}


def perplexity_by_window(
    model: Model, tokens: Tokens, *, run: Run | None = None, label: str = "perplexity"
) -> dict[str, Any]:
    """As `perplexity`, with what paired comparisons need of each window that counts.

    Returns:
        Also `window_nll` and `window_predictions`, what the window weighs: `nll` is the mean of the one weighed by the
        other. Windows where nothing counts are left out.
    """
    sums = sample_sweep(model, tokens, [DENSE], run=run, memory_bytes=0, label=label)[0]  # one window at a time
    counts = tokens.weights[:, 1:].double().sum(dim=1)
    nll = float(sums.sum() / counts.sum())
    if not math.isfinite(nll):
        raise NumericalError("the model's loss is NaN or Inf; try --dtype float32")
    counted = counts > 0  # of chat data, a window may have nothing that counts
    windows = (sums / counts)[counted]
    return {
        "perplexity": _exp(nll),
        "nll": nll,
        "nll_stderr": float(windows.std() / math.sqrt(len(windows))) if len(windows) > 1 else None,
        "text": tokens.source.get("name"),
        "samples": tokens.samples,
        "length": tokens.length,
        "predictions": int((tokens.weights[:, 1:] > 0).sum()),
        "fingerprint": tokens.fingerprint(),
        "window_nll": windows.tolist(),
        "window_predictions": counts[counted].tolist(),
    }


def ratio(dense: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How many times the perplexity of `dense` the other one's is; both as `perplexity` gives them.

    Raises:
        InvalidOptionError: they were not taken over the same tokens in windows of the same length. A token of a long
            window is predicted from more, so its perplexity is lower whatever the model.
    """
    if dense["length"] != other["length"]:
        raise InvalidOptionError(
            f"perplexities over windows of {dense['length']} and of {other['length']} tokens cannot be compared; take "
            "both at one length"
        )
    if dense["fingerprint"] != other["fingerprint"]:
        raise InvalidOptionError(
            f"perplexities over different tokens ({dense['text']}, {dense['samples']} windows, and {other['text']}, "
            f"{other['samples']}) cannot be compared; take both on one text, by one tokenizer"
        )
    return _exp(other["nll"] - dense["nll"])


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
