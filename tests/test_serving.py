"""`prune --for ENGINE`: what is written runs there, and else nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tiny_tokens
from oracles import write_model
from test_cli import call
from test_method_contract import SETTINGS
from torch import Tensor

import secateur
from secateur.errors import InvalidOptionError, UnknownNameError, UnsupportedEditError, UnsupportedExportError
from secateur.methods import get_method, methods
from secateur.model.handle import Model
from secateur.planning import Request, plan
from secateur.pruning import Job
from secateur.record import read_record
from secateur.running import prune_to
from secateur.serving import _KEEPING, ANY, ENGINES

FULL = {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": FULL, "qwen3": {}, "gemma2": {}, "olmo2": {}, "gpt_neox": {}, "opt": {}, "phi3": {},
}  # fmt: skip
SERVED = [name for name in ENGINES if name != ANY]
# Families by what an engine has for them: blocks that differ, one shape, nothing (llama.cpp for opt).
UNEQUAL = {"stock": set(), "llama.cpp": {"llama", "qwen2", "qwen3", "phi3"}, "vllm": set(MODELS) - {"phi3"}}
DENSE = {"stock": set(MODELS), "llama.cpp": set(MODELS) - {"opt"}, "vllm": set(MODELS)}
ANYWHERE = {"shortgpt", "window"}  # whole blocks


def options_of(name: str) -> dict[str, Any]:
    options = dict(SETTINGS[name].options) if name in SETTINGS else {}
    return {option: value for option, value in options.items() if (name, option) != ("2ssp", "attentions")}


def asked(model: Model, method: str, engine: str, **more: Any) -> Request:
    given = {"sparsity": 0.3, "calibration": tiny_tokens(model, 2, 8), **more}
    options = {**options_of(method), **given.pop("options", {})}
    return Request(method=method, for_=engine, options=options, **given)


def weights(model: Model) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.hf.parameters()]


# Each of what an engine may have for a family, but for nothing: for vLLM, and for other families, it is slow.
EACH = [
    pytest.param(family, engine, marks=[pytest.mark.slow] * (family != "llama" or engine == "vllm"))
    for family in MODELS
    for engine in SERVED
]


@pytest.mark.parametrize(("family", "engine"), EACH)
def test_what_is_written_runs_there_and_else_nothing_is(family: str, engine: str, tmp_path: Path) -> None:
    """For each method; refusals leave the model as it was, since the rehearsal gives them."""
    written, refused, unable = set[str](), dict[str, str](), set[str]()
    for method in methods():
        model, folder = tiny(family, **MODELS[family]), tmp_path / method
        before = weights(model)
        try:
            prune_to(asked(model, method, engine), model, folder)
        except UnsupportedExportError as error:
            assert not folder.exists()
            assert all(map(torch.equal, before, weights(model)))
            refused[method] = str(error)
            continue
        except UnsupportedEditError:  # whatever the engine
            unable.add(method)
            continue
        written.add(method)
        record = read_record(folder)
        assert record is not None
        assert record.engine == engine
        again = secateur.load(str(folder))
        again.tokenizer = None
        assert ENGINES[engine].refuses(again) is None
    if family not in DENSE[engine]:
        expected = set[str]()
    elif family in UNEQUAL[engine]:
        expected = set(methods()) - {"slicegpt"}
    else:
        expected = ANYWHERE | set(_KEEPING)
    assert written == expected - unable
    assert all(f"what {method} leaves here does not run there: {engine} " in said for method, said in refused.items())


def test_all_blocks_keep_one_width_and_their_heads() -> None:
    for method in ("secateur", "2ssp"):
        pruned = secateur.prune(
            tiny("llama"), method, sparsity=0.3, for_="stock", calibration=tiny_tokens(tiny("llama"), 2, 8)
        )
        after = pruned.pruning.after
        assert len({(block.shape.width, block.shape.kv_heads) for block in after.blocks.values()}) == 1
        assert pruned.record.tier == "A"
        assert pruned.pruning.sparsity.got == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    ("method", "options"),
    [("secateur", {"allocation": "log"}), ("secateur", {"allocation": "searched", "search_samples": 1}),
     ("2ssp", {"attentions": 1}), ("evopress", {"units": "modules"})],
)  # fmt: skip
def test_an_option_that_contradicts_is_refused_by_its_name(method: str, options: dict[str, Any]) -> None:
    model = tiny("llama")
    name = next(iter(options))
    with pytest.raises(InvalidOptionError, match=f"--for stock .*{method} has {name} .* and {name} {options[name]} is"):
        plan(asked(model, method, "stock", options=options), model)
    plan(asked(model, method, ANY, options=options), model)
    plan(asked(model, method, "llama.cpp", options=options), model)


def test_an_engine_of_one_width_lets_attentions_differ() -> None:
    """llama.cpp has it for Qwen3 with a head of its own."""
    model = tiny("qwen3", tie_word_embeddings=False)
    plan(asked(model, "2ssp", "llama.cpp", options={"attentions": 1}), model)
    plan(asked(model, "evopress", "llama.cpp", options={"units": "modules"}), model)
    assert plan(asked(model, "secateur", "llama.cpp"), model).options["allocation"] == "equal"
    with pytest.raises(InvalidOptionError, match=r"equal widths only, .* secateur has allocation equal"):
        plan(asked(model, "secateur", "llama.cpp", options={"allocation": "log"}), model)
    with pytest.raises(UnsupportedExportError, match=r"step35.* takes the FFN width of all blocks from the first"):
        plan(asked(model, "slimgpt", "llama.cpp"), model)


def test_the_same_option_given_is_no_contradiction() -> None:
    model = tiny("llama")
    for method, (_, options) in _KEEPING.items():
        assert plan(asked(model, method, "stock", options=dict(options)), model).options.items() >= options.items()


def test_llama_cpp_gets_rows_that_it_can_quantise() -> None:
    model, odd = tiny("llama", intermediate_size=128), tiny("llama", intermediate_size=112)
    assert plan(asked(model, "secateur", "llama.cpp"), model).request.round_to == 32
    assert plan(asked(model, "secateur", "llama.cpp", round_to=16), model).request.round_to == 16
    assert plan(asked(model, "secateur", "llama.cpp", round_to=1), model).request.round_to == 1
    assert plan(asked(odd, "secateur", "llama.cpp"), odd).request.round_to == 1


def test_what_no_pruning_helps_is_said() -> None:
    model = tiny("opt")
    with pytest.raises(UnsupportedExportError, match=r"no architecture for opt.*nor does the model run there as it is"):
        plan(asked(model, "shortgpt", "llama.cpp"), model)


def test_blocks_that_the_calibration_chose_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rehearsal may make up other blocks than those which really go."""
    model, calls = tiny("llama"), list[bool]()
    row = ENGINES["stock"]

    def only_hollow(model: Model) -> str | None:
        calls.append(model.device.type == "meta")
        return None if calls[-1] else "has other blocks"

    changed = type(row)(refuses=only_hollow, alike=row.alike)
    monkeypatch.setattr("secateur.serving.ENGINES", {**ENGINES, "stock": changed})
    with pytest.raises(UnsupportedExportError, match=r"stock has other blocks \(secateur and 2ssp narrow"):
        prune_to(asked(model, "shortgpt", "stock"), model, tmp_path / "out")
    assert calls == [True, False]
    assert not (tmp_path / "out").exists()


