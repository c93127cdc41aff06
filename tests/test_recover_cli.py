"""`secateur recover`: what it writes, what it prints where, how it refuses, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import logits
from oracles import Impatient, write_model
from test_cli import Told, _own_world, call, contents  # noqa: F401  # a fixture

import secateur
from secateur import folders
from secateur.cli import recover as cli
from secateur.heal import trainer

pytestmark = pytest.mark.slow  # several seconds each for its imports and its processes

QUICK = ("--template", "chat", "--max-length", 64, "--global-batch", 4, "--lr", 5e-3, "--max-steps", 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruned model of tier B, the dense one, and data; no test changes them."""
    folder = tmp_path_factory.mktemp("world")
    dense = write_model(folder / "dense", num_hidden_layers=2)
    model = secateur.load(str(dense))
    tokens = secateur.Tokens.of(torch.arange(5, 77).view(3, 24))
    secateur.save(secateur.prune(model, "2ssp", sparsity=0.4, calibration=tokens, attentions=1), folder / "pruned")
    other = write_model(folder / "other", vocab_size=101)
    rows = [{"instruction": f"say {letter}", "output": letter * 3} for letter in "abcd" * 4]
    data = folder / "alpaca_of_mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dense": dense, "pruned": folder / "pruned", "other": other, "data": data}


@pytest.fixture
def recover(world: dict[str, Path], tmp_path: Path) -> Callable[..., Told]:
    """`secateur recover` with enough options to run; those given come last and win."""

    def run(*words: object, model: object = None, out: Path = tmp_path / "out") -> Told:
        return call("recover", model or world["pruned"], "--data", world["data"], "--out", out, *QUICK, *words)

    return run


def test_a_healed_model_with_its_account(recover: Callable[..., Told], tmp_path: Path, world: dict[str, Path]) -> None:
    before = contents(world["pruned"])
    told = recover("--teacher", world["dense"], "--held-out", 3)
    assert told.code == 0, told.err
    out = tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # what was needed to go on is gone
    assert set(contents(out)) == set(before)
    record = json.loads((out / "secateur.json").read_text())
    assert record["arguments"]["command"][0] == "recover"
    losses = record["recovery"]["held_out_loss"]
    for fact in (
        f"{losses['before']:.4f}", f"{losses['after']:.4f}", "13 rows of alpaca_of_mine.jsonl", "tier B",
        "CC BY-NC 4.0", str(out), "held-out KL",
    ):  # fmt: skip
        assert fact in told.out  # fmt: skip
    assert "CC BY-NC 4.0" in (out / "README.md").read_text()
    pruned, healed = secateur.load(str(world["pruned"])), secateur.load(str(out))
    assert healed.layout() == pruned.layout()
    assert [step.method for step in healed.parents] == ["2ssp", "lora"]
    ids = torch.arange(5, 15)[None]
    assert not torch.equal(logits(healed, ids), logits(pruned, ids))
    assert contents(world["pruned"]) == before
    shown = call("inspect", out)
    assert shown.code == 0, shown.err
    assert "pruned by 2ssp" in shown.out
    assert "trained by LoRA on 13 rows of alpaca_of_mine.jsonl" in shown.out
    as_json = call("inspect", out, "--json").json
    assert as_json["pruned"]["method"] == "2ssp"
    assert as_json["recoveries"][0]["held_out_loss"] == losses
    assert call("eval", out, "--generate", "say a", "--json").code == 0
    assert len(json.loads((out / "secateur.json").read_text())["evaluations"]) == 1


def test_the_same_command_again_finds_its_result(recover: Callable[..., Told], tmp_path: Path) -> None:
    first = recover("--json")
    assert first.code == 0, first.err
    before = contents(tmp_path)
    assert first.json["recovery"] == json.loads(before["out/secateur.json"])["recovery"]
    again = recover()
    assert again.code == 0
    assert "already holds this result" in again.err
    other = recover("--seed", 1)
    assert other.code == 3
    assert "holds another pruning or recovery" in other.err
    assert contents(tmp_path) == before
    assert recover("--seed", 1, "--overwrite").code == 0
    assert json.loads((tmp_path / "out" / "secateur.json").read_text())["seed"] == 1


def test_an_interrupted_run_says_how_it_goes_on(
    recover: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--max-steps", 4, "--eval-every", 4)
    steady = recover(*words, out=tmp_path / "steady")
    assert steady.code == 0, steady.err
    with monkeypatch.context() as patch:
        patch.setattr(cli, "Bars", Impatient)
        told = recover(*words)
    assert (told.code, told.out, told.err.count("\n")) == (130, "", 1)
    assert f"of 4 is kept in {tmp_path / 'out.run'}. The same command goes on from there" in told.err
    assert not (tmp_path / "out").exists()
    other = recover(*words, "--seed", 1)
    assert other.code == 3
    assert "seed (0, now 1)" in other.err
    with monkeypatch.context() as patch:  # trained, but not yet written
        patch.setattr(folders, "_take_place", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(trainer.state, "write", lambda *args: None)
        assert recover(*words).code == 130
    told = recover(*words, "--json")
    assert told.code == 0, told.err
    assert told.json["recovery"]["resumed_at"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "steady")]
    assert weights[0] == weights[1]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "steady"}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--data", "./none.jsonl"), 3, "there is no file"),
        (("--data", "nonsense"), 3, "unknown text 'nonsense'"),
        (("--teacher", "./none"), 3, "there is no folder"),
        (("--teacher", "{other}"), 3, "another tokenizer"),
        (("--train", "some"), 3, "lora (adapters"),
        (("--max-length", "65"), 3, "positions end at 64"),
        (("--max-length", "9"), 3, "no row has a counted token"),
        (("--batch-size", "3"), 3, "does not divide"),
        (("--lr", "nan"), 3, "lr nan"),
        (("--max-steps", "0"), 3, "max_steps 0"),
        (("--max-steps", "x"), 2, "--max-steps"),
        (("--held-out", "16"), 3, "leave none to train on"),
        (("--template", "vicuna"), 3, "alpaca (the paper's prompt) or chat"),
        (("--dtype", "float16"), 3, "loss scaling"),
        (("--max-shard-size", "big"), 3, "5GB"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_in_one_line(
    words: tuple[str, ...], code: int, message: str, recover: Callable[..., Told], tmp_path: Path,
    world: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    told = recover(*(word.format(**world) for word in words))
    assert (told.code, told.out) == (code, "")
    assert message in told.err
    if code == 3:
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_or_no_free_place_is_refused(recover: Callable[..., Told], tmp_path: Path) -> None:
    assert "there is no folder" in recover(model=tmp_path / "none").err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for words in ((), ("--overwrite",)):
        told = recover(*words)
        assert told.code == 3
        assert "secateur did not write" in told.err
    assert contents(tmp_path) == {"out/thesis.tex": b"years of work"}
