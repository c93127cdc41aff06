"""Whatever people have as a model is taken, or refused with what would be right."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import parameters, tiny, tiny_config, tiny_hf, tiny_tokenizer, tiny_tokens
from oracles import write_model, write_texts
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import secateur
from secateur.errors import (
    CheckpointError,
    DataError,
    InfeasibleBudgetError,
    InvalidOptionError,
    OutputExistsError,
    SecateurError,
    UnknownNameError,
    UnsupportedModelError,
)
from secateur.heal.recover import RecoveryRequest, recover_to
from secateur.heal.settings import Settings
from secateur.hf import quiet_transformers
from secateur.judge.judging import Judging
from secateur.judge.tasks import run_tasks
from secateur.model.load import Source

WORDS: dict[str, Any] = {"sparsity": 0.4, "samples": 3, "length": 16, "attentions": 0}


def from_folder(folder: Path) -> Any:
    """As a user loads it."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder)


def standing(hf: Any) -> list[tuple[type, int]]:
    """The classes and configurations of a model and all in it."""
    return [(type(part), id(part.__dict__.get("config"))) for part in hf.modules()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "own")


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_texts(tmp_path)[0])


def test_every_kind_of_model_gives_the_same_pruning(folder: Path, text: str, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {
        "loaded": secateur.load(str(folder)), "name": str(folder), "path": folder, "source": Source(name=str(folder)),
        "transformers": from_folder(folder), "stock": tiny_hf("llama"), "adopted": secateur.Model(tiny_hf("llama")),
    }  # fmt: skip
    lacks_tokenizer = ("stock", "adopted")
    pruned = {
        kind: secateur.prune(
            model, "2ssp", tokenizer=tiny_tokenizer() if kind in lacks_tokenizer else None, calibration=text, **WORDS
        )
        for kind, model in kinds.items()
    }
    first = pruned["loaded"]
    jobs = {kind: each.record.fingerprint for kind, each in pruned.items()}
    assert len({jobs[kind] for kind in kinds if kind not in lacks_tokenizer}) == 1
    assert jobs["stock"] == jobs["adopted"] != jobs["loaded"]  # a tokenizer that is given is part of the result
    assert {each.model.fingerprint() for each in pruned.values()} == {first.model.fingerprint()}
    names = {kind: each.record.model.get("name") for kind, each in pruned.items()}
    assert names == {kind: None if kind in lacks_tokenizer else "own" for kind in kinds}
    for kind in ("transformers", "stock"):
        assert pruned[kind].model.hf is kinds[kind]  # in place: no copy of gigabytes
        assert kinds[kind].num_parameters() == parameters(first.model)
        tier = secateur.save(pruned[kind], tmp_path / kind)
        assert tier == first.record.tier
        again = secateur.load(str(tmp_path / kind))
        assert again.fingerprint() == first.model.fingerprint()
        assert again.tokenizer is not None
    by_hf, by_us = tmp_path / "by_hf", tmp_path / "transformers"
    kinds["transformers"].save_pretrained(by_hf)
    assert secateur.load(str(by_hf)).fingerprint() == secateur.load(str(by_us)).fingerprint()


def test_prune_to_takes_the_same(folder: Path, text: str, tmp_path: Path) -> None:
    request = secateur.Request(
        method="2ssp", calibration=text, samples=3, length=16, sparsity=0.4, options={"attentions": 0}
    )
    outcomes = [
        secateur.prune_to(request, source, out)
        for source, out in [
            (str(folder), tmp_path / "a"), (Source(name=str(folder)), secateur.Output(tmp_path / "b")),
            (from_folder(folder), str(tmp_path / "c")), (secateur.load(str(folder)), tmp_path / "d"),
        ]
    ]  # fmt: skip
    assert len({outcome.record.fingerprint for outcome in outcomes}) == 1
    assert len({secateur.load(str(tmp_path / name)).fingerprint() for name in "abcd"}) == 1
    assert secateur.prune_to(request, folder, tmp_path / "a").was_there
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(OutputExistsError, match=r"model\.safetensors"):
        secateur.prune_to(request, folder, tmp_path / "a")
    other = tiny_tokenizer()
    assert not secateur.prune_to(request, folder, tmp_path / "e", tokenizer=other).was_there
    assert secateur.prune_to(request, folder, tmp_path / "e", tokenizer=other).was_there
    other.chat_template = "{{ messages }}"
    with pytest.raises(OutputExistsError):
        secateur.prune_to(request, folder, tmp_path / "e", tokenizer=other)


def test_judging_takes_the_same_and_leaves_the_model_as_it_was(folder: Path, text: str, tmp_path: Path) -> None:
    hf, judging = from_folder(folder), Judging(texts=(text,), length=16, samples=2)
    before = standing(hf)
    expected = secateur.evaluate(secateur.load(str(folder)), judging).model.perplexity
    words: dict[str, Any] = {"against": hf, "fidelity_on": [text]}
    for kind in (str(folder), folder, hf):
        report = secateur.evaluate(kind, judging, **words)
        assert report.model.perplexity == report.against.perplexity == expected
        assert report.model.fidelity[0].kl == pytest.approx(0, abs=1e-7)
    assert standing(hf) == before
    with quiet_transformers():
        hf.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llama"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no tokenizer"):
        secateur.evaluate(tiny_hf("llama"), judging)
    named = secateur.evaluate(tiny_hf("llama"), judging, tokenizer=tiny_tokenizer()).model.perplexity
    assert named == expected
    model, own = secateur.Model(tiny_hf("llama")), tiny_tokenizer()
    model.tokenizer = own
    secateur.evaluate(model, judging, tokenizer=tiny_tokenizer())
    assert model.tokenizer is own


