"""bench/peers.py: what another project pruned, exchanged as files and judged as our own cells; no peer is installed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, importing
from models import tiny, tiny_tokens
from oracles import edited, write_texts
from safetensors.torch import load_file, save_file
from studies import Loads, comparison, grid

from secateur.engine.tokens import read_tokens
from secateur.errors import OutputExistsError
from secateur.export import save
from secateur.grid import compare
from secateur.judge.perplexity import perplexity
from secateur.model.handle import Model
from secateur.report.results import CellResult, read_results
from secateur.surgery.edits import DropAttention, KeepNeurons

# A peer that keeps each FFN's first neurons. It has numpy and the exchange's files, and nothing else.
STAND_IN = """
import json, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file

folder = Path(sys.argv[2])
job = json.loads((folder / "job.json").read_text())
ids = load_file(folder / "calibration.safetensors")["ids"]
assert ids.shape[1] == job["length"]
tensors = load_file(Path(job["dense"]) / "model.safetensors")
for name, tensor in tensors.items():
    if ".mlp." in name and not name.endswith("down_proj.bias"):
        axis = 1 if "down" in name else 0
        kept = tensor.shape[axis] - int(job["neurons_percent"] / 100 * tensor.shape[axis])
        tensors[name] = (tensor[:, :kept] if axis else tensor[:kept]).copy()
save_file(tensors, folder / "pruned.safetensors")
cost = {"wall_s": 1.5, "cpu_s": 1.25, "forwards": len(ids), "peak_memory_bytes": 10**6}
facts = {"version": "9.9", "options": {"percent": job["neurons_percent"]}, "cost": cost, "versions": {"numpy": "1"}}
(folder / "pruned.json").write_text(json.dumps(facts))
"""
SIZES = (0.25, 0.5)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The bench, with a stand-in for each peer."""
    script = tmp_path_factory.mktemp("peer") / "stand_in.py"
    script.write_text(STAND_IN)
    with importing(ROOT / "bench") as by_name, pytest.MonkeyPatch.context() as patch:
        module = by_name("peers")
        patch.setattr(module, "SIDE", script)
        patch.setattr(module, "environment", lambda *_: sys.executable)
        yield module


