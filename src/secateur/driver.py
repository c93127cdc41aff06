"""The driver: the only place that iterates methods and composes filters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.engine.tokens import Tokens
from secateur.errors import CheckpointError
from secateur.methods import Method
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.run import Run
from secateur.surgery.apply import apply, predict, require_edits
from secateur.surgery.edits import Edit

logger = logging.getLogger(__name__)

EditFilter = Callable[[Model, Tokens, Run, Iterator[Edit]], Iterator[Edit]]


@dataclass(frozen=True)
class Pruning:
    """What was done to a model.

    Attributes:
        edits: in order, with block numbers of the model as loaded.
        before, after: the layouts.
    """

    method: str
    options: dict[str, Any]
    budget: Budget
    edits: list[Edit] = field(repr=False)
    before: Layout = field(repr=False)
    after: Layout = field(repr=False)


def run_method(
    model: Model,
    method: Method,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    filters: Sequence[EditFilter] = (),
    **options: Any,
) -> Pruning:
    """Prune `model` in place: each edit the method yields is applied before the method resumes.

    Raises:
        UnsupportedEditError: the family cannot do what the method needs; nothing has been done.
        CheckpointError: the real model is not what the edits predict (a bug; nothing should be saved).
    """
    complete = method.complete(options)
    require_edits(model.family, *method.edits)
    before = predicted = model.layout()
    stream = method.prune(model, tokens, budget, run, **complete)
    for each in filters:
        stream = each(model, tokens, run, stream)
    edits = []
    for edit in stream:
        apply(model, edit)
        where = getattr(edit, "block", getattr(edit, "site", None))
        logger.debug("applied %s%s", type(edit).__name__, "" if where is None else f" at {where}")
        predicted = predict(predicted, edit)
        edits.append(edit)
    after = model.layout()
    if after != predicted:
        raise CheckpointError("the pruned model's layout is not the one that its edits predict; please report this")
    return Pruning(method.name, complete, budget, edits, before, after)