@pytest.mark.slow
def test_recovery_takes_the_same(folder: Path, text: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"epochs": 1, "max_length": 16, "rank": 2, "held_out": 1}
    rows = ["the old dog saw a small red bird"] * 6
    losses = []
    for model in (secateur.load(str(folder)), str(folder), from_folder(folder)):
        done = secateur.recover(model, rows, distill=str(folder), **words)
        losses.append(done.record.recovery.held_out_loss.after)
        assert done.record.recovery.teacher["name"] == "own"
    request = RecoveryRequest(data=rows, settings=Settings(**words))
    written = recover_to(request, from_folder(folder), tmp_path / "out", distill=from_folder(folder)).record.recovery
    assert written is not None
    losses.append(written.held_out_loss.after)
    assert losses == pytest.approx(losses[:1] * 4)


def test_a_refused_transformers_model_is_as_it_was(folder: Path, text: str) -> None:
    hf = from_folder(folder)
    before, names, weights = standing(hf), vars(hf).keys() | set(), copy.deepcopy(hf.state_dict())
    with pytest.raises(InfeasibleBudgetError):
        secateur.prune(hf, "2ssp", calibration=text, **{**WORDS, "sparsity": 0.99})
    with pytest.raises(DataError):
        secateur.prune(hf, "2ssp", calibration=text, **{**WORDS, "samples": 1000})
    with pytest.raises(SecateurError):
        secateur.recover(hf, "missing.jsonl")
    with pytest.raises(CheckpointError):
        secateur.prune(hf, "2ssp", tokenizer="./missing", calibration=text, **WORDS)
    (folder / "secateur.json").write_text("{}")
    with pytest.raises(CheckpointError):
        secateur.prune(hf, "2ssp", calibration=text, **WORDS)
    assert standing(hf) == before
    assert vars(hf).keys() == names
    assert all(torch.equal(weights[name], tensor) for name, tensor in hf.state_dict().items())


def test_names_are_refused_before_weights_are_read(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.model.load._weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InfeasibleBudgetError):
        secateur.prune(folder, "2ssp", calibration=text, **{**WORDS, "sparsity": 0.99})


def test_a_transformers_model_keeps_its_history(folder: Path, text: str, tmp_path: Path) -> None:
    hf = from_folder(folder)
    first = secateur.prune(hf, "2ssp", calibration=text, **WORDS)
    secateur.save(first, tmp_path / "out")
    loaded = from_folder(tmp_path / "out")
    handed_on = secateur.prune(secateur.load(str(folder)), "2ssp", calibration=text, **WORDS).model.hf
    copies = copy.deepcopy(handed_on), pickle.loads(pickle.dumps(handed_on))
    for each in (hf, loaded, handed_on, *copies):  # pruned in this session, or by an earlier one
        second = secateur.prune(each, "2ssp", calibration=text, **{**WORDS, "sparsity": 0.1})
        assert [parent.fingerprint for parent in second.record.parents] == [first.record.fingerprint]
        assert second.model.tokenizer is not None
        assert second.record.model["name"] == ("out" if each is loaded else "own")


def test_a_tokenizer_may_be_given_by_name(folder: Path, text: str) -> None:
    by_name = secateur.prune(tiny_hf("llama"), "2ssp", tokenizer=str(folder), calibration=text, **WORDS)
    assert by_name.model.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    other = tiny_tokenizer()
    assert secateur.load(str(folder), tokenizer=other).tokenizer is other
    for wrong in (3, tiny_config("llama"), tiny_tokenizer()._tokenizer):
        with pytest.raises(InvalidOptionError, match=f"a tokenizer is .* not a {type(wrong).__name__}"):
            secateur.prune(tiny_hf("llama"), "2ssp", tokenizer=wrong, calibration=text, **WORDS)
    with pytest.raises(CheckpointError, match="no folder"):
        secateur.prune(tiny_hf("llama"), "2ssp", tokenizer="./missing", calibration=text, **WORDS)


