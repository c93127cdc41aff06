"""Refinement: the weights that stay are trained towards the dense model's predictions, on the calibration and on text
that the dense model draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from secateur.compensation.drawn_text import with_drawn
from secateur.driver import Filter
from secateur.engine.loss import require_slopes
from secateur.engine.sweep import final_states
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.training import check_training, trained
from secateur.surgery.edits import CentreEmbedding, Edit, Rebase, SetWeight


def refine(
    model: Model,
    tokens: Tokens,
    run: Run,
    edits: Iterator[Edit],
    *,
    passes: float = 2.0,
    rate: float = 0.001,
    text: Literal["drawn", "calibration"] = "drawn",
) -> Iterator[Edit]:
    """When the method has ended, train all linear maps of the blocks by the divergence from the dense model.

    Args:
        passes: how many windows in all are trained on, as a multiple of the calibration's; a fraction is fine.
        rate: the learning rate at its peak, as a share of each weight matrix's root mean square: how far a step moves
            a weight. So it need not shrink as models grow.
        text: what more than one pass is over: "drawn", the calibration's windows and as many new ones per further pass,
            which the dense model writes, all mixed; or "calibration", the same ones again, which are soon learned by
            heart.

    Raises:
        InvalidOptionError: a value out of its range; a model in float16; a method that changes the residual stream's
            basis.
        NumericalError: the loss is NaN or Inf.
    """
    check_training(passes, rate)
    require_slopes(model)
    rounds = math.ceil(passes) if text == "drawn" else 1
    windows = with_drawn(model, tokens, run, rounds - 1)
    reference = run.step("dense states", lambda: final_states(model, windows, run=run))
    with run.holding(reference.numel() * reference.element_size()):
        for edit in edits:
            if isinstance(edit, (Rebase, CentreEmbedding)):
                raise InvalidOptionError(
                    "refine needs the dense model's final norm and head, which this method changes"
                )
            yield edit
        yield from trained(model, windows, run, reference, passes=passes / rounds, rate=rate)


REFINE = Filter("refine", (SetWeight,), refine)
