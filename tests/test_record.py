"""The record and the card: what a checkpoint says of itself is true, and enough to make it again."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import parameters, random, tiny, tiny_in, tiny_tokens
from msgspec import structs
from msgspec.structs import replace
from oracles import job_of

import secateur
from secateur import Budget, Model, Tokens, load, prune, save
from secateur.account import account
from secateur.assets.demo import DEMO_TEXT
from secateur.card import card
from secateur.driver import Filter, Pruning
from secateur.errors import CheckpointError
from secateur.export import tier
from secateur.methods import get_method
from secateur.planning import Request
from secateur.pruning import Job, make_record
from secateur.record import (
    RECORD,
    Cost,
    MeasuredPerplexity,
    Record,
    append_evaluation,
    dump,
    public_arguments,
    public_name,
    read_record,
)
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, DropBlock, Edit, KeepNeurons, from_json

METHOD = get_method("2ssp")


def tokens_for(model: Model, seed: int = 0) -> Tokens:
    return tiny_tokens(model, 3, 12, seed)


def some_job(model: Model, tokens: Tokens | None = None, **request: Any) -> Job:
    asked = {
        "method": "2ssp",
        "sparsity": 0.25,
        "calibration": tokens or tokens_for(model),
        "options": {"alpha": 1.5},
        "seed": 3,
    }
    return job_of(Request(**{**asked, **request}), model)


def recorded(
    model: Model, *edits: Edit, tokens: Tokens | None = None, notes: Any = None, arguments: Any = None
) -> Record:
    """The record of a run that made these edits."""
    job, before = some_job(model, tokens), model.layout()
    for edit in edits:
        apply(model, edit)
    options, budget, after = dict(job.plan.options), Budget(0.25), model.layout()
    sparsity = account(get_method("2ssp"), options, budget, edits, before, after)
    pruning = Pruning("2ssp", options, budget, list(edits), before, after, sparsity)
    cost = Cost(seconds=1.0, forwards=2, forwards_asked=3.5)
    return make_record(job, pruning, cost, notes or {}, arguments or {})


# --- the record ---


def test_the_card_of_a_method_that_is_not_installed_names_it() -> None:
    text = card(replace(recorded(tiny("llama"), DropAttention(1)), method="of-another-package"))
    assert "pruned by of-another-package" in text


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_record_is_enough_to_make_the_model_again(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    pruned = prune(model, "2ssp", sparsity=0.3, calibration=tokens_for(model), attentions=1)
    save(pruned, tmp_path / "pruned")
    record = read_record(tmp_path / "pruned")
    again = tiny(family)
    assert again.fingerprint() == record.model["fingerprint"]
    for entry in record.edits:
        apply(again, from_json(entry))
    assert again.fingerprint() == load(str(tmp_path / "pruned")).fingerprint()
    once_more = tiny(family)
    asked = record.sparsity
    repeated = prune(
        once_more, record.method, sparsity=asked.asked, of=asked.of, round_to=asked.round_to, seed=record.seed,
        calibration=tokens_for(model), **record.options,
    )  # fmt: skip
    assert repeated.record.fingerprint == record.fingerprint
    assert once_more.fingerprint() == again.fingerprint()


def test_a_record_counts_real_parameters() -> None:
    dense, model = tiny("phi3"), tiny("phi3")
    record = recorded(model, KeepNeurons(0, (1, 2)), DropAttention(1), DropBlock(2))
    for size, each in ((record.before, dense), (record.after, model)):
        assert size.parameters == parameters(each)
        assert size.block_parameters == sum(p.numel() for p in each.blocks.parameters())
        assert size.weight_bytes == sum(p.numel() * p.element_size() for p in each.hf.parameters())
        assert size.blocks == len(each.blocks)
    assert (record.before.attentions, record.after.attentions) == (4, 2)
    assert (record.before.neurons, record.after.neurons) == (4 * 52, 2 + 2 * 52)
    assert (record.after.mlps, record.after.kv_heads) == (3, 2 * 4)
    assert record.achieved.model == pytest.approx(1 - parameters(model) / parameters(dense))
    assert record.tier == tier(model) == "B"
    assert record.edits == [
        {"edit": "KeepNeurons", "block": 0, "index": [1, 2]},
        {"edit": "DropAttention", "block": 1},
        {"edit": "DropBlock", "block": 2},
    ]
    with_tensors = recorded(tiny("llama"), KeepNeurons(0, (1, 2), random(32, 2)))  # named but not stored
    assert with_tensors.edits[0]["out_weight"].keys() == {"sha256", "shape"}
    assert len(dump(with_tensors)) < 10_000


@pytest.mark.parametrize(
    "edits", [(), (DropBlock(1),), (KeepNeurons(0, tuple(range(40))), DropAttention(1), KeepNeurons(2, (0, 5)))]
)
def test_a_dumped_record_reads_back_the_same(edits: tuple[Edit, ...], tmp_path: Path) -> None:
    notes = {"reduced": 'Less "than" asked \\u00001\\u0000 ü.', "curve": [3.5, 1, 2.25]}
    model = tiny("llama")
    record = recorded(model, *edits, notes=notes)
    record.calibration["name"] = 'Zürich "quoted" \\u0000 \n'
    record.parents = [recorded(model).alone]
    text = dump(record)
    (tmp_path / RECORD).write_text(text)
    assert read_record(tmp_path) == record
    assert json.loads(text) == json.loads(json.dumps(record.to_json()))
    assert "Zürich" in text
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert '"curve": [3.5, 1, 2.25]' in lines
    assert all(json.dumps(edit) in lines for edit in record.edits)  # one line each


def test_whatever_decides_the_outcome_decides_the_identity() -> None:
    ids = torch.arange(5, 29).view(2, 12)
    weights = torch.ones(2, 12)
    weights[0, 3] = 0

    def of(model: Model | None = None, tokens: Tokens | None = None, **request: Any) -> str:
        return some_job(model or tiny("llama"), tokens or Tokens.of(ids), **request).fingerprint

    changes: list[dict[str, Any]] = [
        {"model": tiny("llama", seed=1)}, {"tokens": Tokens.of(ids + 1)}, {"tokens": Tokens.of(ids.view(4, 6))},
        {"tokens": Tokens.of(ids, weights)}, {"method": "shortgpt", "options": {}}, {"options": {"alpha": 1.6}},
        {"sparsity": 0.26}, {"of": "model"}, {"round_to": 8}, {"seed": 1},
        {"filters": [Filter("none", (), lambda model, tokens, run, edits: edits)]},
    ]  # fmt: skip
    identities = [of(), *(of(**change) for change in changes)]
    assert len(set(identities)) == len(identities)
    assert of() == of(tokens=Tokens.of(ids, source={"name": "elsewhere"}))  # what counts is what they are
    assert of(options={"alpha": 1.5, "norm": "l2"}) == of(options={"norm": "l2", "alpha": 1.5})


# --- what is private ---

PRIVATE = ["/home/someone/m", "./runs/client/m", "~/client/m", "work/client/m", "client/m.jsonl", "client/m.TXT"]


@pytest.mark.parametrize("path", [*PRIVATE, "client/there", "client/there/"])
def test_of_a_path_the_last_part_is_published(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    shown = Path(path).name
    assert public_name(path) == shown
    assert public_name(shown) == shown
    model = tiny("llama")
    tokens = Tokens.of(tokens_for(model).ids, source={"name": path, "path": path, "source": "file"})
    model.source = {"source": "local", "name": path, "asked": path, "path": path}
    command = ["prune", path, "--out", "client/out", f"--calibration={path}", "--data=client/texts", "--alpha", "0.5"]
    record = recorded(model, tokens=tokens, arguments={"command": command})
    assert record.model == {
        "source": "local", "name": shown, "asked": shown, "path": shown, "family": "llama",
        "fingerprint": model.fingerprint(),
    }  # fmt: skip
    assert record.calibration["path"] == record.calibration["name"] == shown
    assert record.arguments["command"] == [
        "prune", shown, "--out", "out", f"--calibration={shown}", "--data=texts", "--alpha", "0.5"
    ]  # fmt: skip
    (tmp_path / RECORD).write_text(dump(record))
    append_evaluation(tmp_path, {"model": {"name": path, "perplexity": [{"text": path}], "fidelity": [{"text": path}]}})
    for word in ("client", "someone", "runs", "work"):
        assert word not in (tmp_path / RECORD).read_text()


def test_each_text_of_a_command_keeps_its_public_name() -> None:
    command = [
        "compare",
        "org/m",
        "--texts",
        "/home/me/a.jsonl,wikitext2,here/b.txt",
        "--texts=../c.txt,c4",
        "--out",
        "x/y,z",
    ]
    shown = public_arguments({"command": command})["command"]
    assert shown == ["compare", "org/m", "--texts", "a.jsonl,wikitext2,b.txt", "--texts=c.txt,c4", "--out", "y,z"]


@pytest.mark.parametrize(
    "source",
    [{"source": "hub", "repository": "org/m-1.5B", "name": "org/m-1.5B", "revision": "v1"},
     {"source": "hub", "name": "c4", "repository": "allenai/c4", "path": "en/sub/part.json"}, DEMO_TEXT.provenance],
)  # fmt: skip
def test_what_is_public_is_named_in_full(source: dict[str, str]) -> None:
    model = tiny("llama")
    model.source = dict(source)
    assert source.items() <= recorded(model, DropBlock(0)).model.items()
    assert public_name("org/m-1.5B") == "org/m-1.5B"


# --- chains ---


@pytest.mark.slow
def test_records_chain_through_checkpoints(tmp_path: Path) -> None:
    model = tiny("llama")
    first = prune(model, "2ssp", sparsity=0.2, calibration=tokens_for(model))
    save(first, tmp_path / "first")
    middle = load(str(tmp_path / "first"))
    second = prune(middle, "2ssp", sparsity=0.4, calibration=tokens_for(model, seed=1), attentions=2)
    save(second, tmp_path / "second")
    third = prune(load(str(tmp_path / "second")), "2ssp", sparsity=0.1, calibration=tokens_for(model), stage1_only=True)
    save(third, tmp_path / "third")
    record = read_record(tmp_path / "third")
    assert [step.fingerprint for step in record.chain] == [each.record.fingerprint for each in (first, second, third)]
    assert not any(step.parents for step in record.parents)
    for earlier, later in itertools.pairwise(record.chain):
        assert earlier.after == later.before
    assert record.chain[1].model["fingerprint"] == load(str(tmp_path / "first")).fingerprint()
    again = tiny("llama")
    for step in record.chain:
        for entry in step.edits:
            apply(again, from_json(entry))
        again.edited()
    assert again.fingerprint() == load(str(tmp_path / "third")).fingerprint()
    assert "was pruned by 2ssp, 2ssp" in (tmp_path / "third" / "README.md").read_text()


# --- evaluations and damage ---


def test_an_evaluation_is_added_and_nothing_else_changes(tmp_path: Path) -> None:
    append_evaluation(tmp_path, {"perplexity": 12.5})  # without a record: the folder gets none
    assert os.listdir(tmp_path) == []
    assert read_record(tmp_path) is None
    entries = {**recorded(tiny("llama"), DropAttention(1)).to_json(), "of a later version": [1]}
    (tmp_path / RECORD).write_text(json.dumps(entries))
    append_evaluation(tmp_path, {"perplexity": 12.5})
    append_evaluation(tmp_path, {"perplexity": 13.5})
    written = json.loads((tmp_path / RECORD).read_text())
    assert written == {**entries, "evaluations": [{"perplexity": 12.5}, {"perplexity": 13.5}]}
    assert os.listdir(tmp_path) == [RECORD]


def places(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The way to each entry of a JSON object's objects, the first element standing for all of a list."""
    if isinstance(value, list):
        return places(value[0], (*at, 0)) if value else []
    if not isinstance(value, dict):
        return []
    return [way for name, one in value.items() for way in [(*at, name), *places(one, (*at, name))]]


