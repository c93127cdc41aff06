"""The benches run, on made-up models, and count as the engines meter."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from conftest import ROOT, importing
from models import tiny, tiny_tokens
from oracles import edited
from test_recover import QUICK, pruned_tiny

import secateur
from secateur.engine.sweep import Part, sweep
from secateur.judge.perplexity import perplexity
from secateur.model.handle import Model
from secateur.record import HeldOutLoss
from secateur.run import Run
from secateur.surgery.edits import DropAttention, DropBlock

TINY = "random:blocks=3,hidden=32,vocab=97"


@pytest.fixture
def bench() -> Iterator[Any]:
    """Imports a bench by name."""
    with importing(ROOT / "bench") as by_name:
        yield by_name


@pytest.mark.parametrize("gone", [[], [DropAttention(0)], [DropAttention(2), DropAttention(5)], [DropBlock(1)]])
def test_the_counted_work_of_a_round_is_what_the_engine_meters(bench: Any, gone: list[Any]) -> None:
    work: ModuleType = bench("work")
    model: Model = edited(tiny("llama", num_hidden_layers=6), *gone)
    tokens = tiny_tokens(model, 2, 7)
    layout = model.layout()
    candidates = {number for number, block in layout.blocks.items() if block.attention}
    run = Run()
    sweep(model, tokens, [frozenset({Part(number, "attention")}) for number in sorted(candidates)], run=run)
    counted = work.shared_round(layout, candidates)
    assert run.meter.block_tokens == counted.block_forwards * 2 * 7
    assert run.meter.head_tokens == counted.heads * 2 * 6
    assert work.plain_round(layout, candidates).block_forwards == len(candidates) * len(model.numbers)


def test_without_a_head_the_ideal_goes_to_two_and_with_nothing_but_a_head_to_one(bench: Any) -> None:
    work: ModuleType = bench("work")
    layout = tiny("llama", num_hidden_layers=40).layout()
    every = set(layout.blocks)
    assert work.ideal_speedup(layout, every, 16, 0) == pytest.approx(40 * 40 / ((40 * 40 + 3 * 40 - 2) / 2), rel=0.05)
    assert work.ideal_speedup(layout, every, 16, 10**12) == pytest.approx(1, abs=1e-3)


def test_a_longer_window_costs_the_attention_more_than_its_length(bench: Any) -> None:
    work: ModuleType = bench("work")
    block = tiny("llama").layout().blocks[0]
    scores = work.block_flops(block, 200) - 2 * work.block_flops(block, 100)
    heads = block.shape.query_heads * block.head_dim
    assert scores == 4 * heads * (200 * 201 / 2 - 2 * (100 * 101 / 2))  # pairs of a token and one it sees
    alone = block.without_attention()
    assert work.block_flops(alone, 200) == 2 * work.block_flops(alone, 100) == 200 * 2 * block.mlp


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("journal", ["--model", TINY, "--methods", "slimgpt", "--length", "16", "--samples", "2"]),
        ("two_ssp", ["--model", TINY, "--attentions", "2", "--length", "16", "--samples", "2"]),
        ("work", ["--model", TINY, "--lengths", "8"]),
        ("precision", ["--model", TINY, "--attentions", "1", "--length", "16", "--search-length", "8", "--samples", "2",
                       "--settings", "float32:1", "bfloat16:1"]),
        ("obs", ["--columns", "64", "256", "--samples", "64", "--whole", "99"]),
        ("search", ["--model", TINY, "--length", "16", "--rounds", "2", "--generations", "2", "--offspring", "3",
                    "--sparsity", "0.4"]),
        pytest.param("ray_workers", ["--model", TINY, "--length", "16", "--generations", "1", "--offspring", "3",
                                     "--rounds", "1"], marks=pytest.mark.slow),
        pytest.param("streamed", ["--blocks", "2", "--hidden", "64", "--width", "96", "--vocab", "64", "--samples", "2",
                                  "--length", "8", "--sparsity", "0.3", "--methods", "slimgpt", "--model", ""],
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_bench_runs(
    bench: Any, name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(name).main([*arguments, "--json", str(tmp_path / "out.json")])
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    tables = [value for value in written.values() if isinstance(value, list) and isinstance(value[0], dict)]
    assert tables
    for table in tables:
        assert "| " + " | ".join(table[0]) + " |" in shown


def test_slimgpt_cells_are_made_once_and_tell_equal_sizes(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slimgpt: ModuleType = bench("slimgpt")
    monkeypatch.setattr(slimgpt, "LENGTHS", {8: 2, 16: 1})
    arguments = ["--model", TINY, "--samples", "2", "--length", "16", "--sparsities", "0.5", "--out", str(tmp_path)]
    slimgpt.main(["cells", *arguments, "--only", "log", "uniform", "no-compensation"])
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"dense-0-0x0", *(f"{n}-0.5-2x16" for n in ("log", "uniform", "no-compensation"))}
    pruned = [cell for name, cell in found.items() if not name.startswith("dense")]
    assert max(c["parameters"] for c in pruned) - min(c["parameters"] for c in pruned) <= 3 * 32  # one neuron
    assert found["log-0.5-2x16"]["left"] != found["uniform-0.5-2x16"]["left"]
    assert found["log-0.5-2x16"]["errors"].keys() == found["no-compensation-0.5-2x16"]["errors"].keys() != set()
    monkeypatch.setattr(slimgpt, "run_method", None)  # nothing is made again
    slimgpt.main(["cells", *arguments, "--only", "log"])


@pytest.mark.slow
def test_recovered_checkpoints_are_judged_beside_their_losses(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [{"instruction": f"say {letter}", "output": letter * 4} for letter in "abcdefghijkl"]
    (tmp_path / "say.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    healed = secateur.recover(pruned_tiny(), tmp_path / "say.jsonl", max_steps=2, **QUICK)
    secateur.save(healed, tmp_path / "healed")
    slimgpt: ModuleType = bench("slimgpt")
    monkeypatch.setattr(slimgpt, "LENGTHS", {8: 2})
    monkeypatch.setattr(slimgpt, "windows", lambda model, *_, **__: tiny_tokens(model, 2, 8))
    slimgpt.main(["recovered", "--checkpoints", str(tmp_path / "healed"), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "recovered-healed.json").read_text())
    assert healed.record.recovery is not None
    assert msgspec.convert(found["recovery"]["held_out_loss"], HeldOutLoss) == healed.record.recovery.held_out_loss
    assert (
        found["perplexity"]["8"]["perplexity"] == perplexity(healed.model, tiny_tokens(healed.model, 2, 8)).perplexity
    )


@pytest.mark.slow
def test_ways_of_training_see_the_same_tokens(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recovery: ModuleType = bench("recovery")
    monkeypatch.setattr(recovery, "load_model", lambda _: pruned_tiny())
    for name in ("c4/c4_train_shard00000_first1000.jsonl", "c4/c4_validation_2000.jsonl", "wikitext2/wiki.valid.raw"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = "abcd efgh " * 60
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n" if name.endswith("l") else text)
    words = [
        "--model",
        "tiny",
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--length",
        "16",
        "--samples",
        "2",
    ]
    recovery.main([*words, "--tokens", "256", "--steps-of", "4", "--held-out", "2", "--ways", "all", "lora"])
    cells = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert cells.keys() == {"tiny-pruned", "tiny-all-256", "tiny-lora-256"}
    assert len(list((tmp_path / "out").iterdir())) == 3  # no checkpoints are left
    told = [cell["recovery"] for cell in cells.values() if "recovery" in cell]
    assert {one["tokens_seen"][-1][1] for one in told} == {256}
    assert len({one["data"]["fingerprint"] for one in told}) == 1
    assert len({cell["perplexity"]["c4"]["perplexity"] for cell in cells.values()}) == 3
    monkeypatch.setattr(recovery, "load_model", None)  # nothing is made again
    recovery.main([*words, "--tokens", "256", "--ways", "all", "lora"])


def test_inside_slimgpt_errors_and_drift_are_as_they_must_be(bench: Any, tmp_path: Path) -> None:
    inside: ModuleType = bench("slimgpt_inside")
    for part in ("heads", "drift"):
        inside.main([part, "--model", TINY, "--samples", "2", "--length", "16", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "heads.json").read_text())["rows"]
    first = [row for row in rows if row["gone"] == 1]
    assert {row["unit"] for row in first} == {"KV groups", "query heads"}
    assert all(row["exact"]["loss"] <= row[e]["loss"] * (1 + 1e-5) for row in first for e in ("grouped", "ordinary"))
    found = json.loads((tmp_path / "drift.json").read_text())["share of the first block"]
    firsts = [found[share]["error"][0] for share in ("0.25", "0.5", "0.75")]
    assert 0 < firsts[0] < firsts[1] < firsts[2]  # the first block drifts more the more it loses


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_growth_run_in_their_own_processes(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, growth = bench("memory"), bench("growth")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(memory, "measure_afresh", lambda job: asked.append(job) or memory.measure(job))
    monkeypatch.setattr(growth, "BASE", {"blocks": 2, "hidden": 64, "length": 8})
    monkeypatch.setattr(growth, "VARIED", {"length": (8,)})
    inside: ModuleType = bench("slimgpt_inside")
    monkeypatch.setattr(inside, "HIDDEN", (64,))
    monkeypatch.setattr(inside, "measure_afresh", memory.measure)
    memory.main(["--model", TINY, "--samples", "2", "--length", "16"])
    growth.main(["--samples", "2", "--repeats", "1", "--vocab", "97"])
    inside.main(["growth", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "growth.json").read_text())["rows"][0]["cpu_s_per_block"] > 0
    assert [job["options"]["order"] for job in asked] == ["samples", "blocks"] * 2
    assert "| order |" in capsys.readouterr().out
