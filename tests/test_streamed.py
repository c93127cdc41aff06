"""A model that stays in its files gives what it gives in memory, to the bit, and is read as seldom as can be."""

from __future__ import annotations

import copy
import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, tiny, tiny_hf, tiny_in, tiny_tokens
from oracles import EACH_METHOD
from safetensors.torch import load_file, save_file

from secateur import Run, load, prune, save
from secateur.engine.sweep import Part, sample_sweep
from secateur.errors import CheckpointError, InvalidEditError, InvalidOptionError, OutputError, UnsupportedModelError
from secateur.export import save as save_checkpoint
from secateur.forecast import forecast, timed
from secateur.goals import Goal
from secateur.hf import quiet_transformers
from secateur.judge.fidelity import fidelity
from secateur.judge.generation import generate
from secateur.judge.inference import inference
from secateur.judge.judging import Judging, evaluate
from secateur.judge.perplexity import perplexity
from secateur.model.handle import Model
from secateur.model.load import Source
from secateur.model.streamed import StreamedModel
from secateur.planning import Request
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropMLP, KeepNeurons

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return stored("llama", tmp_path / "llama")


def stored(family: str, folder: Path, **overrides: Any) -> Path:
    with quiet_transformers():
        tiny_hf(family, **overrides).save_pretrained(folder)
    return folder


def streamed(folder: Path, **how: Any) -> StreamedModel:
    model = load(str(folder), stream=True, **how)
    assert isinstance(model, StreamedModel)
    return model


def test_it_opens_where_the_caller_infers(checkpoint: Path) -> None:
    """As a comparison does, to time its largest block."""
    assert timed(streamed(checkpoint), 8).block_s > 0
    with torch.inference_mode():
        model = streamed(checkpoint)
        with model.open(0, write=True) as block:
            block.weight("mlp_out").zero_()
    with model.open(0) as block:
        assert not block.weight("mlp_out").any()


def test_without_a_dtype_in_the_configuration_it_is_that_of_the_files(tmp_path: Path) -> None:
    folder = stored("llama", tmp_path / "llama")
    save_file({name: each.half() for name, each in load_file(folder / "model.safetensors").items()},
              folder / "model.safetensors")  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": None, "torch_dtype": None}))
    models = [Source(name=str(folder)).hollow(), load(str(folder), stream=False), streamed(folder)]
    assert [model.dtype for model in models] == [torch.float16] * 3


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
    assert set(model.openings) == {None, *model.numbers}
    assert set(model.openings.values()) == {1}


@pytest.mark.parametrize("stored_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_weights_are_cast_as_in_memory(stored_in: str, dtype: str, tmp_path: Path) -> None:
    with quiet_transformers():
        tiny_hf("qwen2").to(getattr(torch, stored_in)).save_pretrained(tmp_path / "model")
    model, resident = (load(str(tmp_path / "model"), stream=stream, dtype=dtype) for stream in (True, False))
    assert model.dtype == resident.dtype
    assert model.fingerprint() == resident.fingerprint()


def test_a_tied_matrix_is_one_wherever_it_is_stored(tmp_path: Path) -> None:
    folder = stored("gpt2", tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    embedding = tensors["transformer.wte.weight"]
    as_head = {name: tensor for name, tensor in tensors.items() if tensor is not embedding}
    for weights in (as_head | {"lm_head.weight": embedding}, tensors | {"lm_head.weight": embedding.clone()}):
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
        model = streamed(folder)
        with model.open_ends():
            assert model.hf.lm_head.weight is model.hf.transformer.wte.weight
            assert torch.equal(model.hf.lm_head.weight, embedding)
        assert model.fingerprint() == load(str(folder), stream=False).fingerprint()
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="ties"):
        streamed(folder)


def test_what_is_damaged_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with quiet_transformers():
        tiny_hf("llama").save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    tensors = load_file(shards[1])
    name = sorted(tensors)[0]
    damaged = {
        "no whole model: missing": lambda: save_file({k: v for k, v in tensors.items() if k != name}, shards[1]),
        "no whole model: mismatched": lambda: save_file({**tensors, name: torch.ones(3)}, shards[1]),
        "damaged or no safetensors": lambda: shards[1].write_bytes(whole[:-1]),
        "which model.safetensors.index.json lists": shards[1].unlink,
    }
    for says, damage in damaged.items():
        damage()
        with pytest.raises(CheckpointError, match=says.replace("no whole model", "not a whole model")):
            streamed(folder)
        shards[1].write_bytes(whole)
    streamed(folder).fingerprint()
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match="index"):
        streamed(folder)


def test_sums_are_verified_and_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    save_checkpoint(tiny_in("mixed widths", "llama"), tmp_path / "b")
    model = streamed(tmp_path / "b")
    file = tmp_path / "b" / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="shorter"):
        model.fingerprint()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="sha256"):
        streamed(tmp_path / "b")


