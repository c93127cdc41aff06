"""What a search minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from secateur.engine.loss import KLDivergence, Metric, NegativeLogLikelihood
from secateur.engine.sweep import Sweeper
from secateur.engine.tokens import Tokens
from secateur.errors import DataError

Criterion = Literal["ppl", "kl"]


def search_metric(criterion: Criterion, reference: Callable[[], Tensor]) -> Metric:
    """The loss of a search: of the text ("ppl", as its logarithm), or the divergence from a reference ("kl").

    Args:
        reference: its hidden states after the last block, (samples, length, hidden); asked for only where needed.
    """
    return KLDivergence(reference()) if criterion == "kl" else NegativeLogLikelihood()


def dense_metric(sweeper: Sweeper, search: Tokens, criterion: Criterion) -> Metric:
    """As `search_metric`, on the windows `search`; the reference is the model as it is now, whose final hidden states
    are a journaled step named "dense states".

    Raises:
        DataError: no prediction in `search` counts.
    """
    if not search.weights[:, 1:].any():
        raise DataError(f"no token counts in the {search.samples} windows of the search; give more search_samples")
    return search_metric(criterion, lambda: sweeper.run.step("dense states", lambda: sweeper.final_states(search)))
