"""What a search minimises."""

from __future__ import annotations

from typing import Literal

from secateur.engine.loss import KLDivergence, Metric, NegativeLogLikelihood
from secateur.engine.sweep import final_states
from secateur.engine.tokens import Tokens
from secateur.errors import DataError
from secateur.model.handle import Model
from secateur.run import Run

Criterion = Literal["ppl", "kl"]


def search_metric(model: Model, search: Tokens, criterion: Criterion, run: Run) -> Metric:
    """The loss of a search: of the text ("ppl", as its logarithm), or the divergence from the model as it is now
    ("kl"), whose final hidden states are a journaled step named "dense states".

    Raises:
        DataError: no prediction in `search` counts.
    """
    if not search.weights[:, 1:].any():
        raise DataError(f"no token counts in the {search.samples} windows of the search; give more search_samples")
    if criterion == "kl":
        return KLDivergence(run.step("dense states", lambda: final_states(model, search, run=run)))
    return NegativeLogLikelihood()