@pytest.mark.parametrize("name", EACH_METHOD)
def test_every_method_gives_the_same_bytes_with_states_in_files(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.engine.stream.STATE_BYTES", 0)
    monkeypatch.setattr("secateur.judge.perplexity.STATE_BYTES", 0)
    options: dict[str, Any] = {"evopress": {"initial_tokens": 64, "selection_tokens": "32,128"}}.get(name, {})
    edits = []
    for stream in (True, False):
        model = load(str(checkpoint), stream=stream)
        tokens = tiny_tokens(model, 8, 16)
        pruned = prune(model, name, sparsity=0.5, calibration=tokens, run=Run(0), **options)
        save(pruned, tmp_path / str(stream), max_shard_size="20KB")
        edits.append(pruned.pruning.edits)
    files = sorted(path.name for path in (tmp_path / "True").glob("*.safetensors"))
    assert filecmp.cmpfiles(tmp_path / "True", tmp_path / "False", files, shallow=False) == (files, [], [])
    assert list(map(str, edits[0])) == list(map(str, edits[1]))


def test_figures_of_windows_one_by_one_are_those_in_memory_whoever_is_in_their_group(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is wherever a text is judged, and in searches."""
    model, resident, dense = streamed(checkpoint), load(str(checkpoint), stream=False), tiny("llama", seed=1)
    tokens = tiny_tokens(resident, 5, 8)
    variants = [frozenset({Part(number, "mlp")}) for number in resident.numbers]

    def figures(of: Model, window_bytes: int) -> tuple[Any, ...]:
        monkeypatch.setattr("secateur.judge.perplexity.STATE_BYTES", window_bytes)
        sums = sample_sweep(of, tokens, variants, memory_bytes=2 * window_bytes)
        return perplexity(of, tokens), fidelity(of, dense, tokens), sums.tolist()

    window = tokens.length * resident.hidden_size * resident.dtype.itemsize
    together = figures(resident, 2**30)
    assert all(figures(of, windows * window) == together for of in (model, resident) for windows in (1, 2, 4, 16))


def test_a_walk_reads_each_block_once_and_the_next_one_ahead(checkpoint: Path) -> None:
    model = streamed(checkpoint)
    total = model.layout().parameters * model.dtype.itemsize
    before = model.bytes_read
    for number in model.numbers:
        with model.open(number):
            pass
    with model.open_ends():
        pass
    assert model.bytes_read - before == total
    assert set(model.openings) == {None, *model.numbers}
    assert set(model.openings.values()) == {1}


def test_changes_need_leave_and_what_goes_wrong_on_disk_is_told(checkpoint: Path, tmp_path: Path) -> None:
    model = streamed(checkpoint, scratch=tmp_path / "scratch")
    before = model.fingerprint()
    with pytest.raises(InvalidEditError, match="block 1"), model.open(1) as block, torch.no_grad():
        block.mlp_out.weight.zero_()
    (model.scratch / "000000.partial").write_bytes(b"half a block")
    assert model.fingerprint() == before
    (tmp_path / "scratch" / "a file").write_text("")
    with pytest.raises(OutputError):
        streamed(checkpoint, scratch=tmp_path / "scratch" / "a file")


def test_it_streams_by_itself_what_does_not_fit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load(str(checkpoint)).is_streamed
    source = Source(name=str(checkpoint))
    whole = forecast(Request(method="2ssp", sparsity=0.25, samples=1, length=8), source)
    monkeypatch.setenv("SECATEUR_MEMORY", "10KB")
    assert load(str(checkpoint)).is_streamed
    assert not load(str(checkpoint), stream=False).is_streamed
    open_only = forecast(Request(method="2ssp", sparsity=0.25, samples=1, length=8), source)
    assert (whole.streamed, open_only.streamed) == (False, True)
    assert open_only.parameters == whole.parameters
    monkeypatch.setenv("SECATEUR_MEMORY", "much")
    with pytest.raises(InvalidOptionError, match="SECATEUR_MEMORY"):
        load(str(checkpoint))


def test_what_needs_the_whole_model_says_so(checkpoint: Path) -> None:
    model = streamed(checkpoint)
    works = (
        lambda: generate(model, "a prompt"),
        lambda: inference({"model": model}),
        lambda: evaluate(Source(name=str(checkpoint), stream=True), Judging(inference=True)),
        lambda: prune(Source(name=str(checkpoint), stream=True), "2ssp", goal=Goal(target_speedup=1.5)),
    )
    for work in works:
        with pytest.raises(UnsupportedModelError, match="needs the whole model"):
            work()


def test_its_folder_goes_with_it(checkpoint: Path, tmp_path: Path) -> None:
    model = streamed(checkpoint, scratch=tmp_path / "scratch")
    with model.open(1, write=True) as block, torch.no_grad():
        block.mlp_out.weight.zero_()
    with model.open(1) as block:
        assert not block.mlp_out.weight.any()
    assert list((tmp_path / "scratch").rglob("*.safetensors"))
    del model, block
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("dirty", [False, True])
def test_a_block_as_it_was_holds_no_weights_until_it_is_opened(checkpoint: Path, dirty: bool) -> None:
    model = streamed(checkpoint)
    with model.open(1, write=dirty) as block, torch.no_grad():
        if dirty:
            block.mlp_out.weight.add_(1)
        before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
        original = model.original(1)
        assert not block.mlp_out.weight.is_meta
    for _ in range(2):
        apply(model, KeepNeurons(1, (0, 2)) if model.layout().blocks[1].shape.width > 2 else DropMLP(1))
    model_too = copy.deepcopy(model)  # shares what lies on the disk
    del model
    with original.open() as was:
        state = was.module.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert all(parameter.is_meta for parameter in original.block.module.parameters())
    assert not any(parameter.is_meta for parameter in whole(model_too).parameters())


def test_files_of_edits_that_were_edited_again_go(checkpoint: Path) -> None:
    model = streamed(checkpoint)
    for width in (20, 15, 10, 5):
        apply(model, KeepNeurons(0, tuple(range(width))))
        model.fingerprint()
        assert len(list(model.scratch.glob("*.safetensors"))) == 1


def whole(model: StreamedModel) -> torch.nn.Module:
    """The first blocks with their weights, as they are read."""
    blocks = torch.nn.ModuleList()
    for number in model.numbers:
        with model.open(number) as block:
            blocks.append(copy.deepcopy(block.module))
    return blocks
