"""What people hand in for a model: names, folders and transformers models work; all else is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from models import tiny, tiny_config, tiny_hf, tiny_tokenizer, tiny_tokens
from oracles import write_texts
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, T5Config

import secateur
from secateur.errors import CheckpointError, InvalidOptionError, UnsupportedModelError
from secateur.judge.judging import Judging
from secateur.model.load import as_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense model with its tokenizer."""
    folder = tmp_path / "dense"
    tiny_hf("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def asked(tmp_path: Path) -> dict[str, Any]:
    return {"sparsity": 0.5, "calibration": str(write_texts(tmp_path)[0]), "samples": 3, "length": 8}


def test_a_name_a_path_and_a_transformers_model_are_one_model(folder: Path, tmp_path: Path) -> None:
    request = asked(tmp_path)
    loaded = secateur.prune(secateur.load(str(folder)), **request)
    hf: Any = type(tiny_hf("llama")).from_pretrained(folder)
    for given in (folder, str(folder), hf):
        pruned = secateur.prune(given, **request)
        assert pruned.record.fingerprint == loaded.record.fingerprint
        assert pruned.model.fingerprint() == loaded.model.fingerprint()
        assert pruned.record.model == loaded.record.model
        secateur.save(pruned, tmp_path / "smaller", overwrite=True)
        assert secateur.load(str(tmp_path / "smaller")).tokenizer is not None
    assert pruned.model.hf is hf  # adopted: the user's own object is smaller now


def test_a_model_that_was_built_has_no_tokenizer_but_takes_ids(tmp_path: Path) -> None:
    pruned = secateur.prune(tiny_hf("llama"), sparsity=0.5, calibration=tiny_tokens(tiny("llama"), 3, 8))
    assert pruned.model.tokenizer is None
    with pytest.raises(secateur.SecateurError, match="tokenizer"):
        secateur.prune(tiny_hf("llama"), **asked(tmp_path))


def test_judging_takes_what_pruning_takes(folder: Path, tmp_path: Path) -> None:
    judging = Judging(texts=[str(write_texts(tmp_path)[0])], samples=2, length=8)
    by_name = secateur.evaluate(folder, judging, against=str(folder))
    assert by_name.model.perplexity == secateur.evaluate(secateur.load(str(folder)), judging).model.perplexity


def classifier() -> Any:
    return AutoModelForSequenceClassification.from_config(tiny_config("llama", pad_token_id=0))


def with_adapter() -> Any:
    return peft.get_peft_model(tiny_hf("llama"), peft.LoraConfig(target_modules=["q_proj"]))


def adapted_in_place() -> Any:
    hf = tiny_hf("llama")
    hf.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    return hf


def compiled_in_place() -> Any:
    hf = tiny_hf("llama")
    hf.compile()
    return hf


def on_meta() -> Any:
    return tiny_hf("llama").to("meta")


def quantised() -> Any:
    hf = tiny_hf("llama")
    hf.config.quantization_config = {"quant_method": "bitsandbytes"}
    return hf


def encoder_decoder() -> Any:
    return AutoModelForSeq2SeqLM.from_config(T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2))


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # of peft and torch themselves, as they build what we refuse
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("build", "way_out"),
    [
        (lambda: None, "folder"),
        (with_adapter, "merge_and_unload"),
        (adapted_in_place, "merge_and_unload"),
        pytest.param(lambda: torch.compile(tiny_hf("llama")), "_orig_mod", marks=pytest.mark.slow),  # a slow import
        pytest.param(compiled_in_place, "then compile", marks=pytest.mark.slow),
        (lambda: torch.nn.DataParallel(tiny_hf("llama")), "module"),
        (lambda: AutoModel.from_config(tiny_config("llama")), "AutoModelForCausalLM"),
        (classifier, "AutoModelForCausalLM"),
        (quantised, "Prune the base model"),
        (encoder_decoder, "decoder-only"),
        (on_meta, "cpu"),
        (lambda: tiny_config("llama"), "AutoModelForCausalLM"),
        (tiny_tokenizer, "AutoModelForCausalLM"),
        (lambda: tiny_hf("llama").state_dict(), "AutoModelForCausalLM"),
        (lambda: torch.nn.Linear(2, 2), "AutoModelForCausalLM"),
        (lambda: SimpleNamespace(config=None), "AutoModelForCausalLM"),
        (lambda: 3, "AutoModelForCausalLM"),
    ],
)
def test_what_is_no_whole_causal_model_is_refused_with_the_way_out(build: Any, way_out: str) -> None:
    with pytest.raises(UnsupportedModelError, match=way_out):
        as_model(build())


def test_a_string_that_names_no_folder_is_told() -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        secateur.prune("./nowhere", sparsity=0.5)


@pytest.mark.parametrize(
    ("options", "enough"),
    [
        ({}, "initial_tokens=24 would do, or 256 windows"),
        ({"initial_tokens": 8}, "selection_tokens=24,24 would do, or 256 windows"),
        ({"initial_tokens": 8, "selection_tokens": "8,999"}, "selection_tokens=8,24 would do, or 125 windows"),
    ],
)
def test_evopress_names_the_option_for_its_few_tokens(options: dict[str, Any], enough: str) -> None:
    model = tiny("llama")
    request = {"sparsity": 0.5, "calibration": tiny_tokens(model, 3, 8), "method": "evopress", **options}
    with pytest.raises(InvalidOptionError, match=enough):
        secateur.prune(model, **request)
    few = {"initial_tokens": 8, "selection_tokens": "8,24", "generations": 1, "offspring": 2, "initial": 2}
    assert secateur.prune(model, **{**request, **few}).record.edits
