"""Healing by LoRA or in full: what is learned from, that the adapters vanish into the weights, that a run can be
resumed."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BLOCKS, FAMILY_NAMES, logits, parameters, tiny, tiny_in, tiny_tokenizer
from oracles import Impatient, edited, mean_kl, mean_nll, write_model
from torch import Tensor, nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from secateur import Model, Run, Tokens, load, prune, recover, save
from secateur.assets import Instruction, Text, licence_of, read_text
from secateur.assets.corpus import chat_text, plain_text
from secateur.assets.texts import ALPACA_LICENCE
from secateur.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    InvalidOptionError,
    JournalError,
    MissingExtraError,
    NumericalError,
    UnsupportedModelError,
)
from secateur.export import tier
from secateur.heal import objectives
from secateur.heal.adapter import attach, detach, targets
from secateur.heal.data import IGNORED, Example, collate, make_examples
from secateur.heal.objectives import Distillation, Labels
from secateur.heal.recover import RecoveryJob, RecoveryRequest, prepare_recovery, run_recovery
from secateur.heal.settings import Settings
from secateur.heal.trainer import LikeLengths
from secateur.methods import methods
from secateur.record import read_record
from secateur.surgery.edits import DropAttention, KeepNeurons

pytestmark = pytest.mark.slow  # several seconds each for its imports and its processes

QUICK: dict[str, Any] = {"template": "chat", "max_length": 64, "global_batch": 4, "warmup_steps": 1, "lr": 5e-3}


def with_tokenizer(model: Model) -> Model:
    model.tokenizer = tiny_tokenizer()
    return model


def dense_tiny(family: str = "llama") -> Model:
    return with_tokenizer(tiny(family, num_hidden_layers=2))


def pruned_tiny(family: str = "llama") -> Model:
    """A small tier-B model: a narrow block, and one without attention."""
    model = edited(dense_tiny(family), KeepNeurons(0, (1, 3, 5, 8)), DropAttention(1))
    model.edited()
    return model


def batch_of(model: Model) -> dict[str, Tensor]:
    """Rows of different lengths, some of their tokens counted."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in (9, 11, 13):
        ids = torch.randint(5, model.vocab_size, (length,), generator=generator)
        counts = torch.rand(length, generator=generator) < 0.6
        counts[0], counts[-1] = False, True
        examples.append(Example(ids, torch.where(counts, ids, IGNORED)))
    return collate(examples)


