"""What every method owes, for the tests of whoever writes one; secateur's own are held to it too.

    import pytest
    from secateur.testing import CHECKS, Contract

    @pytest.mark.parametrize("check", CHECKS)
    def test_contract(check):
        getattr(Contract(method="least-added"), check)()

An AssertionError says what is owed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from secateur.driver import Pruning, run_method
from secateur.engine.tokens import Tokens
from secateur.errors import InfeasibleBudgetError
from secateur.methods import Method, get_method
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.model.load import load
from secateur.model.tiny import tiny
from secateur.output import save
from secateur.planning import Plan, Request, plan
from secateur.run import MemoryStore, Run
from secateur.running import prune
from secateur.surgery.apply import apply
from secateur.surgery.edits import Edit

CHECKS = (
    "changes_by_edits_alone", "replays", "meets_the_budget", "refuses_what_cannot_be", "costs_what_was_planned",
    "survives_saving",
)  # fmt: skip

# Options of secateur's own methods that are small enough for tiny models.
TINY_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "2ssp": {"attentions": 1},
    "evopress": {
        "generations": 2, "offspring": 4, "initial": 4, "initial_tokens": 8, "selection_tokens": "8,16",
    },
    "slicegpt": {"multiple": 1},
    "slimgpt": {"rounding": "carry"},
}  # fmt: skip


def a_block(layout: Layout) -> float:
    """The parameters of the largest block."""
    return max(block.parameters for block in layout.blocks.values())


def edit_facts(edits: Sequence[Edit]) -> list[tuple[str, int | None, tuple[int, ...] | None]]:
    """Kind, place and what stays, of edits that are to be compared."""
    places = [getattr(edit, "block", getattr(edit, "site", None)) for edit in edits]
    return [(type(e).__name__, at, getattr(e, "index", None)) for e, at in zip(edits, places, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A method as it is tried.

    Attributes:
        method: its name.
        options: its own, small enough for a tiny model.
        unit: of what it removes, in parameters: the target may be missed by as much.
        model: makes the model, the same each time; a tiny random Llama with grouped queries.
        budget: that is asked for.
        samples, length: of the calibration.
        spread: how many times more or less than planned the work may be; 1 where nothing is searched for.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    unit: Callable[[Layout], float] = a_block
    model: Callable[[], Model] = lambda: tiny("llama")
    budget: Budget = field(default_factory=lambda: Budget(0.5))
    samples: int = 2
    length: int = 8
    spread: float = 1.0

    def changes_by_edits_alone(self) -> None:
        """The model changes only while the method waits, by the kinds of edits that it declares."""
        model, method = self.model(), self._method
        stream = method.prune(model, self.tokens, self.budget, Run(), **method.complete(self.options))
        edits = list(_watched(stream, model))
        _owe(bool(edits), "it yields edits")
        undeclared = {type(edit).__name__ for edit in edits if not isinstance(edit, method.edits + method.able)}
        _owe(not undeclared, f"`edits` names all that it yields, {', '.join(sorted(undeclared))} too")

    def replays(self) -> None:
        """The same edits each time, and out of a journal without a forward."""
        store = MemoryStore()
        runs = [Run(3, store=store), Run(3, store=store), Run(3)]
        models = [self.model() for _ in runs]
        prunings = [self.prune(model, run) for model, run in zip(models, runs, strict=True)]
        first, *others = (edit_facts(pruning.edits) for pruning in prunings)
        _owe(others == [first, first], "the same edits each time: draw from `run.rng` alone")
        _owe(len({model.fingerprint() for model in models}) == 1, "the same weights each time")
        _owe(not runs[1].meter.asked_tokens, "a replay without a forward: put all work into `run.step`")

    def meets_the_budget(self) -> None:
        """The target is met to a unit, in the layout that was predicted."""
        model = self.model()
        pruning = self.prune(model)
        _owe(pruning.after == model.layout(), "the layout that its edits predict")
        gone, target = self.budget.achieved(pruning.before, pruning.after), self.budget.target(pruning.before)
        missed = abs(gone / self.budget.sparsity - 1) * target
        _owe(gone > 0, "a smaller model")
        _owe(missed <= self.budget.round_to * self.unit(pruning.before), f"the budget met to a unit, not by {missed:,}")

    def refuses_what_cannot_be(self) -> None:
        """What is out of reach is refused before any work, by the plan already."""
        model, run = self.model(), Run()
        before = model.fingerprint()
        for sparsity in (0.999, 0.001):
            for attempt in (lambda s: self.prune(model, run, Budget(s)), lambda s: self.planned(model, Budget(s))):
                try:
                    attempt(sparsity)
                except InfeasibleBudgetError as error:
                    _owe(bool(re.search(r"\d\.\d+.* to \d\.\d+", str(error))), f"the range that is in reach: {error}")
                    continue
                _owe(False, f"an InfeasibleBudgetError at a sparsity of {sparsity}")
        _owe((model.fingerprint(), run.meter.block_tokens) == (before, 0), "a refusal before any work")

    def costs_what_was_planned(self) -> None:
        """A rehearsal on a hollow model counts the work and foretells the layout."""
        model, run = self.model(), Run()
        planned, pruning = self.planned(model), self.prune(model, run)
        missed = abs(pruning.after.parameters - planned.after.parameters)
        _owe(planned.before == pruning.before, "a plan of this very model")
        _owe(missed <= self.unit(pruning.before), f"a plan of the layout to a unit, not by {missed:,} parameters")
        for count in ("block_tokens", "head_tokens", "asked_tokens"):
            ran, expected = getattr(run.meter, count), getattr(planned.meter, count)
            within = expected / self.spread <= ran <= expected * self.spread
            _owe(within, f"{count} as planned, {expected:,}, not {ran:,}")

    def survives_saving(self) -> None:
        """What is saved is the model that was pruned, and its record names the edits."""
        model = self.model()
        pruned = prune(
            model, self.method, sparsity=self.budget.sparsity, of=self.budget.of, round_to=self.budget.round_to,
            calibration=self.tokens, options=self.options,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            save(pruned, Path(folder) / "model")
            _owe(load(f"{folder}/model").fingerprint() == model.fingerprint(), "a checkpoint that is the model")
        _owe(len(pruned.record.edits) == len(pruned.pruning.edits), "a record of all edits")

    @cached_property
    def tokens(self) -> Tokens:
        """Random windows, (samples, length)."""
        generator = torch.Generator().manual_seed(0)
        return Tokens.of(torch.randint(5, self.model().vocab_size, (self.samples, self.length), generator=generator))

    def prune(self, model: Model, run: Run | None = None, budget: Budget | None = None) -> Pruning:
        return run_method(model, self._method, self.tokens, budget or self.budget, run or Run(), **self.options)

    def planned(self, model: Model, budget: Budget | None = None) -> Plan:
        """The plan of such a pruning."""
        budget = budget or self.budget
        request = Request(
            sparsity=budget.sparsity, method=self.method, of=budget.of, round_to=budget.round_to,
            options=self.options, samples=self.samples, length=self.length,
        )  # fmt: skip
        return plan(request, model)

    @property
    def _method(self) -> Method:
        return get_method(self.method)


def _watched(edits: Iterator[Edit], model: Model) -> Iterator[Edit]:
    """Apply each edit; the model may not change while the method runs."""
    before = model.fingerprint()
    for edit in edits:
        _owe(model.fingerprint() == before, "no change but by edits")
        apply(model, edit)
        before = model.fingerprint()
        yield edit
    _owe(model.fingerprint() == before, "no change but by edits")


def _owe(kept: bool, what: str) -> None:
    if not kept:
        raise AssertionError(f"a method owes {what}")
