"""A model that stays in its files gives what it gives in memory, to the bit, and is read as seldom as can be."""

from __future__ import annotations

import filecmp
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import FAMILY_NAMES, tiny_hf, tiny_in, tiny_tokens

from secateur import load, prune, save
from secateur.export import save as save_checkpoint
from secateur.hf import quiet_transformers
from secateur.model.streamed import StreamedModel


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return stored("llama", tmp_path / "llama")


def stored(family: str, folder: Path, **overrides: object) -> Path:
    with quiet_transformers():
        tiny_hf(family, **overrides).save_pretrained(folder)
    return folder


def streamed(folder: Path, **how: object) -> StreamedModel:
    model = load(str(folder), stream=True, **how)  # type: ignore[arg-type]  # options of `load`
    assert isinstance(model, StreamedModel)
    return model


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_it_is_the_model_in_memory(family: str, tmp_path: Path) -> None:
    model, resident = (load(str(stored(family, tmp_path / "dense")), stream=stream) for stream in (True, False))
    assert isinstance(model, StreamedModel)
    assert not isinstance(resident, StreamedModel)
    assert all(parameter.is_meta for parameter in model.hf.parameters())
    assert model.layout() == resident.layout()
    assert model.fingerprint() == resident.fingerprint()
    assert model.bytes_read == sum(parameter.nbytes for parameter in resident.hf.parameters())
    buffers = dict(model.hf.named_buffers())
    assert all(torch.equal(buffer, buffers.pop(name)) for name, buffer in resident.hf.named_buffers())
    assert not buffers
    for each, name in ((model, "streamed"), (resident, "resident")):
        tokens = tiny_tokens(each, 4, 8)
        save(prune(each, "2ssp", sparsity=0.3, calibration=tokens), tmp_path / name)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert filecmp.cmp(tmp_path / "streamed" / file, tmp_path / "resident" / file, shallow=False)


def test_a_pruned_checkpoint_streams_too(tmp_path: Path) -> None:
    save_checkpoint(tiny_in("everything", "llama"), tmp_path / "b", max_shard_size="10KB")
    model, resident = streamed(tmp_path / "b"), load(str(tmp_path / "b"), stream=False)
    assert model.fingerprint() == resident.fingerprint()
    assert model.openings == Counter({None: 1, **dict.fromkeys(model.numbers, 1)})


def test_its_folder_goes_with_it(checkpoint: Path, tmp_path: Path) -> None:
    model = streamed(checkpoint, scratch=tmp_path / "scratch")
    with model.open(1, write=True) as block, torch.no_grad():
        block.mlp_out.weight.zero_()
    with model.open(1) as block:
        assert not block.mlp_out.weight.any()
    assert list((tmp_path / "scratch").rglob("*.safetensors"))
    del model, block
    assert not list((tmp_path / "scratch").iterdir())
