"""Refinement: exact gradients of the last loss, masters in float32, and a filter like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, tiny, tiny_closed, tiny_hf, tiny_tokens
from oracles import Watcher, edited, job_of, mean_kl, standing, weighted

from secateur.card import card
from secateur.cli.options import CompensationOptions
from secateur.compensation import drawn_text, get_filter
from secateur.driver import Filter
from secateur.engine.blocks import BlockInputs
from secateur.engine.loss import KLDivergence
from secateur.engine.sweep import final_states
from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.journal import Journal, Journaled, taken_bytes
from secateur.model.handle import Model
from secateur.planning import Request
from secateur.pruning import Job, Pruned, run_job
from secateur.run import Run
from secateur.sharing import SharingRun
from secateur.solvers import training


def refining_by(**options: Any) -> Filter:
    return get_filter("refine", **options)


def job(model: Model, *filters: Filter, method: str = "2ssp") -> Job:
    request = Request(method=method, sparsity=0.4, filters=filters, calibration=tiny_tokens(model, 4, 16))
    return job_of(request, model)


def pruned(model: Model, *filters: Filter, run: Run | None = None, **how: Any) -> tuple[Pruned, Run]:
    run = run or Run()
    return run_job(job(model, *filters, **how), run=run), run


def test_the_model_comes_nearer_to_the_dense_one_and_no_part_more_goes() -> None:
    dense = tiny("llama")
    tokens = tiny_tokens(dense, 4, 16)
    by = refining_by(passes=8, rate=0.02, text="calibration")
    (plain, _), (refined, _) = pruned(tiny("llama")), pruned(tiny("llama"), by)
    assert mean_kl(dense, refined.model, tokens) < 0.5 * mean_kl(dense, plain.model, tokens)
    assert refined.pruning.after == plain.pruning.after
    curve = refined.record.notes["KL while training"]
    assert curve[-1] < curve[0]


def test_the_card_says_what_trained_and_what_was_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_text, "PROMPT", 4)
    both, only, once = (
        card(pruned(tiny("llama"), *some, refining_by(passes=passes, text=text))[0].record)
        for some, text, passes in (([get_filter("refit")], "calibration", 1.5), ([], "drawn", 1.5), ([], "drawn", 1.0))
    )
    assert "fitted on the calibration: refit." in both
    assert "was then trained towards the original's predictions, on the calibration." in both
    assert "fitted on the calibration" not in only
    assert "the calibration and text that the original drew" in only
    assert "predictions, on the calibration." in once


@pytest.mark.parametrize(("family", "recompute"), [("llama", False), *((name, True) for name in FAMILY_NAMES)])
def test_gradients_are_those_of_the_mean_divergence(
    family: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch through the whole model at once, blocks of all sorts; the model's own weights keep out of it."""
    monkeypatch.setattr(training, "SAVED_BYTES", 0 if recompute else 2**30)
    monkeypatch.setattr("secateur.engine.loss.LOGIT_BYTES", 4 * 64 * 5)  # several chunks of logits
    dense, model = standing(family), standing(family, "lopsided")
    tokens = weighted(tiny_tokens(dense, 3, 12))
    windows = torch.tensor([2, 0])
    course = training._Course(model, tokens, Run(), 1.0, 1e-3)
    weights = course._masters()
    leaves = [weight for block in weights.values() for weight in block.values()]
    metric = KLDivergence(final_states(dense, tokens))
    loss, gradients = course._gradients(weights, leaves, windows, BlockInputs(model), metric)

    twin = edited(model)
    logs = [torch.log_softmax(m.hf(input_ids=tokens.ids[windows], use_cache=False).logits[:, :-1].double(), -1)
            for m in (dense, twin)]  # fmt: skip
    divergence = torch.nn.functional.kl_div(logs[1], logs[0].detach(), log_target=True, reduction="none").sum(-1)
    counts = tokens.weights[windows, 1:]
    wanted = (divergence * counts).sum() / counts.sum()
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    places = [(number, path) for number, block in weights.items() for path in block]
    for (number, path), gradient in zip(places, gradients, strict=True):
        with twin.open(number) as block:
            torch.testing.assert_close(gradient, block.module.get_parameter(path).grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in model.hf.parameters())


def test_a_replay_takes_no_forward_and_closed_blocks_have_no_weights() -> None:
    by = refining_by(passes=1.5, text="calibration")
    first, recorded = pruned(tiny("llama"), by)
    again, replay = pruned(tiny("llama"), by, run=Run(store=recorded.store))
    assert replay.meter.block_tokens == replay.meter.head_tokens == 0
    closed = tiny_closed("llama")
    pruned(closed, by)
    assert first.model.fingerprint() == again.model.fingerprint() == closed.whole().fingerprint()
    assert first.record.notes == again.record.notes


