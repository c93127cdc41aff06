"""Checkpoints of secateur's on the hub: with their history, and compared with their sums, as those in a folder are.

The hub is stood in for by its own cache: what it would fetch lies there already, and tests are offline.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from models import tiny, tiny_tokenizer, tiny_tokens
from test_cli import call
from transformers import AutoModelForCausalLM

import secateur
from secateur import load, prune
from secateur.errors import CheckpointError
from secateur.model.described import SUMS
from secateur.output import save
from secateur.record import RECORD

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pruned model `org/m` in two revisions of other weights; the folder of the newer one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--org--m"
    for seed, commit in enumerate(COMMITS):
        model = tiny("llama", seed)
        model.tokenizer = tiny_tokenizer()
        pruned = prune(model, "2ssp", sparsity=0.4, calibration=tiny_tokens(model, 3, 8), attentions=1)
        save(pruned, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMITS[1])
    (place / "refs" / "old").write_text(COMMITS[0])
    return place / "snapshots" / COMMITS[1]


@pytest.mark.parametrize(("revision", "commit"), [(None, COMMITS[1]), ("old", COMMITS[0]), (COMMITS[0], COMMITS[0])])
def test_a_pruned_model_of_the_hub_has_its_history(revision: str | None, commit: str, hub: Path) -> None:
    record = json.loads((hub.parent / commit / RECORD).read_text())
    model = load("org/m", revision=revision)
    assert [each.fingerprint for each in model.parents] == [record["fingerprint"]]
    assert (model.source["source"], model.source["revision"]) == ("hub", commit)
    assert model.fingerprint() == load(str(hub.parent / commit)).fingerprint()
    again = secateur.prune(model, "2ssp", sparsity=0.1, calibration=tiny_tokens(model, 3, 8), stage1_only=True).record
    assert [each.method for each in again.parents] == ["2ssp"]
    assert again.model["name"] == "org/m"
    words = ("--revision", revision) if revision else ()
    shown = call("inspect", "org/m", "--verify", "--json", *words)
    assert shown.code == 0, shown.err
    assert shown.json["pruned"]["created"] == record["created"]
    assert shown.json["verified"] is True


def test_weights_of_the_hub_are_compared_with_their_sums(hub: Path) -> None:
    (weights,) = hub.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 4
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not the file that secateur wrote"):
        load("org/m")
    assert "is not the file that secateur wrote" in call("inspect", "org/m", "--verify").err
    load("org/m", revision="old")
    weights.unlink()
    told = call("inspect", "org/m", "--verify")
    assert told.code == 3
    assert f"org/m has no {weights.name}, which SHA256SUMS lists; it was not uploaded" in told.err


def test_sums_beside_a_model_of_others_are_their_own(hub: Path) -> None:
    (hub / RECORD).unlink()
    (hub / SUMS).write_text("0" * 32 + " *model.safetensors\n")
    assert load("org/m").parents == []
    (hub / SUMS).unlink()
    assert "no SHA256SUMS to compare with" in call("inspect", "org/m", "--verify").out
    assert "pruned" not in call("inspect", "org/m", "--json").json


def test_a_checkpoint_of_the_hub_that_was_never_right_is_no_matter_of_the_network(hub: Path) -> None:
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    with pytest.raises(CheckpointError, match="org/m cannot be loaded"):
        load("org/m")


def test_of_several_commits_in_the_cache_no_history_is_taken(hub: Path) -> None:
    tokens = tiny_tokens(tiny("llama"), 3, 8)
    words: dict[str, Any] = {"sparsity": 0.1, "calibration": tokens, "stage1_only": True}
    parents = []
    for _ in range(2):
        hf = AutoModelForCausalLM.from_pretrained("org/m")
        parents.append(len(prune(hf, "2ssp", **words).record.parents))
        shutil.rmtree(hub.parent / COMMITS[0], ignore_errors=True)
    assert parents == [0, 1]


def test_a_damaged_record_on_the_hub_is_told(hub: Path) -> None:
    (hub / RECORD).write_text("{}")
    with pytest.raises(CheckpointError, match=r"secateur\.json is damaged"):
        load("org/m")
    shutil.rmtree(hub)
    (hub.parents[1] / "refs" / "main").write_text(COMMITS[0])
    load("org/m")