# --- what is refused ---


def with_adapter() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(tiny_hf("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))


def adapted_in_place() -> Any:
    hf = tiny_hf("llama")
    # what `add_adapter` does, which in transformers 5.24 wants a PEFT that is not out yet
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), hf)
    hf._hf_peft_config_loaded = True
    return hf


def own_class() -> Any:
    hf = tiny_hf("llama")
    hf.__class__ = type("Mine", (LlamaForCausalLM,), {})
    return hf


def on_meta() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config("llama"))


def offloaded() -> Any:
    hf = on_meta()
    hf.hf_device_map = {"model": "disk"}
    return hf


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def part_compiled() -> Any:
    hf = tiny_hf("llama")
    hf.model.layers[1] = compiled(hf.model.layers[1])
    return hf


def compiled_in_place() -> Any:
    hf = tiny_hf("llama")
    hf.compile(backend="eager")
    return hf


def quantised() -> Any:
    hf = tiny_hf("llama")
    hf.config.quantization_config = {"quant_method": "bitsandbytes"}
    return hf


def packed() -> Any:
    hf = tiny_hf("llama")
    hf.lm_head.weight = nn.Parameter(torch.zeros(97, 16, dtype=torch.uint8), requires_grad=False)
    return hf


class Holder:
    def __init__(self) -> None:
        self.model = tiny_hf("llama")


def half_a_block() -> Any:
    hf = tiny_hf("llama")
    hf.model.layers[0].half()
    return hf