def test_a_record_without_one_of_its_parts_is_damaged(tmp_path: Path) -> None:
    record = recorded(tiny("llama"), DropAttention(1))
    record.perplexity = [MeasuredPerplexity(text="demo", samples=1, length=8, before=2.0, after=3)]
    record.parents = [record.alone]
    entries = json.loads(dump(record))
    (tmp_path / RECORD).write_text(json.dumps(entries))
    assert read_record(tmp_path) == record
    may_lack = {"parents", "block_tokens", "head_tokens", "loads_in", "reason"}
    open_parts = {"model", "options", "calibration", "arguments", "environment", "notes", "edits"}
    within_open = {("model", "family"), ("edits", 0, "edit")}
    for way in places(entries):
        step = way[2:] if way[:2] == ("parents", 0) else way
        if way[-1] in may_lack or (step[0] in open_parts and len(step) > 1 and step not in within_open):
            continue
        broken = json.loads(json.dumps(entries))
        inside = broken
        for name in way[:-1]:
            inside = inside[name]
        del inside[way[-1]]
        (tmp_path / RECORD).write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=rf"secateur\.json is damaged.*`[\w.\[\]]*{way[-1]}`") as refusal:
            read_record(tmp_path)
        assert ("$.parents[0]" in str(refusal.value)) == (way[0] == "parents")


