"""secateur as Python: what a record holds, that it can be replayed, and that a refusal changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import HIDDEN, VOCABULARY, parameters, tiny, tiny_tokenizer, tiny_tokens
from msgspec import to_builtins
from oracles import Watcher, edited, mean_kl, mean_nll, prepared, write_texts

import secateur
from secateur.engine.tokens import Tokens, read_tokens
from secateur.errors import (
    DataError,
    InfeasibleBudgetError,
    InvalidOptionError,
    OutputExistsError,
    SecateurError,
    UnknownNameError,
)
from secateur.judge.judging import Judging
from secateur.methods import registry
from secateur.model.handle import Model
from secateur.output import Output
from secateur.pruning import run_job
from secateur.run import Run
from secateur.surgery.edits import DropBlock, Edit


def model_with_tokenizer(family: str = "llama") -> Model:
    model = tiny(family)
    model.tokenizer = tiny_tokenizer()
    model.tokenizer.eos_token = "<|im_end|>"  # lm-eval needs one
    return model


def small(model: Model, **options: Any) -> secateur.Pruned:
    """Half of the blocks, on three windows of ids."""
    return secateur.prune(model, "2ssp", **{"sparsity": 0.5, "calibration": tiny_tokens(model, 3, 8), **options})


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    return write_texts(tmp_path)


def test_the_record_says_all_that_is_needed_to_repeat_the_run(texts: tuple[Path, Path]) -> None:
    model = model_with_tokenizer()
    before = model.fingerprint()
    sizes = parameters(model)
    pruned = secateur.prune(
        model, "2ssp", sparsity=0.5, calibration=str(texts[0]), samples=4, length=16, seed=3, norm="l1"
    )
    record = pruned.record
    json.dumps(record.to_json(), allow_nan=False)
    assert record.method == "2ssp"
    assert record.options == {
        "alpha": 1.5, "score": "activation", "norm": "l1", "attentions": None, "stage1_only": False, "screen": None,
        "criterion": "ppl", "search_samples": 1,
        "search_length": None, "order": "samples",
    }  # fmt: skip
    assert record.seed == 3
    asked = record.sparsity
    assert (asked.asked, asked.of, asked.round_to) == (0.5, "blocks", 1)
    assert asked.achieved.blocks == pytest.approx(0.5, abs=0.01)
    assert asked.achieved.model == pytest.approx(1 - parameters(model) / sizes)
    assert record.model["fingerprint"] == before != model.fingerprint()
    assert (record.model["name"], record.model["family"]) == ("tiny-llama", "llama")
    used = record.calibration
    assert (used["samples"], used["length"], used["seed"], used["count"]) == (4, 16, 3, "all")
    assert used["path"] == used["name"] == texts[0].name  # the record is published, and the rest is private
    assert str(texts[0].parent) not in json.dumps(record.to_json())
    assert len(used["fingerprint"]) == len(used["sha256"]) == len(record.fingerprint) == 64
    environment = record.environment
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert (environment["device"], environment["dtype"]) == ("cpu", "float32")
    assert {"python", "transformers", "safetensors", "attention"} <= set(environment)
    assert record.secateur == secateur.__version__
    assert (record.before.parameters, record.after.parameters) == (sizes, parameters(model))
    assert record.before.attentions - record.after.attentions == len(record.edits) - 4
    assert record.cost.block_tokens > 4 * 16 * 4
    head = VOCABULARY * HIDDEN * 4 / record.before.block_parameters  # a token there, against one in a block
    work = record.cost.block_tokens + head * record.cost.head_tokens
    assert record.cost.forwards == pytest.approx(work / (16 * (4 + head)), abs=0.01)
    assert record.parents == []


def test_the_same_call_gives_the_same_model_and_identity(texts: tuple[Path, Path]) -> None:
    chosen: dict[str, Any] = {"sparsity": 0.4, "calibration": str(texts[0]), "samples": 4, "length": 16}
    one, two = (secateur.prune(model_with_tokenizer(), "2ssp", **chosen) for _ in range(2))
    assert one.record.fingerprint == two.record.fingerprint
    assert one.record.edits == two.record.edits
    assert one.model.fingerprint() == two.model.fingerprint()
    fingerprints = {one.record.fingerprint}
    others = [
        {"samples": 5}, {"length": 15}, {"seed": 1}, {"norm": "l1"}, {"calibration": str(texts[1])},
        {"calibration": str(texts[1]), "count": "responses"},
    ]  # fmt: skip
    for changed in others:
        fingerprints.add(prepared(model_with_tokenizer(), **{**chosen, **changed}).fingerprint)
    assert len(fingerprints) == len(others) + 1
    # what is given as the default is no other job
    assert prepared(model_with_tokenizer(), **chosen, method="2ssp", alpha=1.5).fingerprint == one.record.fingerprint


def test_preparing_changes_nothing_and_foretells_the_identity() -> None:
    model = tiny("qwen3")
    before, tokens = model.fingerprint(), tiny_tokens(tiny("qwen3"), 3, 8)
    other, job = (prepared(model, sparsity=0.5, calibration=tokens, seed=seed) for seed in (0, 1))
    assert other.fingerprint != job.fingerprint  # even where the tokens are given
    assert model.fingerprint() == before
    pruned = run_job(job, arguments={"command": ["prune", "x"]})
    assert pruned.record.fingerprint == job.fingerprint
    assert pruned.record.arguments == {"command": ["prune", "x"]}
    assert pruned.model is model


def test_a_run_of_another_seed_than_the_record_would_name_is_refused() -> None:
    model = tiny("llama")
    before, tokens = model.fingerprint(), tiny_tokens(model, 3, 8)
    with pytest.raises(InvalidOptionError, match=r"Run\(5\)"):
        secateur.prune(model, sparsity=0.5, calibration=tokens, seed=5, run=Run())
    assert model.fingerprint() == before


@pytest.mark.parametrize("asked", [{"samples": 2}, {"length": 4}], ids=str)
def test_windows_of_ids_are_not_cut_without_a_word(asked: dict[str, int]) -> None:
    model = tiny("llama")
    with pytest.raises(InvalidOptionError, match="as they are"):
        secateur.prune(model, sparsity=0.5, calibration=tiny_tokens(model, 3, 8), **asked)
    prepared(model, sparsity=0.5, calibration=tiny_tokens(model, 3, 8), samples=3, length=8)


def test_texts_are_measured_before_and_after() -> None:
    model, dense = tiny("llama"), tiny("llama")
    held_out = {"some": tiny_tokens(model, 2, 7, seed=5), "more": tiny_tokens(model, 3, 6, seed=6)}
    run = Run()
    pruned = run_job(prepared(model, sparsity=0.5, calibration=tiny_tokens(model, 3, 8)), run=run, measure_on=held_out)
    measured = pruned.record.perplexity
    for each, tokens in zip(measured, held_out.values(), strict=True):
        assert each.before == pytest.approx(torch.tensor(mean_nll(dense, tokens)).exp().item(), rel=1e-5)
        assert each.after == each.perplexity
        assert each.after == pytest.approx(torch.tensor(mean_nll(model, tokens)).exp().item(), rel=1e-5)
    plain = small(tiny("llama"))
    assert pruned.record.cost.block_tokens == plain.record.cost.block_tokens  # the method's own work


def test_progress_of_the_whole_run_reaches_its_end() -> None:
    model, watcher = tiny("llama", num_hidden_layers=8), Watcher()
    run = Run(observer=watcher)
    job = prepared(model, sparsity=0.5, calibration=tiny_tokens(model, 3, 8), attentions=1)
    expected = job.plan.meter.work(model.head_cost)
    run_job(job, run=run)
    (walk, total, after_walk), (search, same, end) = watcher.shown
    assert (walk, search) == ("neuron scores (whole run)", "2ssp stage 2 1/1 (whole run)")
    assert total == same == expected
    assert after_walk == 3 * 8 * 8
    assert after_walk < end <= total


WRONG: list[tuple[dict[str, Any], type[SecateurError], str]] = [
    ({"method": "2spp"}, UnknownNameError, "'2ssp'"),
    ({"sparsity": 0.99}, InfeasibleBudgetError, "reaches"),
    ({"sparsity": 1.5}, InvalidOptionError, "between 0 and 1"),
    ({"alfa": 1}, UnknownNameError, "'alpha'"),
    ({"alpha": "high"}, InvalidOptionError, "number"),
    ({"samples": 0}, InvalidOptionError, "at least 1"),
    ({"length": 65}, InvalidOptionError, "64"),
    ({"samples": 4000}, DataError, "340 windows"),
    ({"search_samples": 5}, InvalidOptionError, "from 4"),
    ({"count": "responses"}, DataError, "plain text"),
    ({"count": "answers"}, InvalidOptionError, "all, responses"),
    ({"calibration": "nonsense"}, UnknownNameError, "'nonsense'"),
    ({"calibration": "missing.txt"}, DataError, "no file"),
    ({"calibration": Tokens.of(torch.full((2, 8), VOCABULARY))}, InvalidOptionError, "97"),
    ({"calibration": Tokens.of(torch.full((2, 65), 3))}, InvalidOptionError, "64"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(next(iter(w.items())))[:40] for w, *_ in WRONG])
def test_a_refusal_changes_nothing(
    wrong: dict[str, Any], error: type[SecateurError], message: str, texts: tuple[Path, Path]
) -> None:
    model = model_with_tokenizer()
    before = model.fingerprint()
    chosen: dict[str, Any] = {"sparsity": 0.5, "calibration": str(texts[0]), "samples": 4, "length": 16}
    with pytest.raises(error, match=message):
        secateur.prune(model, **{"method": "2ssp", **chosen, **wrong})
    assert model.fingerprint() == before
    assert model.edits_applied == 0


def test_texts_need_a_tokenizer(texts: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        secateur.prune(tiny("llama"), sparsity=0.5, calibration=str(texts[0]), samples=2, length=8)
    with pytest.raises(DataError, match="no tokenizer"):
        secateur.evaluate(tiny("llama"), Judging(texts=(str(texts[0]),), length=8))


def test_windows_are_the_papers_within_the_models_positions(texts: tuple[Path, Path]) -> None:
    job = prepared(model_with_tokenizer(), sparsity=0.5, calibration=str(texts[0]))
    assert (job.tokens.samples, job.tokens.length) == (32, 64)


# --- saved ---


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_is_saved_is_what_was_pruned(family: str, tmp_path: Path) -> None:
    model = model_with_tokenizer(family)
    pruned = small(model, attentions=1)
    assert secateur.save(pruned, tmp_path / "out") == "B"
    assert secateur.load(str(tmp_path / "out")).fingerprint() == model.fingerprint()
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert record == json.loads(json.dumps(pruned.record.to_json()))
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (f"{record['before']['parameters']:,}", f"{record['after']['parameters']:,}", "sandri2025ssp"):
        assert fact in card
    with pytest.raises(OutputExistsError):
        secateur.save(pruned, tmp_path / "out")
    secateur.save(pruned, tmp_path / "out", overwrite=True)


def test_a_finished_job_is_recognised(tmp_path: Path) -> None:
    tokens = tiny_tokens(tiny("llama"), 3, 8)
    job = prepared(tiny("llama"), sparsity=0.5, calibration=tokens)
    assert Output(tmp_path / "out").holds(job.fingerprint) is None
    pruned = run_job(job)
    secateur.save(pruned, tmp_path / "out")
    again = Output(tmp_path / "out").holds(prepared(tiny("llama"), sparsity=0.5, calibration=tokens).fingerprint)
    assert again is not None
    assert again.fingerprint == pruned.record.fingerprint
    with pytest.raises(OutputExistsError, match="holds another pruning"):
        Output(tmp_path / "out").holds(prepared(tiny("llama"), sparsity=0.4, calibration=tokens).fingerprint)
    (tmp_path / "other").mkdir()
    with pytest.raises(OutputExistsError, match="secateur did not write"):
        Output(tmp_path / "other").holds(job.fingerprint)


def test_pruning_again_chains_the_records(tmp_path: Path) -> None:
    first = small(model_with_tokenizer("qwen3"), attentions=1)
    secateur.save(first, tmp_path / "one")
    loaded = secateur.load(str(tmp_path / "one"))
    second = secateur.prune(loaded, "2ssp", sparsity=0.3, calibration=tiny_tokens(loaded, 3, 8), attentions=1)
    again = secateur.prune(first.model, "2ssp", sparsity=0.3, calibration=tiny_tokens(loaded, 3, 8), attentions=1)
    for each in (second, again):  # saved and loaded in between, or not
        assert [parent.fingerprint for parent in each.record.parents] == [first.record.fingerprint]
        assert each.record.before == first.record.after
        assert each.model.fingerprint() == second.model.fingerprint()


# --- evaluated ---


def test_two_models_are_judged_on_the_same_tokens(texts: tuple[Path, Path]) -> None:
    dense, model = model_with_tokenizer(), model_with_tokenizer()
    small(model)
    judging = Judging(texts=(str(texts[0]),), length=16, samples=5, prompts=("and then",))
    report = secateur.evaluate(model, judging, against=dense)
    for each, judged in ((report.model, model), (report.against, dense)):
        assert each.parameters == parameters(judged)
        assert each.weight_bytes == 4 * parameters(judged)
        tokens = read_tokens(judged, str(texts[0]), purpose="evaluation", length=16, samples=5)
        (measured,) = each.perplexity
        assert measured.nll == pytest.approx(mean_nll(judged, tokens), rel=1e-6)
        assert measured.text == str(texts[0])
        assert not measured.window_nll
        assert [sample.prompt for sample in each.generation.samples] == ["and then"]
    json.dumps(to_builtins(report), allow_nan=False)
    assert report.model.generation.figures.greedy_agreement is not None
    assert report.against.generation.figures.greedy_agreement is None
    bare = to_builtins(secateur.evaluate(model, Judging()))
    assert {name: set(judged) for name, judged in bare.items()} == {"model": {"name", "parameters", "weight_bytes"}}


def test_fidelity_counts_responses_of_chats_and_all_of_plain_text(texts: tuple[Path, Path]) -> None:
    dense, model = model_with_tokenizer(), model_with_tokenizer()
    small(model)
    report = secateur.evaluate(model, Judging(length=60, samples=3), against=dense, fidelity_on=list(map(str, texts)))
    assert not report.against.fidelity
    plain, chat = report.model.fidelity
    assert (plain.count, chat.count) == ("all", "responses")
    assert plain.predictions == 3 * 59 > chat.predictions > 0
    counts: tuple[Any, Any] = ("all", "responses")
    for name, count, result in zip(texts, counts, (plain, chat), strict=True):
        tokens = read_tokens(model, str(name), purpose="evaluation", length=60, samples=3, count=count)
        assert result.loss == pytest.approx(mean_nll(model, tokens), rel=1e-6)
        assert result.kl == pytest.approx(mean_kl(dense, model, tokens), rel=1e-4)
    json.dumps(to_builtins(report), allow_nan=False)


def test_a_gate_looks_at_the_judged_model_only(texts: tuple[Path, Path]) -> None:
    model, dense = model_with_tokenizer(), model_with_tokenizer()
    small(model)
    words: dict[str, Any] = {
        "judging": Judging(texts=(str(texts[0]),), length=16, samples=2), "against": dense,
        "fidelity_on": [str(texts[0])],
    }  # fmt: skip
    judged = secateur.evaluate(model, **words, fail_if=["kl>0", "top1>1", "ppl<1"])
    (failed,) = judged.failed
    assert failed.figure == f"kl:{texts[0].name}"
    assert failed.value == judged.model.fidelity[0].kl
    between = sorted(each.perplexity[0].perplexity for each in (judged.model, judged.against))
    middle = sum(between) / 2
    passes = secateur.evaluate(model, **words, fail_if=[f"ppl>{middle}"]).failed
    swapped = secateur.evaluate(dense, **{**words, "against": model}, fail_if=[f"ppl>{middle}"]).failed
    assert len(passes) + len(swapped) == 1


@pytest.mark.parametrize(
    ("judging", "words", "message"),
    [
        ({"inference": True, "new_tokens": 9000}, {}, "new tokens"),
        ({"prompts": ("",)}, {}, "prompt"),
        ({"prompts": ("a",)}, {"against": tiny("llama")}, "another tokenizer"),
        ({}, {"fidelity_on": ["./own.txt"]}, "--against"),
        ({"texts": ()}, {"fail_if": ["kl>0.1"]}, "no figure"),
        ({}, {"fail_if": ["kl>0.1"]}, "'kl'"),
        ({}, {"fail_if": ["ppl of 0.1"]}, "ppl of 0.1"),
        ({"texts": ("{text}", "./own.txt")}, {}, "own.txt"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    judging: dict[str, Any], words: dict[str, Any], message: str, texts: tuple[Path, Path]
) -> None:
    given = {"texts": ("{text}",), "length": 16, **judging}
    named = tuple(each.format(text=texts[0]) for each in given.pop("texts"))
    model = model_with_tokenizer()
    model.hf.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with pytest.raises(SecateurError, match=message):
        secateur.evaluate(model, Judging(texts=named, **given), **words)


def test_blocks_that_went_are_not_counted_by_the_next_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block is dropped twice, which in the model as first loaded are blocks 1 and 2."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def drop_second(model: Model, tokens: Tokens, budget: Any, run: Run) -> Iterator[Edit]:
        """Drop the second block."""
        yield DropBlock(1)

    registry.method(
        "second", paper="p", unit="blocks", samples=1, length=4, bibtex="@b", edits=(DropBlock,)
    )(drop_second)  # fmt: skip
    model = tiny("llama")
    for left in (3, 2):
        pruned = secateur.prune(model, "second", sparsity=0.2, calibration=tiny_tokens(model, 1, 4))
        assert model.numbers == list(range(left))
        assert pruned.record.edits == [{"edit": "DropBlock", "block": 1}]
    assert model.fingerprint() == edited(tiny("llama"), DropBlock(1), DropBlock(2)).fingerprint()
