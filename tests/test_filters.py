"""A filter is part of a pruning: of its identity, its plan, its journal; method and filter share one walk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import tiny, tiny_closed, tiny_tokens
from oracles import edit_facts, job_of, mean_kl

from secateur.compensation import refits
from secateur.compensation.refit import refit
from secateur.driver import Filter, run_method
from secateur.engine.tokens import Tokens
from secateur.engine.walk import walk
from secateur.errors import InvalidEditError, InvalidOptionError, JournalError, UnsupportedEditError
from secateur.methods import Method, get_method, registry
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.modeling_secateur import FAMILIES
from secateur.planning import Request
from secateur.pruning import Job, Pruned, run_job
from secateur.run import MemoryStore, Run
from secateur.surgery.edits import Edit, KeepHeads, KeepNeurons, SetWeight

REFIT = Filter("refit", (), refit, {"damping": 1e-3})


def halve_heads(model: Model, tokens: Tokens, budget: Budget, run: Run) -> Iterator[Edit]:
    """Every other KV group, chosen by nothing, in no walk.

    A method for the test.
    """
    scores = run.step("scores", lambda: torch.ones(4))
    for number in model.numbers:
        yield KeepHeads(number, tuple(range(0, len(scores), 2)))


HEADS = Method("heads", halve_heads, "p", "heads", 2, 8, "@b", (KeepHeads,))
CASES: dict[str, dict[str, Any]] = {
    "2ssp": {"attentions": 1, "search_samples": 4},
    "slimgpt": {"compensate": False, "rounding": "carry"},
    "heads": {},
    "shortgpt": {},
    "blockpruner": {"search_samples": 4},
}
# Of what happens to whole modules, test_where_nothing_is_narrowed_it_costs_nothing; more of it is slow.
each_case = pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in ("shortgpt", "blockpruner"))) for m in CASES]
)
FORWARDS = {"slimgpt": 0, "heads": 2, "2ssp": 2 + 3}  # at most more, without the head; of the others 3


def filters_of(method: str) -> list[Filter]:
    return refits(get_method(method), FAMILIES["llama"])


@pytest.fixture(autouse=True)
def heads_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._METHODS, "heads", HEADS)


def job(method: str, model: Model, *filters: Filter, **options: Any) -> Job:
    options = {**CASES.get(method, {}), **options}
    request = Request(
        method=method, sparsity=0.4, options=options, filters=filters, calibration=tiny_tokens(model, 4, 16)
    )
    return job_of(request, model)


def run(method: str, *filters: Filter, model: Model | None = None, through: Run | None = None) -> tuple[Pruned, Run]:
    through = through or Run()
    return run_job(job(method, model or tiny("llama"), *filters), run=through), through


@each_case
def test_the_same_parts_go_and_the_model_comes_nearer_to_the_dense_one(method: str) -> None:
    dense = tiny("llama")
    tokens = tiny_tokens(dense, 4, 16)  # those of the calibration, so chance in them is to be believed
    whole = {"shrinkage": 0.0}
    believing = [replace(each, options=whole) if each.name == "refit" else each for each in filters_of(method)]
    (plain, _), (refitted, _) = run(method), run(method, *believing)
    if method == "heads":  # the others see the refitted model when they choose further
        assert edit_facts(plain.pruning.edits) == edit_facts(refitted.pruning.edits)
    assert plain.pruning.after.parameters == refitted.pruning.after.parameters
    assert mean_kl(dense, refitted.model, tokens) < mean_kl(dense, plain.model, tokens)


@each_case
def test_it_costs_a_few_forwards_more_as_foretold(method: str) -> None:
    model, filters = tiny("llama"), filters_of(method)
    (_, alone), (pruned, both) = run(method), run(method, *filters)
    more = both.meter.block_tokens - alone.meter.block_tokens
    assert more > 0 or method == "slimgpt"  # which has looked already
    assert more <= FORWARDS.get(method, 3) * 4 * 16 * 4
    foretold = job(method, model, *filters).plan
    assert foretold.after.parameters == pruned.pruning.after.parameters
    assert foretold.meter.block_tokens == pytest.approx(both.meter.block_tokens, rel=0.3)  # other blocks go


@each_case
def test_a_replay_takes_no_forward_and_closed_blocks_have_no_weights(method: str) -> None:
    filters = filters_of(method)
    pruned, recorded = run(method, *filters)
    again, replay = run(method, *filters, through=Run(store=recorded.store))
    assert replay.meter.block_tokens == replay.meter.head_tokens == 0
    closed = tiny_closed("llama")
    run(method, *filters, model=closed)
    assert pruned.model.fingerprint() == again.model.fingerprint() == closed.whole().fingerprint()


def test_it_is_part_of_the_identity_and_of_the_record() -> None:
    model = tiny("llama")
    other = Filter("refit", (), refit, {"damping": 0.1})
    second = Filter("again", (), refit, {"damping": 0.1})
    jobs = [job("2ssp", model, *filters) for filters in ((), (REFIT,), (other,), (REFIT, second))]
    assert len({each.fingerprint for each in jobs}) == 4
    pruned, _ = run("2ssp", REFIT)
    assert pruned.record.filters == {"refit": {"damping": 1e-3}}
    assert pruned.record.fingerprint == jobs[1].fingerprint
    assert run("2ssp")[0].record.filters is None


def test_what_it_may_yield_is_asked_of_the_family_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(model, "family", replace(model.family, cannot={"SetWeight": "of a whim"}))
    job("2ssp", model, REFIT)
    with pytest.raises(UnsupportedEditError, match="of a whim"):
        job("2ssp", model, Filter("refit", (SetWeight,), refit))


def test_where_nothing_is_narrowed_it_costs_nothing() -> None:
    (plain, alone), (filtered, both) = run("shortgpt"), run("shortgpt", REFIT)
    assert alone.meter == both.meter
    assert plain.model.fingerprint() == filtered.model.fingerprint()


def test_a_journal_answers_its_own_job_only() -> None:
    store = MemoryStore()
    first, _ = run("2ssp", through=Run(store=store))
    for other in (
        job("2ssp", tiny("llama", seed=1)),
        job("2ssp", tiny("llama"), REFIT),
        job("2ssp", tiny("llama"), alpha=2.0),
    ):
        with pytest.raises(JournalError):
            run_job(other, run=Run(store=store))
    again, _ = run("2ssp", through=Run(store=store))
    assert again.model.fingerprint() == first.model.fingerprint()


@pytest.mark.parametrize("filters", [(REFIT, REFIT), (Filter("odd", (), refit, {"damping": {1}}),)])
def test_what_would_make_two_jobs_one_is_refused_before_any_work(filters: tuple[Filter, ...]) -> None:
    with pytest.raises(InvalidOptionError, match=r"refit|odd"):
        job("2ssp", tiny("llama"), *filters)


def walks(model: Model, tokens: Tokens, budget: Budget, run: Run) -> Iterator[Edit]:
    """One head of each block, while walking."""
    for visit in walk(model, tokens, run=run):
        visit.observe(block_out=lambda x, w: None)
        yield KeepHeads(visit.block.number, (0,))


def impossible(model: Model, tokens: Tokens, run: Run, edits: Iterator[Edit]) -> Iterator[Edit]:
    yield next(edits)
    yield KeepNeurons(3, (99999,))


def test_a_run_that_fails_leaves_no_walk_behind() -> None:
    model, method = tiny("llama"), replace(HEADS, name="walks", prune=walks)
    bad = Filter("bad", (KeepNeurons,), impossible)
    with pytest.raises(InvalidEditError) as caught:
        run_method(model, method, tiny_tokens(model, 2, 8), Budget(0.5), Run(), filters=[bad])
    assert caught.tb is not None  # which still holds the generators
    assert model.guards == []