@pytest.mark.parametrize("text", ["{", "", "\x00\x01", "[]", "3"])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(text)
    for read in (read_record, lambda folder: append_evaluation(folder, {})):
        with pytest.raises(CheckpointError, match=r"secateur\.json"):
            read(tmp_path)
    assert (tmp_path / RECORD).read_text() == text


# --- the card ---


def front_matter(text: str) -> Any:
    return yaml.safe_load(text.split("---\n", 2)[1])


@pytest.mark.parametrize("edit", [DropBlock(1), DropAttention(1)])
def test_the_card_tells_how_to_load_it(edit: Edit) -> None:
    text = card(record := recorded(tiny("llama"), edit))
    assert ("trust_remote_code" in text) == ("import secateur" in text) == (record.tier == "B")
    assert front_matter(text)["tags"] == ["pruned", "structured-pruning", "secateur", "2ssp"]
    assert record.loads_in == {"A": "transformers 4.57 and 5", "B": "transformers 5.14 or newer"}[record.tier]
    assert f"{'or, without secateur,' if record.tier == 'B' else 'which loads'} in {record.loads_in}" in text
    for fact in (f"{record.before.parameters:,}", f"{record.after.parameters:,}", METHOD.bibtex, secateur.__version__):
        assert fact in text


def test_the_card_names_the_hub_model_but_no_private_path() -> None:
    model = tiny_in("dense", "llama")
    model.source |= {"name": "/home/someone/models/secret-1B", "base_model": "org/base"}
    text = card(recorded(model, DropBlock(0)))
    assert front_matter(text)["base_model"] == "org/base"
    assert "secret-1B, pruned by 2ssp" in text
    assert "/home/someone" not in text
    nameless = tiny("llama")
    nameless.source.clear()
    text = card(recorded(nameless, DropBlock(0)))
    assert "base_model" not in front_matter(text)
    assert "# a llama model, pruned by 2ssp" in text


def test_the_card_repeats_what_the_method_said_and_the_perplexities() -> None:
    plain = recorded(tiny("llama"), DropBlock(0))
    notes = {
        "reduced": "Less was searched than asked.", "best KL": [2.5, 1, 1 / 3], "long": list(range(100)),
        "table": {"a": 1}, "words": ["a"], "none": [],
    }  # fmt: skip
    measured = [MeasuredPerplexity(text="wikitext2", samples=4, length=12, before=10.04, after=12.5)]
    record = structs.replace(plain, notes=notes, perplexity=measured)
    assert record.remarks == ["Less was searched than asked."]
    new = set(card(record).splitlines()) - set(card(plain).splitlines())
    assert new == {
        "Less was searched than asked.", "Best KL: 2.5, 1, 0.3333.",
        "Long: 0, 1, 2, 3, 4, 5, ..., 94, 95, 96, 97, 98, 99.", "| perplexity, wikitext2, 4 x 12 | 10.04 | 12.50 |",
    }  # fmt: skip