def loud(adapted: Any) -> None:
    """Give the adapters values that change something; at first they do not."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                assert "lora_" in name


def trainable(model: Model) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.hf.named_parameters()}


def prepared(model: Model, data: Path, **settings: Any) -> RecoveryJob:
    return prepare_recovery(RecoveryRequest(data=str(data), settings=Settings(**settings)), model)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Each Trainer collects garbage, which takes half a second among all that the tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty instructions with answers that can be learned."""
    path = tmp_path_factory.mktemp("data") / "say.jsonl"
    rows = [
        {"instruction": f"say {letter}", "input": "", "output": letter * (3 + row % 3)}
        for row, letter in zip(range(40), itertools.cycle("abc"))  # one of them has no end
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- the adapters ---


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_linear_map_of_the_blocks_has_an_adapter(family: str) -> None:
    for model in (tiny(family), tiny_in("everything", family)):
        inside = {
            f"{model.family.blocks}.{name}"
            for name, module in model.blocks.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        assert set(targets(model)) == inside


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_merging_changes_nothing(family: str) -> None:
    """With adapters on, and with their product in the weights: the same logits. Taken off unmerged: the old model."""
    model = tiny_in("everything", family)
    before, ids = copy.deepcopy(model), torch.arange(5, 29).view(2, 12)
    flags = trainable(model)
    adapted = attach(model, Settings())
    torch.testing.assert_close(logits(model, ids), logits(before, ids))  # at first they are zero
    loud(adapted)
    model.hf.eval()
    with_adapters = logits(model, ids)
    assert not torch.allclose(with_adapters, logits(before, ids), atol=1e-2)
    merged = copy.deepcopy(before)
    detach(model, adapted, merge=False)
    assert model.fingerprint() == before.fingerprint()
    adapted = attach(merged, Settings())
    loud(adapted)
    detach(merged, adapted, merge=True)
    torch.testing.assert_close(logits(merged, ids), with_adapters, rtol=1e-4, atol=1e-4)
    for each in (model, merged):
        assert trainable(each) == flags
        assert each.layout() == before.layout()
        assert tier(each) == tier(before)
        assert [type(module) for module in each.hf.modules()] == [type(module) for module in before.hf.modules()]


def test_adapters_are_float32_and_nothing_else_is_trained() -> None:
    model = tiny("llama")
    model.hf.to(torch.bfloat16)
    trained = {name: p for name, p in attach(model, Settings(rank=3)).named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * BLOCKS
    assert all("lora_" in name and p.dtype == torch.float32 and 3 in p.shape for name, p in trained.items())
    with pytest.raises(UnsupportedModelError):
        targets(tiny_in("nothing left but norms", "llama"))


# --- what is minimised ---


def loss(objective: Any, batch: dict[str, Tensor]) -> float:
    return float(objective.total(batch).detach())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_loss_counts_the_labels_and_nothing_else(family: str) -> None:
    model = tiny_in("everything", family)
    batch = batch_of(model)
    weights = (batch["labels"] != IGNORED).float()
    expected = mean_nll(model, Tokens.of(batch["input_ids"], weights)) * float(weights.sum())
    assert loss(Labels(model), batch) == pytest.approx(expected, rel=1e-5)
    alone = [
        {"input_ids": ids[None, :length], "labels": labels[None, :length]}
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], (9, 11, 13), strict=True)
    ]
    assert sum(loss(Labels(model), each) for each in alone) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_distillation_is_the_divergence_from_the_teacher(family: str) -> None:
    teacher, model = dense_tiny(family), pruned_tiny(family)
    batch = batch_of(model)
    weights = (batch["labels"] != IGNORED).float()
    expected = mean_kl(teacher, model, Tokens.of(batch["input_ids"], weights)) * float(weights.sum())
    assert loss(Distillation(model, teacher), batch) == pytest.approx(expected, rel=1e-5)
    other = {**batch, "labels": torch.where(batch["labels"] == IGNORED, IGNORED, 7)}  # whatever the labels are
    assert loss(Distillation(model, teacher), other) == pytest.approx(expected, rel=1e-5)


def gradients(model: Model, objective: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.hf.zero_grad()
    objective.total(batch).backward()
    return {name: p.grad.clone() for name, p in model.hf.named_parameters() if p.grad is not None}


def test_nothing_is_learned_from_an_equal_teacher() -> None:
    teacher, model = with_tokenizer(tiny("llama")), with_tokenizer(tiny("llama"))
    attach(model, Settings())
    equal, labels = (gradients(model, o, batch_of(model)) for o in (Distillation(model, teacher), Labels(model)))
    assert len(equal) == 2 * 7 * BLOCKS
    assert max(float(each.abs().max()) for each in equal.values()) < 1e-5
    assert max(float(each.abs().max()) for each in labels.values()) > 1e-2


@pytest.mark.parametrize("distill", [False, True])
def test_chunks_of_logits_change_nothing(distill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, model = dense_tiny(), pruned_tiny()
    loud(attach(model, Settings(dropout=0.0)))
    objective = Distillation(model, teacher) if distill else Labels(model)
    batch = batch_of(model)
    whole, total = gradients(model, objective, batch), loss(objective, batch)
    monkeypatch.setattr(objectives, "LOGIT_BYTES", 4 * 4 * model.vocab_size * 5)  # five tokens
    rows = []
    plain = objectives.head_logits_with_grad
    monkeypatch.setattr(
        objectives, "head_logits_with_grad", lambda model, states: (rows.append(len(states)), plain(model, states))[1]
    )
    chunked = gradients(model, objective, batch)
    assert max(rows) == 5
    assert loss(objective, batch) == pytest.approx(total, rel=1e-6)
    assert whole.keys() == chunked.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-6)


def test_another_tokenizer_is_refused() -> None:
    model, renamed = pruned_tiny(), with_tokenizer(tiny("llama"))
    renamed.tokenizer.add_tokens(["new"])  # type: ignore[union-attr]
    for teacher in (with_tokenizer(tiny("llama", vocab_size=101)), tiny("llama"), renamed):
        with pytest.raises(InvalidOptionError, match="another tokenizer"):
            Distillation(model, teacher)
    with pytest.raises(InvalidOptionError, match="own teacher"):
        Distillation(model, model)


# --- the data ---

ROWS = (
    Instruction(instruction="add", input="1 2", output="3"),
    Instruction(instruction="say hi", input="", output="hi\n  you"),
    Instruction(instruction="be still", input="", output=""),
)


def instructions(*rows: Instruction) -> Text:
    rows = rows or ROWS
    return Text(name="x", text="", conversations=None, instructions=rows, provenance={})


def responses(examples: Any, tokenizer: Any) -> list[str]:
    rows = [*examples.train, *examples.held_out]
    return sorted(tokenizer.decode(row.ids[row.labels != IGNORED]) for row in rows)


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_only_the_response_is_counted(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    examples = make_examples(instructions(), tokenizer, Settings(template=template, max_length=400))
    assert responses(examples, tokenizer) == ["3<|im_end|>", "hi\n  you<|im_end|>"]
    assert (examples.facts.rows, examples.facts.dropped, examples.facts.cut) == (3, 1, 0)
    rows = (*examples.train, *examples.held_out)
    for row in rows:
        assert torch.equal(row.labels[row.labels != IGNORED], row.ids[row.labels != IGNORED])
    if template == "alpaca":
        filled = [tokenizer(row.prompt + row.output + "<|im_end|>")["input_ids"] for row in ROWS[:2]]
        assert sorted(row.ids.tolist() for row in rows) == sorted(filled)
        return
    with pytest.raises(DataError, match="no chat template"):
        make_examples(instructions(), tiny_tokenizer(chat=False), Settings(template="chat"))


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_prompts_are_taken_as_they_are(template: str) -> None:
    """And rows in memory as those of a file."""
    datasets = pytest.importorskip("datasets")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    rows = datasets.Dataset.from_list([{"prompt": "say a", "completion": "a"}, {"prompt": "say b", "completion": "b"}])
    examples = make_examples(read_text(rows, purpose="training"), tokenizer, Settings(template=template))
    assert responses(examples, tokenizer) == ["a<|im_end|>", "b<|im_end|>"]
    read = sorted(tokenizer.decode(row.ids) for row in (*examples.train, *examples.held_out))
    if template == "alpaca":
        assert read == ["say aa<|im_end|>", "say bb<|im_end|>"]
        assert examples.facts.form == "prompts and completions"
    assert examples.facts.text_sha256


def test_the_prompts_are_alpacas() -> None:
    begins = "Below is an instruction that describes a task"
    asks = "rite a response that appropriately completes the request.\n\n### Instruction:\n"
    assert ROWS[0].prompt == (
        f"{begins}, paired with an input that provides further context. W{asks}add\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )
    assert ROWS[1].prompt == f"{begins}. W{asks}say hi\n\n### Response:\n"


def test_conversations_count_what_the_assistant_says_and_plain_text_all() -> None:
    tokenizer = tiny_tokenizer()
    talk = [{"role": role, "content": f"{role[0]}{turn}"} for turn in "12" for role in ("user", "assistant")]
    examples = make_examples(chat_text("talk", [talk] * 3, {}), tokenizer, Settings())
    assert responses(examples, tokenizer) == ["a1<|im_end|>a2<|im_end|>"] * 3
    windows = make_examples(plain_text("t", "abcd" * 16, {}, where="t"), tokenizer, Settings(max_length=8))
    rows = [*windows.train, *windows.held_out]
    assert len(rows) == 8
    assert all(row.labels.tolist() == [IGNORED, *row.ids[1:].tolist()] for row in rows)


def test_rows_are_cut_or_dropped_and_counted() -> None:
    rows = [Instruction(instruction="q", input="", output="a" * size) for size in (1, 10, 100)]
    rows.append(Instruction(instruction="q" * 90, input="", output="a"))
    examples = make_examples(instructions(*rows), tiny_tokenizer(), Settings(template="chat", max_length=50))
    kept = [*examples.train, *examples.held_out]
    assert max(len(row.ids) for row in kept) == 50
    assert (examples.facts.rows, examples.facts.dropped, examples.facts.cut) == (4, 1, 2)
    assert examples.facts.train_tokens == sum(len(row.ids) for row in examples.train)
    with pytest.raises(DataError, match="no row has a counted token within 9 tokens"):
        make_examples(instructions(*rows), tiny_tokenizer(), Settings(template="chat", max_length=9))


def test_rows_held_out_are_never_trained_on() -> None:
    rows = [Instruction(instruction=f"{n}", input="", output=f"{n}") for n in range(100)]

    def split(**settings: Any) -> tuple[set[str], set[str]]:
        examples = make_examples(instructions(*rows), tokenizer, Settings(template="chat", **settings))
        return tuple({tokenizer.decode(row.ids) for row in part} for part in (examples.train, examples.held_out))  # type: ignore[return-value]

    tokenizer = tiny_tokenizer()
    train, held_out = split()
    assert (len(train), len(held_out), train & held_out) == (92, 8, set())
    assert split() == (train, held_out)
    assert split(seed=1)[1] != held_out
    assert len(split(held_out=25)[1]) == 25
    assert Settings().held_out_of(52_002) == 2000
    with pytest.raises(InvalidOptionError, match="leave none to train on"):
        split(held_out=100)


def test_a_tokenizers_own_beginning_is_kept() -> None:
    tokenizer = tiny_tokenizer()
    plain = make_examples(instructions(*ROWS[:2]), tokenizer, Settings(max_length=400))

    class Beginning(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, **kwargs: Any) -> Any:
            encoded = super().__call__(text, **kwargs)
            if kwargs.get("add_special_tokens", True):
                encoded["input_ids"] = [self.bos_token_id, *encoded["input_ids"]]
            return encoded

    tokenizer.bos_token, tokenizer.__class__ = "<|im_start|>", Beginning
    begun = make_examples(instructions(*ROWS[:2]), tokenizer, Settings(max_length=400))
    for before, after in zip((*plain.train, *plain.held_out), (*begun.train, *begun.held_out), strict=True):
        assert after.ids.tolist() == [tokenizer.bos_token_id, *before.ids.tolist()]
        assert after.labels.tolist() == [IGNORED, *before.labels.tolist()]


GOOD = '{"instruction": "a", "input": "", "output": "b"}\n'
BAD_FILES = {  # and the place that is named
    "empty": ("", "is empty"),
    "not UTF-8": (b'{"instruction": "\xff"}', "line 1: byte 0xff"),
    "not JSON": (GOOD + "{\n", "line 2: "),
    "a row without output": (GOOD + '{"instruction": "a"}\n', "line 2.*output"),
    "a row that is no object": (GOOD + "7\n", "line 2.*object"),
    "a number": (GOOD + '{"instruction": "a", "output": 3}\n', "line 2.*output"),
    "a number as input": (GOOD + '{"instruction": "a", "input": 3, "output": "b"}\n', "line 2.*input"),
    "other fields": ('{"question": "a", "answer": "b"}\n', "text.*messages"),
    "a broken list": ("[" + GOOD, "list"),
    "one row": (GOOD, "one row"),
    "no outputs": ('{"instruction": "a", "output": ""}\n' * 3, "no row has a counted token"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        prepared(with_tokenizer(tiny("llama")), path, **QUICK)


def test_a_list_is_read_as_its_lines(tmp_path: Path) -> None:
    rows = [json.loads(GOOD), {"instruction": "c", "output": "d"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    lines, whole = (read_text(tmp_path / name, purpose="training") for name in ("a.jsonl", "a.json"))
    assert lines.instructions == whole.instructions != ()


def test_licences_are_known_or_said_to_be_unknown(tmp_path: Path, shared: Path) -> None:
    sample = (shared / "data/alpaca/alpaca_sample.jsonl").read_bytes()
    for name, content, licence, known_by in (
        ("stanford_alpaca.jsonl", GOOD.encode(), ALPACA_LICENCE, "the file's name"),
        ("mine.jsonl", sample, ALPACA_LICENCE, "the file's sha256"),
        ("other.jsonl", GOOD.encode(), None, "nothing"),
        ("alpaca_chat.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', None, "nothing"),
    ):
        (tmp_path / name).write_bytes(content)
        assert licence_of(read_text(tmp_path / name, purpose="training")) == (licence, known_by)


# --- settings ---


@pytest.mark.parametrize(
    "bad",
    [{"epochs": 0}, {"epochs": float("nan")}, {"lr": -1.0}, {"max_steps": 0}, {"global_batch": 0}, {"rank": 1.5},
     {"batch_size": 3, "global_batch": 64}, {"max_length": 1}, {"dropout": 1.0}, {"warmup_steps": -1},
     {"held_out": 0}, {"eval_every": 0}, {"seed": -1}, {"template": "llama"}, {"alpha": float("inf")}],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError, match=next(iter(bad))):
        Settings(**bad)


def test_a_step_is_a_whole_number_of_forwards() -> None:
    assert [Settings(global_batch=size).rows_at_once for size in (1, 6, 7, 13, 64)] == [1, 6, 7, 1, 8]
    assert Settings(global_batch=64).most_steps(2700) == 43
    assert Settings(global_batch=64, epochs=0.5).most_steps(2700) == 22
    assert Settings(max_steps=5).most_steps(2700) == 5


def test_each_epoch_takes_every_row_once_and_like_lengths_together() -> None:
    rows = [Example(torch.zeros(length), torch.zeros(length)) for length in torch.randperm(37).add(1).tolist()]
    sampler = LikeLengths(rows, 8, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second
    lengths = [len(rows[row].ids) for row in first]
    assert all(lengths[at : at + 8] == sorted(lengths[at : at + 8], reverse=True) for at in range(0, 37, 8))
    sampler.set_epoch(0)
    assert list(sampler) == first


# --- recover ---


def generators() -> tuple[Any, ...]:
    """The states of those that the process shares."""
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]


@pytest.mark.parametrize("train", ["lora", "all"])
def test_the_held_out_loss_falls_and_nothing_else_changes(train: str, data: Path) -> None:
    model = pruned_tiny()
    before, layout, count = model.fingerprint(), model.layout(), parameters(model)
    flags = trainable(model)
    set_seed(11)
    shared = generators()
    use_cache = model.hf.config.use_cache
    result = recover(model, data, train=train, epochs=2, eval_every=5, **QUICK)
    losses = result.record.recovery.held_out_loss
    assert losses.after < 0.8 * losses.before
    assert [step for step, _ in losses.curve] == [0, 5, 10, 15, 20]
    assert losses.curve[0][1] == pytest.approx(losses.before, abs=1e-5)
    assert result.model is model
    assert model.fingerprint() != before
    assert (model.layout(), parameters(model), tier(model)) == (layout, count, "B")
    assert trainable(model) == flags
    assert not model.hf.training
    assert model.hf.config.use_cache == use_cache
    assert generators() == shared


def test_the_held_out_loss_is_the_saved_models(data: Path, tmp_path: Path) -> None:
    """What the record says, measured again by hand on the checkpoint."""
    job = prepared(pruned_tiny(), data, **QUICK, max_steps=2)
    result = run_recovery(job)
    assert save(result, tmp_path / "out") == "B"
    loaded = load(str(tmp_path / "out"))
    weights = [(row.labels != IGNORED).float() for row in job.examples.held_out]
    total = sum(
        mean_nll(loaded, Tokens.of(row.ids[None], counted[None])) * float(counted.sum())
        for row, counted in zip(job.examples.held_out, weights, strict=True)
    )
    count = sum(float(counted.sum()) for counted in weights)
    assert result.record.recovery.held_out_loss.after == pytest.approx(total / count, rel=1e-5)


def test_distillation_brings_the_model_nearer_to_the_dense_one(data: Path) -> None:
    dense, model = dense_tiny(), pruned_tiny()
    fingerprint = dense.fingerprint()
    result = recover(model, data, distill=dense, max_steps=8, **QUICK)
    told = result.record.recovery
    assert told.held_out_loss.after < 0.9 * told.held_out_loss.before
    assert (told.objective, told.teacher["fingerprint"]) == ("distillation", fingerprint)
    assert dense.fingerprint() == fingerprint


@pytest.mark.parametrize(("family", "dtype"), [("phi3", "float32"), ("gpt2", "float32"), ("llama", "bfloat16")])
def test_other_families_and_dtypes_heal_too(family: str, dtype: str, data: Path) -> None:
    model = pruned_tiny(family)
    model.hf.to(getattr(torch, dtype))
    losses = recover(model, data, max_steps=6, **QUICK).record.recovery.held_out_loss
    assert losses.after < losses.before
    assert model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", "float32"), ("llama", "bfloat16")])
def test_all_weights_are_trained_in_float32(family: str, dtype: str, data: Path) -> None:
    """Rounded once, at the end; after an error they are what they were."""
    model = pruned_tiny(family)
    model.hf.to(getattr(torch, dtype))
    before = copy.deepcopy(model)
    with pytest.raises(Interrupted):
        recover(model, data, train="all", max_steps=6, run=Run(observer=Impatient(0.6)), **QUICK)
    assert model.fingerprint() == before.fingerprint()
    told = recover(model, data, train="all", max_steps=6, **QUICK).record.recovery
    assert told.held_out_loss.after < told.held_out_loss.before
    assert told.trained_parameters == parameters(model)
    assert told.adapted_maps == 0
    assert model.dtype == getattr(torch, dtype)
    states = [each.hf.state_dict() for each in (before, model)]
    assert all(not torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_activations_computed_again_change_nothing() -> None:
    model = tiny_in("everything", "llama")
    model.hf.train()
    batch = batch_of(model)
    whole = gradients(model, Labels(model), batch)
    with objectives.recomputing(model):
        again = gradients(model, Labels(model), batch)
    assert whole.keys() == again.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(again[name], gradient)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_a_budget_of_tokens_on_plain_text(tmp_path: Path) -> None:
    """Whole steps within it, over as many epochs as that takes; the curves say how many tokens were seen."""
    (tmp_path / "a.txt").write_text("abcd efgh " * 40)  # 400 tokens
    settings: dict[str, Any] = {"max_length": 16, "global_batch": 4, "held_out": 3, "eval_every": 4, "warmup_steps": 1}
    told = recover(pruned_tiny(), tmp_path / "a.txt", max_tokens=700, **settings).record.recovery
    assert (told.data.form, told.data.train) == ("plain text, windows", 22)
    steps = [0, *range(64, 321, 64), 352, *range(416, 673, 64)]  # an epoch is five steps and a half
    assert told.tokens_seen == list(enumerate(steps))
    assert told.steps == len(steps) - 1
    assert [step for step, _ in told.held_out_loss.curve] == [0, 4, 8, 11]
    again = recover(pruned_tiny(), tmp_path / "a.txt", max_tokens=700, max_steps=3, **settings).record.recovery
    assert again.steps == 3


def test_the_teacher_is_the_dense_model_that_the_record_names(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "dense", num_hidden_layers=2)
    pruned = prune(load("dense", dtype="bfloat16"), sparsity=0.3, calibration=torch.arange(5, 77).view(3, 24))
    save(pruned, "pruned")
    told = recover("pruned", data, distill=True, max_steps=1, **QUICK).record.recovery
    assert told.objective == "distillation"
    assert (
        told.teacher["fingerprint"]
        == pruned.record.model["fingerprint"]
        == load("dense", dtype="bfloat16").fingerprint()
    )
    shutil.rmtree("dense")
    write_model(tmp_path / "dense", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="other weights"):
        recover("pruned", data, distill=True, **QUICK)
    with pytest.raises(InvalidOptionError, match="no record"):
        recover(dense_tiny(), data, distill=True, **QUICK)


@pytest.mark.parametrize("method", sorted(methods()))
def test_checkpoints_of_every_method_heal(method: str, data: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tiny("llama", mlp_bias=False, attention_bias=False))
    tokens = Tokens.of(torch.arange(5, 85).view(2, 40))
    little = {"initial_tokens": 40, "selection_tokens": "40,40", "generations": 2, "initial": 4, "offspring": 4}
    options: dict[str, Any] = {"evopress": little, "slicegpt": {"sparsity": 0.38}}.get(method, {})
    save(prune(model, method, calibration=tokens, **{"sparsity": 0.3, **options}), tmp_path / "pruned")
    loaded = load(str(tmp_path / "pruned"))
    layout = loaded.layout()
    healed = recover(loaded, data, max_steps=4, **QUICK)
    assert save(healed, tmp_path / "healed") == healed.record.parents[0].tier
    again = load(str(tmp_path / "healed"))
    assert again.layout() == layout
    losses = healed.record.recovery.held_out_loss
    assert losses.after < losses.before
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(logits(again, ids), logits(loaded, ids))


@pytest.mark.parametrize("distill", [False, True])
def test_autocast_trains_alike_and_measures_as_before(distill: bool, data: Path) -> None:
    teacher = dense_tiny() if distill else None
    plain, rounded = (
        recover(pruned_tiny(), data, max_steps=6, autocast=autocast, distill=teacher, **QUICK)
        for autocast in (False, True)
    )
    assert rounded.model.dtype == torch.float32
    one, other = plain.record.recovery, rounded.record.recovery
    assert one.held_out_loss.before == other.held_out_loss.before > 1.01 * other.held_out_loss.after
    assert other.held_out_loss.after == pytest.approx(one.held_out_loss.after, rel=0.02)
    assert one.training_loss != other.training_loss


def test_the_forward_s_batch_size_does_not_matter(data: Path) -> None:
    """A step is the mean over all counted tokens of its rows, however they are parted."""
    settings = {**QUICK, "dropout": 0.0, "max_steps": 2}
    models = [recover(pruned_tiny(), data, batch_size=size, **settings).model for size in (1, 4)]
    for one, other in zip(*(model.hf.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# --- interrupted ---


@pytest.mark.parametrize("train", ["lora", "all"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(train: str, data: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "train": train, "global_batch": 8, "batch_size": 4, "epochs": 2.0}  # ten steps
    whole = pruned_tiny()
    steady = recover(whole, data, **settings)
    model, folder = pruned_tiny(), tmp_path / "out.run"
    before = model.fingerprint()
    for share in (0.35, 0.8):  # in the first epoch, and in the second
        with pytest.raises(Interrupted, match=r"step \d+ of 10 is kept in .*out\.run. The same command goes on"):
            recover(model, data, checkpoints=folder, run=Run(observer=Impatient(share)), **settings)
        assert model.fingerprint() == before
        (kept,) = folder.glob("checkpoint-*")
        assert {path.name for path in kept.iterdir()} == {
            "training.safetensors", "trainer_state.json", "SHA256SUMS",
        }  # fmt: skip
    step = int(kept.name.removeprefix("checkpoint-"))
    assert 5 < step < 10
    result = recover(model, data, checkpoints=folder, **settings)
    assert model.fingerprint() == whole.fingerprint()
    told, steady_told = result.record.recovery, steady.record.recovery
    assert (told.resumed_at, steady_told.resumed_at) == (step, None)
    assert told.held_out_loss == steady_told.held_out_loss
    assert [step for step, _ in told.training_loss] == list(range(1, 11))
    assert told.training_loss == steady_told.training_loss
    assert result.record.fingerprint == steady.record.fingerprint
    again = pruned_tiny()  # all is trained, and was not written
    assert recover(again, data, checkpoints=folder, **settings).record.recovery.resumed_at == 10
    assert again.fingerprint() == whole.fingerprint()


def test_only_its_own_checkpoints_are_gone_on_from(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.run"
    settings = {**QUICK, "max_steps": 2}
    recover(pruned_tiny(), data, checkpoints=folder, **settings)
    other = {**settings, "lr": 1e-3}
    with pytest.raises(JournalError, match="another job"):
        recover(pruned_tiny(), data, checkpoints=folder, **other)
    job = prepared(pruned_tiny(), data, **other)
    assert run_recovery(job, checkpoints=folder, overwrite=True).record.recovery.resumed_at is None
    (kept,) = folder.glob("checkpoint-*")
    tensors = kept / "training.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is damaged"):
        recover(pruned_tiny(), data, checkpoints=folder, **other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(JournalError, match="something else"):
        recover(pruned_tiny(), data, checkpoints=tmp_path / "mine", **settings)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_a_loss_that_blows_up_is_an_error_and_the_model_is_kept(data: Path) -> None:
    model = pruned_tiny()
    before = model.fingerprint()
    with pytest.raises(NumericalError):
        recover(model, data, max_steps=8, **{**QUICK, "lr": 1e30})
    assert model.fingerprint() == before


# --- refused before anything is trained ---


def test_what_cannot_be_healed_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned_tiny()
    with pytest.raises(InvalidOptionError, match="learning_rate"):
        recover(model, data, learning_rate=1)
    model.hf.resize_token_embeddings(20)
    with pytest.raises(DataError, match="tokenizer does not fit"):
        recover(model, data, **QUICK)
    model.tokenizer = None
    with pytest.raises(DataError, match="no tokenizer"):
        recover(model, data, **QUICK)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"peft.*secateur\[recover\]"):
        recover(model, data)


# --- record and card ---


def test_record_and_card_tell_of_the_recovery(data: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tiny("llama"))
    first = prune(model, "2ssp", sparsity=0.3, calibration=Tokens.of(torch.arange(5, 77).view(3, 24)), attentions=1)
    save(first, tmp_path / "pruned")
    assert "Nothing was trained afterwards" in (tmp_path / "pruned" / "README.md").read_text()
    middle = load(str(tmp_path / "pruned"))
    fingerprint = middle.fingerprint()
    healed = recover(middle, data, max_steps=2, licence="MIT", **QUICK)
    assert save(healed, tmp_path / "healed") == "B"
    record = read_record(tmp_path / "healed")
    assert record == healed.record
    assert [each.fingerprint for each in record.parents] == [first.record.fingerprint]
    assert record.model["fingerprint"] == fingerprint
    assert record.before == record.after == first.record.after
    told = record.recovery
    assert (told.data.licence, told.data.licence_known_by) == ("MIT", "given")
    assert (told.data.name, told.data.rows, told.data.train, told.data.held_out) == ("say.jsonl", 40, 37, 3)
    assert told.settings["lr"] == QUICK["lr"]
    text = (tmp_path / "healed" / "README.md").read_text()
    assert "Nothing was trained" not in text
    for fact in (
        "pruned by 2ssp", "37 rows of say.jsonl", "licence of the data: MIT", "trust_remote_code",
        f"{told.held_out_loss.after:.4f} after", first.record.model["name"].rpartition("/")[2],
    ):  # fmt: skip
        assert fact in text
    tokens = Tokens.of(torch.arange(5, 77).view(3, 24))
    third = prune(load(str(tmp_path / "healed")), "2ssp", sparsity=0.1, calibration=tokens, stage1_only=True)
    save(third, tmp_path / "third")
    text = (tmp_path / "third" / "README.md").read_text()
    assert "Nothing was trained afterwards" in text  # after the last pruning
    assert "licence of the data: MIT" in text  # which still binds
    assert "was pruned by 2ssp:" in text
    twice = recover(load(str(tmp_path / "healed")), data, max_steps=1, **QUICK)
    save(twice, tmp_path / "twice")
    text = (tmp_path / "twice" / "README.md").read_text()
    assert text.count("- licence of the data: ") == 2
    assert "not known to secateur" in text


def test_a_dense_model_can_be_healed_and_says_so(data: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tiny("llama"))
    assert save(recover(model, data, max_steps=1, **QUICK), tmp_path / "out") == "A"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was removed" in text
    assert "pruned" not in text.replace("tags", "")
    assert logits(load(str(tmp_path / "out")), torch.arange(5, 15)[None]).isfinite().all()
