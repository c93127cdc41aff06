"""What a run will take, told from numbers alone, against what it took."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import FAMILY_NAMES, parameters, tiny, tiny_tokens
from oracles import write_model

import secateur
from secateur.errors import (
    InfeasibleBudgetError,
    InvalidOptionError,
    SecateurError,
    UnknownNameError,
)
from secateur.export import save
from secateur.forecast import Forecast, Speed, forecast, timed
from secateur.model.load import Source
from secateur.planning import Request


def foretold(folder: Path | str, **request: Any) -> Forecast:
    """Of 2SSP by default, on three windows of eight tokens."""
    where = {name: request.pop(name) for name in ("device", "dtype") if name in request}
    given = {"method": "2ssp", "sparsity": 0.4, "samples": 3, "length": 8, **request}
    return forecast(Request.given(given.pop("method"), given), Source(name=str(folder), **where))


def without_weights(folder: Path) -> Path:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_foretold_comes_true(family: str, tmp_path: Path) -> None:
    folder = without_weights(write_model(tmp_path / "model", family))
    told = asdict(foretold(folder, attentions=1))
    model = tiny(family)
    before = parameters(model)
    pruned = secateur.prune(model, "2ssp", sparsity=0.4, calibration=tiny_tokens(model, 3, 8), attentions=1)
    assert told["parameters"] == {"before": before, "after": parameters(model)}
    assert told["sparsity"] == pruned.record.sparsity
    assert told["disk_bytes"] == 4 * parameters(model)
    assert told["run_bytes"] > 0
    assert told["forwards"] == pytest.approx(pruned.record.cost.forwards, abs=0.01)
    assert (told["samples"], told["length"], told["method"]) == (3, 8, "2ssp")
    assert told["peak_memory_bytes"] > 4 * before
    assert told["seconds"] > 0


def test_a_pruned_model_is_foretold_too(tmp_path: Path) -> None:
    model = tiny("qwen2")
    secateur.prune(model, "2ssp", sparsity=0.4, calibration=tiny_tokens(model, 3, 8), attentions=1)
    save(model, tmp_path / "model")
    folder = without_weights(tmp_path / "model")
    assert Source(name=str(folder)).hollow().layout() == model.layout()
    before = parameters(model)
    told = asdict(foretold(folder, sparsity=0.2, attentions=0))
    pruned = secateur.prune(model, "2ssp", sparsity=0.2, calibration=tiny_tokens(model, 3, 8), attentions=0)
    assert told["parameters"] == {"before": before, "after": parameters(pruned.model)}


def test_the_dtype_decides_the_bytes(tmp_path: Path) -> None:
    folder = str(without_weights(write_model(tmp_path / "model")))
    told = {dtype: asdict(foretold(folder, dtype=dtype)) for dtype in
            ("auto", "float32", "bfloat16")}  # fmt: skip
    assert told["auto"]["disk_bytes"] == told["float32"]["disk_bytes"] == 2 * told["bfloat16"]["disk_bytes"]


def test_seconds_are_tokens_times_speed() -> None:
    assert Speed(block_s=0.5, head_s=2.0).seconds(300, 20) == 190


def test_windows_and_single_tokens_are_timed() -> None:
    speed = timed(tiny("llama"), 12, steps=(1, 5))
    assert set(speed.steps) == {1, 5}
    assert all(each.block_s > 0 and each.head_s > 0 for each in (speed, *speed.steps.values()))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"sparsity": 0.99}, InfeasibleBudgetError, "reaches"),
        ({"length": 65}, InvalidOptionError, "64"),
        ({"dtype": "int3"}, InvalidOptionError, "float32"),
        ({"dtype": "Tensor"}, InvalidOptionError, "float32"),
        ({"device": "cuda:99"}, InvalidOptionError, "cuda:99"),
        ({"device": "abacus"}, InvalidOptionError, "abacus"),
        ({"alfa": 1}, UnknownNameError, "alpha"),
    ],
    ids=str,
)
def test_what_the_run_would_refuse_is_refused(
    wrong: dict[str, Any], error: type[SecateurError], message: str, tmp_path: Path
) -> None:
    if wrong.get("device") == "cuda:99" and torch.cuda.device_count() > 99:
        pytest.skip("a machine with a hundred GPUs")
    folder = str(without_weights(write_model(tmp_path / "model")))
    with pytest.raises(error, match=message):
        foretold(folder, **wrong)


def test_all_devices_together_are_timed_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))  # all that is asked is whether it is there
    folder = str(without_weights(write_model(tmp_path / "model")))
    assert foretold(folder, device="auto").seconds > 0