@pytest.fixture(scope="module")
def done(peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside each other: a comparison as it was (`before`) and with the peer's cells (`after`), its model, its
    `plain.txt`, and what the peer left (`work`)."""
    folder = tmp_path_factory.mktemp("done")
    text, _ = write_texts(folder)
    save(Loads()(), folder / "tiny-llama")
    compare(comparison(text, "2ssp", sparsities=SIZES), grid(folder / "before", text))
    shutil.copytree(folder / "before", folder / "after")
    peers.main(words(folder, "after"))
    return folder


def words(folder: Path, name: str, *more: str) -> list[str]:
    """The bench's command for one of the folders."""
    text = str(folder / "plain.txt")
    where = name if Path(name).is_absolute() else folder / name
    command = [where, folder / "tiny-llama", "--texts", text, "--calibration", text, "--work", folder / "work", *more]
    return [str(word) for word in command]


def cells(folder: Path) -> dict[str, CellResult]:
    return {cell.name: cell for cell in read_results(folder).cells}


def first_neurons(width: int) -> Model:
    model = Loads()()
    return edited(model, *(KeepNeurons(number, tuple(range(width))) for number in model.numbers))


@pytest.mark.slow
def test_what_a_peer_pruned_is_judged_as_our_cells_are_and_stands_beside_them(done: Path) -> None:
    ours, found = cells(done / "before"), cells(done / "after")
    assert list(found) == ["dense", "2ssp-0.25", "optipfair-0.25", "2ssp-0.5", "optipfair-0.5"]
    assert all(found[name].perplexity == cell.perplexity for name, cell in ours.items())
    for size in SIZES:
        cell, own = found[f"optipfair-{size}"], found[f"2ssp-{size}"]
        assert cell.done
        assert cell.shape is not None
        model = first_neurons(cell.shape[0].width)
        assert cell.parameters == model.layout().parameters
        one_each = sum(block.neuron for block in model.layout().blocks.values())
        assert abs((cell.parameters or 0) - (own.parameters or 0)) <= one_each
        text = cell.perplexity["plain.txt"]
        assert text.fingerprint == own.perplexity["plain.txt"].fingerprint
        windows = read_tokens(model, str(done / "plain.txt"), purpose="evaluation", length=24, samples=5)
        assert text.perplexity == pytest.approx(perplexity(model, windows).perplexity, rel=1e-6)
        assert cell.calibration is not None
        assert own.calibration is not None
        assert cell.calibration["fingerprint"] == own.calibration["fingerprint"]
        assert cell.prune is not None
        assert (cell.prune.cpu_s, cell.prune.forwards, cell.prune.peak_memory_bytes) == (1.25, 2, 10**6)
    table = (done / "after" / "main-table.md").read_text()
    assert "optipfair 9.9 (not ours)" in table
    assert "python bench/peers.py" in table
    rows = json.loads((done / "after" / "main-table.json").read_text())["differences"]
    assert {row["cell"] for row in rows} == {"optipfair-0.25", "optipfair-0.5"}
    assert all(row["perplexity"]["plain.txt"]["low"] is not None for row in rows)


@pytest.mark.slow
def test_a_cell_is_made_once_and_compare_leaves_it(
    peers: Any, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done / "after", tmp_path / "cmp")
    monkeypatch.setattr(peers, "pruned", None)
    peers.main(words(done, str(tmp_path / "cmp")))
    compare(comparison(done / "plain.txt", "2ssp", sparsities=SIZES), grid(tmp_path / "cmp", done / "plain.txt"))
    files = [folder / "cells/optipfair-0.25/cell.json" for folder in (tmp_path / "cmp", done / "after")]
    assert files[0].read_text() == files[1].read_text()
    assert "optipfair 9.9" in (tmp_path / "cmp" / "main-table.csv").read_text()
    with pytest.raises(SystemExit, match="other terms"):
        peers.main(words(done, str(tmp_path / "cmp"), "--samples", "3"))


@pytest.mark.slow
def test_what_was_pruned_is_kept_for_another_folder(
    peers: Any, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done / "before", tmp_path / "cmp")
    monkeypatch.setattr(peers.subprocess, "run", None)
    peers.main(words(done, str(tmp_path / "cmp"), "--sparsities", "0.5"))
    cell = cells(tmp_path / "cmp")["optipfair-0.5"]
    assert cell.done
    assert cell.perplexity == cells(done / "after")["optipfair-0.5"].perplexity


@pytest.mark.slow
def test_another_model_text_or_calibration_is_refused(peers: Any, done: Path, tmp_path: Path) -> None:
    before = words(done, "before")
    save(Loads(seed=1)(), tmp_path / "other")
    with pytest.raises(OutputExistsError, match="model"):
        peers.main([before[0], str(tmp_path / "other"), *before[2:]])
    text = tmp_path / "plain.txt"
    text.write_text("a dog saw the tree and flew " * 200)
    with pytest.raises(OutputExistsError, match="texts' content"):
        peers.main([*before, "--texts", str(text)])
    with pytest.raises(SystemExit, match="calibration"):
        peers.main([*before, "--calibration", str(text)])
    assert set(cells(done / "before")) == {"dense", "2ssp-0.25", "2ssp-0.5"}


@pytest.mark.slow
def test_a_peer_that_fails_says_why_in_its_cell(
    peers: Any, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done / "before", tmp_path / "cmp")
    (tmp_path / "fails.py").write_text("raise ValueError('no gate here')")
    monkeypatch.setattr(peers, "SIDE", tmp_path / "fails.py")
    peers.main(words(done, str(tmp_path / "cmp"), "--sparsities", "0.25", "--work", str(tmp_path)))
    cell = cells(tmp_path / "cmp")["optipfair-0.25"]
    assert cell.status == "failed"
    assert "no gate here" in (cell.error or "")
    assert "no gate here" in (tmp_path / "cmp" / "main-table.md").read_text()


def test_modules_without_tensors_are_gone_and_tensors_must_fit(peers: Any) -> None:
    wanted = edited(tiny("llama"), DropAttention(1), KeepNeurons(0, (0, 1, 2)))
    tensors = {name: tensor.clone() for name, tensor in wanted.hf.state_dict().items()}
    norm = "model.layers.1.input_layernorm.weight"
    model = peers.narrowed(tiny("llama", 1), tensors | {norm: torch.ones_like(tensors["model.norm.weight"])})
    assert model.layout() == wanted.layout()
    ids = tiny_tokens(model, 1, 8).ids
    assert torch.equal(model.hf(ids).logits, wanted.hf(ids).logits)
    with pytest.raises(ValueError, match=r"norm\.weight"):
        peers.narrowed(tiny("llama"), {name: each for name, each in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match="other"):
        peers.narrowed(tiny("llama"), tensors | {"other": torch.ones(1)})


# --- the peers' side, with stand-ins for their packages ---


@pytest.fixture
def job(tmp_path: Path) -> Path:
    model = tiny("llama")
    save(model, tmp_path / "dense")
    settings = {
        "dense": str(tmp_path / "dense"), "neurons_percent": 30, "sparsity": 0.3, "length": 8, "threads": 1,
        "device": "cpu", "dtype": "float32", "reference": str(tmp_path / "theirs"), "reference_sha256": "abc",
    }  # fmt: skip
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text(json.dumps(settings))
    save_file({"ids": tiny_tokens(model, 3, 8).ids}, tmp_path / "job" / "calibration.safetensors")
    return tmp_path / "job"


@pytest.fixture
def side() -> Iterator[ModuleType]:
    threads, modules = torch.get_num_threads(), dict(sys.modules)
    with importing(ROOT / "bench") as by_name:
        yield by_name("peer_side")
    torch.set_num_threads(threads)
    for name in sys.modules.keys() - modules.keys():  # it has a process of its own: stand-ins for packages, their code
        if name.partition(".")[0] in ("lm_eval", "src"):
            del sys.modules[name]
    sys.modules.update({name: module for name, module in modules.items() if name.partition(".")[0] == "lm_eval"})


def test_optipfair_gets_each_window_and_the_percentage(side: Any, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, seen = ModuleType("optipfair"), {}

    def prune_model(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        batches = options.pop("dataloader")
        for batch in batches:
            model(**batch)
        seen.update(options, windows=[tuple(batch["input_ids"].shape) for batch in batches])
        return model

    package.prune_model, package.__version__ = prune_model, "0.0.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optipfair", package)
    side.main("optipfair", job)
    told = json.loads((job / "pruned.json").read_text())
    assert seen["windows"] == [(1, 8)] * 3
    assert seen["pruning_percentage"] == told["options"]["pruning_percentage"] == 30
    assert (told["version"], told["cost"]["forwards"]) == ("0.0.1", 3)
    assert told["cost"]["peak_memory_bytes"] > 0
    left, dense = load_file(job / "pruned.safetensors"), tiny("llama").hf.state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in left.items())


def test_the_authors_code_is_used_as_it_is_on_the_jobs_device_and_length(side: Any, job: Path) -> None:
    theirs = job.parent / "theirs" / "src"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").touch()
    (theirs / "evaluation.py").write_text(
        "import lm_eval\n"
        "def evaluate_perplexity(model, ids, seq_len=2048, enable_tqdm=True, device='cuda'):\n"
        "    assert ids.numel() // seq_len == 1\n"
        "    return model(ids.to(device)).logits.mean().item()\n"
    )
    (theirs / "utilities.py").write_text(
        "from .evaluation import evaluate_perplexity\n"
        "def search(model, ids):\n"
        "    return evaluate_perplexity(model, ids, seq_len=2048, enable_tqdm=False)\n"
    )
    (theirs / "pruning.py").write_text(
        "from .utilities import search\n"
        "def two_stage_2ssp(model, windows, sparsity):\n"
        "    search(model, windows[0])\n"
        "    del model.model.layers[1].self_attn.q_proj\n"
        "    return model if sparsity < 0.5 else False\n"
    )
    side.main("2ssp-authors", job)
    assert json.loads((job / "pruned.json").read_text())["version"] == "abc"
    assert not [name for name in load_file(job / "pruned.safetensors") if "layers.1.self_attn.q_proj" in name]