def test_a_killed_training_goes_on_from_what_it_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits and the same count of work, without any of its 20 steps done twice."""
    by = refining_by(passes=20, text="calibration")
    whole, counted = pruned(tiny("llama"), by)
    monkeypatch.setattr(training, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(training, "KEEP_SHARE", float("inf"))  # after every step
    original, calls = training._Course._gradients, []

    def gradients(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(training._Course, "_gradients", gradients)
    with pytest.raises(KeyboardInterrupt):
        pruned(tiny("llama"), by, run=SharingRun(0, Journaled(Journal(tmp_path))))
    resumed, run = pruned(tiny("llama"), by, run=SharingRun(0, Journaled(Journal(tmp_path))))
    assert len(calls) == 7 + 1 + 13
    assert resumed.model.fingerprint() == whole.model.fingerprint()
    assert resumed.record.notes == whole.record.notes
    assert run.meter == counted.meter
    assert taken_bytes(tmp_path) <= job(tiny("llama"), by).plan.run_bytes(tiny("llama"))


@pytest.mark.parametrize(
    ("recompute", "text"),
    [
        (True, "drawn"),
        (False, "calibration"),
        pytest.param(True, "calibration", marks=pytest.mark.slow),
        pytest.param(False, "drawn", marks=pytest.mark.slow),
    ],
)
def test_it_costs_what_was_rehearsed(recompute: bool, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward of all windows of the dense model; then per pass a forward and a backward, which counts as two. A token
    that is drawn takes a forward, too."""
    monkeypatch.setattr(training, "SAVED_BYTES", 0 if recompute else 2**30)
    monkeypatch.setattr(drawn_text, "PROMPT", 4)
    by = refining_by(passes=2, text=text)
    foretold, (_, plain), (_, run) = job(tiny("llama"), by).plan, pruned(tiny("llama")), pruned(tiny("llama"), by)
    window = 4 * 16 * 4
    more = 2 * (text == "drawn")
    assert run.meter.block_tokens - plain.meter.block_tokens == window * (1 + more + 2 * (3 + recompute))
    assert foretold.meter.forwards(4, 16, head=1.0) == pytest.approx(run.meter.forwards(4, 16, head=1.0), rel=0.02)
    assert foretold.held_bytes > 16 * foretold.after.block_parameters


@pytest.mark.slow
def test_small_steps_add_up_in_a_model_of_16_bits() -> None:
    """Each is below what bfloat16 resolves of a weight of 0.1; together they are not."""
    coarse = [Model(tiny_hf("llama").to(torch.bfloat16)) for _ in range(2)]
    filters = (), (refining_by(passes=20, rate=7e-4, text="calibration"),)
    pairs = [pruned(model, *by, method="slimgpt")[0] for model, by in zip(coarse, filters, strict=True)]
    weights = [each.model.hf.model.layers[0].self_attn.q_proj.weight for each in pairs]
    assert weights[1].dtype == torch.bfloat16
    assert (weights[0] != weights[1]).float().mean() > 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_what_is_drawn_is_the_models_own_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins as the calibration does, comes again with its seed, differs by round, never ends, and follows the
    model's own probabilities: a head that allows two tokens writes nothing else."""
    monkeypatch.setattr(drawn_text, "PROMPT", 3)
    monkeypatch.setattr(drawn_text, "PIECE", 5)  # pieces of 5, 5 and 2
    model = tiny(family)
    tokens = tiny_tokens(model, 4, 12)
    model.hf.generation_config.eos_token_id = 7
    allowed = torch.full((model.vocab_size,), -1e4)
    allowed[[7, 9, 11]] = 0.0
    model.hf.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * 0 + allowed)
    settings, state = model.hf.generation_config, torch.random.get_rng_state()
    run = Run(observer=(watcher := Watcher()))
    once, again = drawn_text.with_drawn(model, tokens, run, 2), drawn_text.with_drawn(model, tokens, Run(), 2)
    assert [done for _, _, done in watcher.shown] == [total for _, total, _ in watcher.shown] == [4 * 12] * 2
    assert run.meter.head_tokens == 2 * 4 * 12
    assert torch.equal(once.ids[:4], tokens.ids)
    for begin, end in ((0, 3), (5, 8), (10, 12)):
        assert torch.equal(once.ids[4:8, begin:end], tokens.ids[:, begin:end])
    assert set(once.ids[4:, [3, 4, 8, 9]].flatten().tolist()) == {9, 11}
    assert not torch.equal(once.ids[4:8], once.ids[8:])
    assert once.fingerprint() == again.fingerprint()
    assert model.hf.generation_config is settings
    assert torch.equal(torch.random.get_rng_state(), state)
    tokens.ids[:, 0] = model.hf.config.bos_token_id = 1
    assert (drawn_text.with_drawn(model, tokens, Run(), 1).ids[4:, [0, 5, 10]] == 1).all()
    with pytest.raises(InvalidOptionError, match="3 tokens"):
        drawn_text.with_drawn(model, tokens.first(2, 3), Run(), 1)


def test_float16_has_no_room_for_slopes() -> None:
    with pytest.raises(InvalidOptionError, match="bfloat16"):
        job(Model(tiny_hf("llama").half()), refining_by(text="calibration"))


@pytest.mark.parametrize("options", [{"passes": 0.0}, {"rate": float("nan")}])
def test_what_cannot_be_is_refused_before_any_work(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOptionError, match="above 0"):
        job(tiny("llama"), refining_by(**options))


def test_a_method_that_changes_the_head_is_refused_before_any_work() -> None:
    with pytest.raises(InvalidOptionError, match="final norm and head"):
        job(tiny("llama"), refining_by(text="calibration"), method="slicegpt")


def test_flags_name_the_filter_with_all_its_options() -> None:
    """They decide a result, so the identity has them, given or not; one without the filter is no slip of ours."""
    assert CompensationOptions().filters() == []
    (asked,) = CompensationOptions(refine=True, refine_passes=2.5).filters()
    assert asked.name == "refine"
    assert asked.options == {"passes": 2.5, "rate": get_filter("refine").options["rate"], "text": "drawn"}
    with pytest.raises(InvalidOptionError, match="--refine"):
        CompensationOptions(refine_rate=0.01).filters()
    with pytest.raises(InvalidOptionError, match="a number"):
        get_filter("refine", passes="many")
    with pytest.raises(UnknownNameError, match="passes"):
        get_filter("refine", pases=2)
