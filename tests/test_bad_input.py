"""Damaged models, full disks, other runs in the way: told early and clearly, and nothing is lost or half-written."""

from __future__ import annotations

import json
import logging
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from models import VOCABULARY, tiny, tiny_tokenizer, tiny_tokens
from oracles import prepared, write_model, write_texts
from safetensors.torch import load_file, save_file
from test_cli import Told, call, contents

import secateur
from secateur import folders, load
from secateur.engine.tokens import read_tokens
from secateur.errors import CheckpointError, DataError, NumericalError, OutputError, SecateurError
from secateur.export import save as save_checkpoint
from secateur.folders import claimed
from secateur.judge.generation import generate
from secateur.model.described import SUMS
from secateur.model.handle import Model
from secateur.output import save
from secateur.pruning import run_job


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def pruned_folder(folder: Path, model: Model | None = None) -> Path:
    model = model or tiny("llama")
    save(secateur.prune(model, "2ssp", sparsity=0.5, calibration=tiny_tokens(model, 3, 8), attentions=1), folder)
    return folder


def prune(model: Path, out: Path, *words: object) -> Told:
    return call(
        "prune", model, "--method", "2ssp", "--sparsity", 0.4, "--calibration", write_texts(model.parent)[0],
        "--samples", 3, "--length", 16, "--attentions", 0, "--out", out, *words,
    )  # fmt: skip


# --- damaged weights ---


