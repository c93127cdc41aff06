"""A method's edits, through its filters, made real. The only place that iterates methods and composes filters."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from secateur.account import account
from secateur.engine.tokens import Tokens
from secateur.errors import CheckpointError, InvalidOptionError
from secateur.methods import Method, Options
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.record import Sparsity
from secateur.run import Run
from secateur.surgery.apply import apply, predict, require_edits
from secateur.surgery.edits import Edit, Rebase, named

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filter:
    """What a method's edits go through before they are real: compensation, say.

    Attributes:
        edits: kinds that it may yield beside the method's own.
        apply: (model, tokens, run, edits, **options) -> edits. It gets each edit before it is made real and yields it,
            changed or not, with others around it. Its costly steps go through its run, whose keys are its own, and its
            statistics through `engine.walk.Follower`.
        options: part of the pruning's identity; what JSON can hold.
    """

    name: str
    edits: tuple[type[Edit], ...]
    apply: Callable[..., Iterator[Edit]]
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Pruning:
    """What was done to a model.

    Attributes:
        edits: in order, with block numbers of the model as loaded; of tensors the names only (see `edits.named`).
        before, after: the layouts.
        sparsity: asked, got and why.
    """

    method: str
    options: Options
    budget: Budget
    edits: list[Edit] = field(repr=False)
    before: Layout = field(repr=False)
    after: Layout = field(repr=False)
    sparsity: Sparsity = field(repr=False)


def run_method(
    model: Model,
    method: Method,
    tokens: Tokens,
    budget: Budget,
    run: Run,
    *,
    filters: Sequence[Filter] = (),
    **options: Any,
) -> Pruning:
    """Prune `model` in place: each edit the method yields is applied before the method resumes.

    Raises:
        UnsupportedEditError: the family cannot do what the method or a filter needs; nothing has been done.
        CheckpointError: the real model is not what the edits predict (a bug; nothing should be saved).
    """
    complete = method.complete(options)
    require_edits_of(model, method, filters)
    before = predicted = model.layout()
    may = {*method.edits, *method.able, *(kind for filtering in filters for kind in filtering.edits)}
    run.root.rebases = Rebase in may
    edits = []
    with ExitStack() as stack:  # a generator that is left behind would keep its walk, and a block, open
        stream = _closing(stack, method.prune(model, tokens, budget, run, **complete))
        for filtering in filters:
            scope = run.scoped(filtering.name)
            stream = _closing(stack, filtering.apply(model, tokens, scope, stream, **filtering.options))
        for edit in stream:
            apply(model, edit)
            if not run.rehearses:
                logger.debug("applied %s%s", type(edit).__name__, _place(edit))
            predicted = predict(predicted, edit)
            run.applied(edit)
            edits.append(named(edit))
    after = model.layout()
    if after != predicted:
        raise CheckpointError("the pruned model's layout is not the one that its edits predict; please report this")
    sparsity = account(method, complete, budget, edits, before, after)
    return Pruning(method.name, complete, budget, edits, before, after, sparsity)


def check_filters(filters: Sequence[Filter]) -> None:
    """Refuse what would make two jobs one, or one run's steps another's."""
    names = [filtering.name for filtering in filters]
    if len(set(names)) < len(names):
        raise InvalidOptionError(f"filters need names of their own, not {', '.join(names)}")
    for filtering in filters:
        try:
            json.dumps(dict(filtering.options))
        except (TypeError, ValueError) as error:
            raise InvalidOptionError(f"options of the filter '{filtering.name}' are no JSON: {error}") from error


def _closing(stack: ExitStack, edits: Iterator[Edit]) -> Iterator[Edit]:
    stack.callback(getattr(edits, "close", lambda: None))
    return edits


def require_edits_of(model: Model, method: Method, filters: Sequence[Filter]) -> None:
    require_edits(model.family, *method.edits, *(kind for filtering in filters for kind in filtering.edits))


def _place(edit: Edit) -> str:
    where = getattr(edit, "block", getattr(edit, "site", None))
    return "" if where is None else f" at {where}"