SMALL_BERT = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
SMALL_VIT = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
SMALL_T5 = T5Config(d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
NO_MODEL = UnsupportedModelError
LM = "AutoModelForCausalLM"
REFUSED: dict[str, tuple[Callable[[], Any], type[SecateurError], str]] = {
    "None": (lambda: None, NO_MODEL, "no model was given .*folder, a hub id"),
    "number": (lambda: 3, NO_MODEL, f"int is no transformers model.*{LM}"),
    "empty name": (lambda: "", InvalidOptionError, "by its name, .*not by ''"),
    "blank name": (lambda: "  ", InvalidOptionError, "by its name"),
    "no path": (lambda: "./missing", CheckpointError, "no folder"),
    "no Path": (lambda: Path("/nowhere/m"), CheckpointError, "no folder /nowhere/m"),
    "config": (lambda: tiny_config("llama"), NO_MODEL, f"LlamaConfig is no model.*{LM}"),
    "class": (lambda: AutoModelForCausalLM, NO_MODEL, f"{LM} is a class; give what its from_pretrained returns"),
    "tokenizer": (tiny_tokenizer, NO_MODEL, "is a tokenizer, to be given as `tokenizer`"),
    "state dict": (lambda: tiny_hf("llama").state_dict(), NO_MODEL, f"only what belongs to one; .*{LM}"),
    "module": (lambda: nn.Linear(2, 2), NO_MODEL, f"Linear is no transformers model; .*{LM}"),
    "holder": (Holder, NO_MODEL, "Holder is no model but holds one; give its `model`"),
    "peft": (with_adapter, NO_MODEL, "PeftModelForCausalLM .*merge_and_unload"),
    "lora": (lambda: with_adapter().base_model, NO_MODEL, "LoraModel .*merge_and_unload"),
    "inside peft": (lambda: with_adapter().base_model.model, NO_MODEL, "carries a PEFT adapter.*merge_and_unload"),
    "added adapter": (adapted_in_place, NO_MODEL, "carries a PEFT adapter.*merge_and_unload"),
    "compiled": (lambda: compiled(tiny_hf("llama")), NO_MODEL, "compiled.*give its `_orig_mod`"),
    "part compiled": (part_compiled, NO_MODEL, "parts of it are.*load it again"),
    "compiled in place": (compiled_in_place, NO_MODEL, "compiled.*load it again"),
    "parallel": (lambda: nn.DataParallel(tiny_hf("llama")), NO_MODEL, "wrapper; give .* its `module`"),
    "no head": (lambda: AutoModel.from_config(tiny_config("llama")), NO_MODEL, f"LlamaModel is not LlamaFor.*{LM}"),
    "no head, gpt2": (lambda: AutoModel.from_config(tiny_config("gpt2")), NO_MODEL, f"GPT2LMHeadModel.*{LM}"),
    "classifier": (lambda: AutoModelForSequenceClassification.from_config(tiny_config("llama", pad_token_id=1)),
                   NO_MODEL, f"is not LlamaForCausalLM.*{LM}"),
    "tagger": (lambda: AutoModelForTokenClassification.from_config(tiny_config("qwen3")), NO_MODEL,
               f"is not Qwen3ForCausalLM.*{LM}"),
    "own class": (own_class, NO_MODEL, "Mine is not LlamaForCausalLM"),
    "quantised": (quantised, NO_MODEL, r"quantised \(bitsandbytes\).*[Pp]rune the base model"),
    "packed": (packed, NO_MODEL, "weights in uint8; give it in bfloat16"),
    "mixed": (half_a_block, NO_MODEL, r"matrices in float16 and float32; cast it"),
    "meta": (on_meta, NO_MODEL, "without weights; load it by from_pretrained"),
    "hollow": (lambda: tiny("llama").hollow(), NO_MODEL, "without weights; load it"),
    "offloaded": (offloaded, NO_MODEL, "offloaded.*larger devices"),
    "encoder": (lambda: BertForMaskedLM(SMALL_BERT), NO_MODEL, "'bert' are not supported; .*llama"),
    "encoder-decoder": (lambda: T5ForConditionalGeneration(SMALL_T5), NO_MODEL, "encoder-decoder .*llama"),
    "vision": (lambda: ViTForImageClassification(SMALL_VIT), NO_MODEL, "'vit' are not supported; .*llama"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_model_to_prune_is_refused_with_what_would_be_right(kind: str) -> None:
    make, error, says = REFUSED[kind]
    model = make()
    before = type(model), getattr(model, "config", None)
    tokens, judging = tiny_tokens(tiny("llama"), 3, 8), Judging(length=8)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: secateur.prune(model, "2ssp", sparsity=0.5, calibration=tokens),
        lambda: secateur.evaluate(model, judging, tokenizer=tiny_tokenizer()),
        lambda: secateur.prune_to(secateur.Request(sparsity=0.5, calibration=tokens), model, "./never"),
        lambda: secateur.recover(model, ["some text"], tokenizer=tiny_tokenizer()),
        lambda: run_tasks(model, []),
    )
    for ask in calls:
        with pytest.raises(error, match=f"(?s){says}"):
            ask()
    assert (type(model), getattr(model, "config", None)) == before
    assert not Path("./never").exists()
    if model is not None and kind != "hollow":
        with pytest.raises(SecateurError):
            secateur.load(model)


def test_the_model_that_a_refusal_points_at_is_taken() -> None:
    tokens = tiny_tokens(tiny("llama"), 3, 8)
    faster, parallel = compiled(tiny_hf("llama")), nn.DataParallel(tiny_hf("llama"))
    merged = with_adapter().merge_and_unload()
    right = [faster._orig_mod, parallel.module, merged, Holder().model]
    done = {secateur.prune(model, "2ssp", sparsity=0.5, calibration=tokens).model.fingerprint() for model in right}
    assert len(done) == 1


@pytest.mark.parametrize(
    ("words", "arguments", "error", "says"),
    [
        ((0.3,), {}, InvalidOptionError, "sparsity=0.3"),
        (("2ssp",), {}, InvalidOptionError, "no sparsity is given"),
        (("2SPP",), {"sparsity": 0.3}, UnknownNameError, "Did you mean '2ssp'"),
        (("2ssp",), {"sparsity": 0.3, "sampels": 2}, UnknownNameError, "Did you mean 'samples'"),
    ],
)
def test_a_wrong_call_says_what_would_be_right(
    words: tuple[Any, ...], arguments: dict[str, Any], error: type[SecateurError], says: str
) -> None:
    model = tiny("llama")
    with pytest.raises(error, match=says):
        secateur.prune(model, *words, calibration=tiny_tokens(model, 3, 8), **arguments)


@pytest.mark.parametrize("wrong", [None, tiny_hf("llama"), tiny("llama"), {"a": 1}])
def test_save_takes_results(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=f"what prune or recover returned.*{type(wrong).__name__}"):
        secateur.save(wrong, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what a method asks for ---


@pytest.mark.parametrize(
    ("options", "enough"),
    [
        ({}, 'initial_tokens=24 with selection_tokens="24,24" would do, or 4096 windows'),
        ({"initial_tokens": 8}, 'initial_tokens=8 with selection_tokens="24,24" would do, or 4096 windows'),
        ({"initial_tokens": 8, "selection_tokens": "8,999"}, 'selection_tokens="8,24" would do, or 125 windows'),
    ],
)
def test_evopress_names_the_option_for_its_few_tokens(options: dict[str, Any], enough: str) -> None:
    model = tiny("llama")
    request = {"sparsity": 0.5, "calibration": tiny_tokens(model, 3, 8), "method": "evopress", **options}
    with pytest.raises(InvalidOptionError, match=enough):
        secateur.prune(model, **request)
    few = {"initial_tokens": 24, "selection_tokens": "24,24", "generations": 1, "offspring": 2, "initial": 2}
    assert secateur.prune(model, **{**request, **few}).record.edits
