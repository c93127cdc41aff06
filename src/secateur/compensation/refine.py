"""Refinement: the weights that stay are trained towards the dense model's predictions on the calibration."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.driver import Filter
from secateur.engine.sweep import sweeper_of
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.training import check_training, trained
from secateur.surgery.edits import CentreEmbedding, Edit, Rebase, SetWeight


def refine(
    model: Model, tokens: Tokens, run: Run, edits: Iterator[Edit], *, passes: float = 4.0, rate: float = 0.0025
) -> Iterator[Edit]:
    """When the method has ended, train all linear maps of the blocks by the divergence from the dense model.

    Args:
        passes: over the calibration's windows; a fraction is fine.
        rate: the learning rate at its peak, as a share of each weight matrix's root mean square: how far a step moves
            a weight. So it need not shrink as models grow.

    Raises:
        InvalidOptionError: a value out of its range; a method that changes the residual stream's basis.
        NumericalError: the loss is NaN or Inf.
    """
    check_training(passes, rate)
    reference = run.step("dense states", lambda: sweeper_of(model, run).final_states(tokens))
    for edit in edits:
        if isinstance(edit, (Rebase, CentreEmbedding)):
            raise InvalidOptionError("refine needs the dense model's final norm and head, which this method changes")
        yield edit
    yield from trained(model, tokens, run, reference, passes=passes, rate=rate)


REFINE = Filter("refine", (SetWeight,), refine)