def test_no_engine_changes_nothing() -> None:
    """The identity of a pruning is that of one without `for_`, and of one with the options that an engine asks for."""
    model = tiny("llama")
    tokens = tiny_tokens(model, 2, 8)

    def fingerprint(**more: Any) -> str:
        request = Request(sparsity=0.25, method="secateur", calibration=tokens, **more)
        return Job.of(plan(request, model), model, tokens).fingerprint

    assert fingerprint() == fingerprint(for_=ANY)
    assert fingerprint(for_="stock") == fingerprint(options={"allocation": "equal"}) != fingerprint()
    record = secateur.prune(model, "secateur", sparsity=0.25, calibration=tokens).record
    assert "engine" not in record.to_json()


def test_an_engine_that_is_not_known_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(UnknownNameError, match=r"llama\.cpp"):
        plan(asked(model, "shortgpt", "llamacpp"), model)


def test_the_command(tmp_path: Path) -> None:
    folder, text = write_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("the old dog saw a small red bird " * 40)
    common = ("prune", folder, "--sparsity", 0.25, "--calibration", text, "--samples", 2, "--length", 8)
    told = call(*common, "--for", "stock", "--method", "blockpruner", "--out", tmp_path / "no")
    assert told.code == 3
    assert "shortgpt, window and evopress remove whole blocks" in told.err
    assert not (tmp_path / "no").exists()
    assert call(*common, "--for", "stock", "--out", tmp_path / "yes").code == 0
    assert "tier A" in call(*common, "--for", "stock", "--out", tmp_path / "other").out
    assert call(*common, "--for", "vllm", "--dry-run").code == 0


def test_each_option_in_the_table_is_one_of_its_method() -> None:
    for name, (_, options) in _KEEPING.items():
        get_method(name).complete(options)