def flip(path: Path, place: int, bit: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def header_bytes(path: Path) -> int:
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


@pytest.mark.slow
@pytest.mark.parametrize("bit", [0, 1, 5, 7])
def test_a_flipped_bit_in_a_header_never_gives_another_model(bit: int, model_folder: Path) -> None:
    """Any place, any bit: a typed error or, where JSON means the same (a blank), the very same weights."""
    path, right = model_folder / "model.safetensors", load(str(model_folder)).fingerprint()
    whole, refused = path.read_bytes(), 0
    places = [*range(0, 8, 3), *range(8, header_bytes(path), 331)]
    for place in places:
        flip(path, place, bit)
        try:
            assert load(str(model_folder)).fingerprint() == right, place
        except SecateurError as error:
            refused += str(model_folder) in str(error)
        path.write_bytes(whole)
    assert refused > len(places) / 2


def test_a_flipped_bit_in_our_weights_is_noticed(tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path / "out")
    path = folder / "model.safetensors"
    for place in (header_bytes(path), path.stat().st_size // 2, path.stat().st_size - 1):
        flip(path, place, 0)
        with pytest.raises(CheckpointError, match=r"sha256 differs from SHA256SUMS.*restore it"):
            load(str(folder))
        assert call("inspect", folder, "--verify").code == 3
        assert call("inspect", folder).code == 0  # which reads no weights
        flip(path, place, 0)
    assert "as secateur wrote them" in call("inspect", folder, "--verify").out
    assert call("inspect", folder, "--verify", "--json").json["verified"] is True
    flip(path, path.stat().st_size - 1, 0)
    (folder / SUMS).unlink()  # somebody who means it
    load(str(folder))
    assert call("inspect", folder, "--verify", "--json").json["verified"] is False


def test_sums_are_those_of_the_usual_tool(tmp_path: Path) -> None:
    save_checkpoint(tiny("llama"), tmp_path / "out", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    listed = [line.split("  ")[1] for line in (tmp_path / "out" / SUMS).read_text().splitlines()]
    assert listed == shards
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path / "out", capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    load(str(tmp_path / "out"))
    (tmp_path / "out" / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=f"no {shards[1]}, which SHA256SUMS lists"):
        load(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "[]"), ("config.json", "null"), ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
     ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'), ("tokenizer.json", "{"),
     ("model.safetensors", ""), ("model.safetensors.index.json", "{"), ("model.safetensors.index.json", "[]"),
     ("model.safetensors.index.json", '{"weight_map": {"lm_head.weight": "../gone.safetensors"}}'),
     ("secateur.json", "[]"), ("secateur.json", "{}"), ("secateur.json", '{"fingerprint": "x", "method": 3}'),
     *[(SUMS, content) for content in ("nonsense\n", "\0\1", "0" * 64 + "  ../secret\n")]],
)  # fmt: skip
def test_a_damaged_file_is_told_with_its_folder(name: str, content: str, model_folder: Path) -> None:
    if "index" in name:
        (model_folder / "model.safetensors").unlink()
    (model_folder / name).write_text(content)
    with pytest.raises(SecateurError, match=str(model_folder)):
        load(str(model_folder))
    told = prune(model_folder, model_folder.parent / "out")
    assert (told.code, told.out, told.err.count("\n")) == (3, "", 1)
    assert not (model_folder.parent / "out").exists()


# --- numbers that are none ---


PLACES = {
    "model.layers.2.mlp.up_proj.weight": r"block 2: mlp.up_proj.weight has NaN or Inf",
    "model.layers.0.self_attn.q_proj.bias": r"block 0: self_attn.q_proj.bias has NaN or Inf",
    "model.layers.3.input_layernorm.weight": r"block 3: input_layernorm.weight has NaN or Inf",
    "model.embed_tokens.weight": r"model.embed_tokens.weight has NaN or Inf",
    "lm_head.weight": r"lm_head.weight has NaN or Inf",
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", PLACES)
def test_weights_that_are_no_numbers_are_named_before_any_work(name: str, bad: float) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.hf.get_parameter(name).view(-1)[-1] = bad
    layout = model.layout()
    with pytest.raises(NumericalError, match=PLACES[name]):
        prepared(model, sparsity=0.5, calibration=tiny_tokens(model, 3, 8))
    assert model.layout() == layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_any_dtype_may_be_large(dtype: torch.dtype) -> None:
    model = Model(tiny("opt").hf.to(dtype))
    with torch.no_grad():
        model.hf.lm_head.weight.fill_(torch.finfo(dtype).max * 0.9)  # finite each, and their sum is not
    prepared(model, sparsity=0.5, calibration=tiny_tokens(model, 3, 8))


def test_activations_that_overflow_name_their_block(model_folder: Path, tmp_path: Path) -> None:
    weights = load_file(model_folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"].fill_(3e38)  # finite, its outputs are not
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    told = prune(model_folder, tmp_path / "out")
    assert (told.code, told.out) == (3, "")
    assert "block 2: its output has NaN or Inf" in told.err
    assert not (tmp_path / "out").exists()


# --- a tokenizer of another model ---


def test_a_tokenizer_that_does_not_fit_is_told(tmp_path: Path) -> None:
    model = tiny("llama", vocab_size=20)
    model.tokenizer = tiny_tokenizer()
    plain, _ = write_texts(tmp_path)
    for purpose in ("calibration", "evaluation"):
        with pytest.raises(DataError, match=r"does not fit the model: .* vocabulary has 20"):
            read_tokens(model, str(plain), purpose=purpose, length=8)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="does not fit the model"):
        generate(model, "and then")
    fits = tiny("llama")
    fits.tokenizer = tiny_tokenizer()
    assert int(read_tokens(fits, str(plain), purpose="calibration", length=8).ids.max()) < VOCABULARY


# --- where the result goes ---


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.model.load.load", lambda *a, **k: pytest.fail("the model was loaded first"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("precious")
    before = contents(tmp_path)
    for out, words in [
        (tmp_path / "theirs", ()), (tmp_path / "theirs", ("--overwrite",)), (tmp_path / "file", ()),
        (tmp_path / "file", ("--overwrite",)), (model_folder / "config.json" / "x", ()),
        (tmp_path / "out", ("--max-shard-size", "big")), (tmp_path / ("n" * 300), ()),
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")), ()),  # which the tokenizers' library could not write
    ]:  # fmt: skip
        told = prune(model_folder, out, *words)
        assert (told.code, told.out, told.err.count("\n")) == (3, "", 1), told.err
    after = contents(tmp_path)
    assert after.keys() == before.keys() | {"plain.txt", "chat.jsonl"}
    assert {name: after[name] for name in before} == before


def test_what_a_run_reads_is_never_replaced_by_its_result(tmp_path: Path) -> None:
    model = tiny("llama")
    model.tokenizer = tiny_tokenizer()
    folder = pruned_folder(tmp_path / "models" / "one", model)
    (tmp_path / "models" / "secateur.json").write_text((folder / "secateur.json").read_text())
    (tmp_path / "link").symlink_to(folder)
    texts = pruned_folder(tmp_path / "texts")
    (texts / "my.txt").write_text("and then the old dog saw a bird " * 40)
    before = contents(tmp_path)
    for model_name, out, words in [
        (folder, folder, ()), (folder, tmp_path / "link", ()), (tmp_path / "link", folder, ()),
        (folder, tmp_path / "models", ()), (folder, texts, ("--calibration", texts / "my.txt")),
        (folder, texts, ("--perplexity", texts / "my.txt", "--eval-length", 16)),
    ]:  # fmt: skip
        told = prune(model_name, out, "--overwrite", *words)
        assert told.code == 3
        assert "which this run reads; choose another folder" in told.err
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


def test_an_input_whose_name_is_no_utf8_can_be_recorded(model_folder: Path, tmp_path: Path) -> None:
    text = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    text.write_text("and then the old dog saw a bird " * 40)
    told = prune(model_folder, tmp_path / "out", "--calibration", text)
    assert told.code == 0, told.err
    assert load(str(tmp_path / "out")).parents[0].calibration["name"] == "caf\udce9.txt"
    told = prune(model_folder, tmp_path / "other", "--calibration", text, "--samples", 4000)
    assert told.code == 3
    assert "caf\\udce9.txt" in told.err


def test_a_disk_without_room_is_told_before_the_work(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = folders.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    monkeypatch.setattr("secateur.running.run_job", lambda *a, **k: pytest.fail("it ran"))
    told = prune(model_folder, tmp_path / "deep" / "er" / "out")
    assert told.code == 3
    assert "not enough room" in told.err
    assert not (tmp_path / "deep").exists()


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel then refuses to write on, as with a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("size", [10, 1_000, 30_000])  # the configuration, the tokenizer, the weights do not fit
def test_a_disk_that_fills_up_while_saving_leaves_nothing(size: int, overwrite: bool, tmp_path: Path) -> None:
    model = tiny("llama")
    model.tokenizer = tiny_tokenizer()
    out = tmp_path / "out"
    if overwrite:
        pruned_folder(out, tiny("llama"))
    job = run_job(prepared(model, sparsity=0.4, calibration=tiny_tokens(model, 3, 8)))
    before = contents(tmp_path)
    with no_file_larger_than(size), pytest.raises(OutputError, match=r"could not .*nothing was left"):
        save(job, out, overwrite=overwrite)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if overwrite else [])
    save(job, out, overwrite=overwrite)  # the result is still there, and can be saved where there is room


# --- two runs into one folder ---


def test_the_second_run_is_refused_before_its_work(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "out"
    write_texts(tmp_path)
    before = contents(tmp_path)
    with claimed(out), monkeypatch.context() as patch:
        patch.setattr("secateur.running.run_job", lambda *a, **k: pytest.fail("it ran"))
        for words in ((), ("--overwrite",)):
            told = prune(model_folder, out, *words)
            assert (told.code, told.err.count("\n")) == (3, 1)
            assert "another run is about to write" in told.err
    assert contents(tmp_path) == before
    assert not out.parent.exists()
    assert prune(model_folder, out).code == 0  # the claim is gone with its run
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_claim_ends_with_its_process_or_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), claimed(tmp_path / "a" / "b" / "out"):
            raise error
        assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.claim").touch()  # left by a run that was killed: its lock went with it
    with claimed(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_of_two_processes_one_wins(model_folder: Path, tmp_path: Path) -> None:
    plain, _ = write_texts(tmp_path)
    command = [
        sys.executable, "-c", "from secateur.cli import main; main()", "prune", str(model_folder), "--sparsity", "0.4",
        "--calibration", str(plain), "--samples", "3", "--length", "16", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    both = [
        subprocess.Popen([*command, "--seed", str(seed)], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        for seed in (1, 2)
    ]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 3], said
    winner = next(seed for seed, process in enumerate(both, start=1) if process.returncode == 0)
    assert said[2 - winner].startswith("error: ")
    assert "Traceback" not in "".join(said)
    assert json.loads((tmp_path / "out" / "secateur.json").read_text())["seed"] == winner
    assert load(str(tmp_path / "out")).parents
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "plain.txt", "chat.jsonl"}


# --- the commands ---


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
     RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_too_little_memory_is_said_in_one_line(
    error: Exception, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.running.run_job", Mock(side_effect=error))
    told = prune(model_folder, tmp_path / "out")
    assert (told.code, told.out, told.err.count("\n")) == (3, "", 1)
    assert "out of memory; `secateur prune --dry-run` tells" in told.err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "words", [("inspect", "./none"), ("fetch", "none"), ("eval", "./none", "--inference")], ids=str
)
def test_an_error_is_printed_once(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "secateur"):  # no handler of pytest's or of a command before, as for a user
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    assert call(*words).err.count("\n") == 1


def test_the_demo_is_the_asset_and_no_folder_of_that_name(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned_folder(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secateur.model.load.resolve_model", lambda name, **kwargs: (str(model_folder), {}))
    assert "pruned" not in call("inspect", "demo", "--json").json
