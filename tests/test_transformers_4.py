"""Checkpoints as the last transformers of series 4 reads them, in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    FAMILY_NAMES,
    LAYOUTS,
    REBASABLE,
    STOCK_LAYOUTS,
    STREAM_LAYOUTS,
    apply_all,
    layouts,
    logits,
    tiny_config,
    tiny_hf,
    tiny_in,
    tiny_tokenizer,
    tiny_tokens,
)
from reader_4 import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur import load
from secateur.export import loads_in, save
from secateur.hf import quiet_transformers
from secateur.model.handle import Model
from secateur.model.modeling_secateur import classes
from secateur.surgery.edits import DropBlock

PACKAGES = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
READER = Path(__file__).with_name("reader_4.py")
Ask = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Lets transformers 4 do jobs of reader_4.py. All but the packages above comes from this environment."""
    home = tmp_path_factory.mktemp("transformers-4")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
    python = home / "venv" / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--disable-pip-version-check", *PACKAGES]
    done = subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no {PACKAGES[0]} to be had: {done.stderr[-300:]}")
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # searched after its own
    count = iter(range(100))

    def do(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        file, out = home / f"{next(count)}.json", home / f"{next(count)}.json"
        file.write_text(json.dumps(jobs))
        words = [python, "-I", READER, file, out]
        done = subprocess.run(
            words, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        answer = json.loads(out.read_text())
        assert answer["version"] == "4.57.6"
        results: list[dict[str, Any]] = answer["results"]
        return results

    return do


# --- what RoPE is called in a configuration of either time; none of secateur's code is asked ---

TRAINED, LENGTH = 32, 80  # positions while it was trained; of the tests' tokens, more than the tiny models' 64
SHARES = {"phi": 0.75, "gpt_neox": 0.5}  # of a head, that RoPE turns; not the families' defaults
TIMES = {"llama", "gemma3_text", "olmo2", "phi3", "phi", "gpt_neox"}  # whose spelling changed in ways of their own


def half(family: str, share: float = 1.0) -> int:
    """Frequencies of a tiny model's head."""
    config = tiny_config(family)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * share) // 2


def scalings(family: str) -> dict[str, dict[str, Any]]:
    """Kinds of RoPE as configurations of models on the hub spell them, but for theta."""
    share = SHARES.get(family, 1.0)
    short = [1.0 + 0.1 * k for k in range(half(family, share))]
    factors = {"short_factor": short, "long_factor": [2 * each for each in short]}
    if family in ("gpt2", "opt"):
        return {"none": {}}
    if family == "phi3":
        own = {"original_max_position_embeddings": TRAINED}
        part = {
            "short_factor": short[: half(family, 0.5)],
            "long_factor": short[: half(family, 0.5)],
            "type": "longrope",
        }
        return {
            "default": {},
            "longrope": {"rope_scaling": {"type": "longrope", **factors}, **own},
            "part": {"partial_rotary_factor": 0.5, "rope_scaling": part, **own},
        }
    if family == "olmo2":
        return {kind: {"rope_scaling": {"type": kind, "factor": 2.0}} for kind in ("linear", "dynamic")} | {
            "default": {}
        }
    kinds: dict[str, dict[str, Any]] = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": TRAINED},
        "longrope": {**factors, "factor": 2.0, "original_max_position_embeddings": TRAINED},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": TRAINED},
    }  # fmt: skip
    made = {kind: {"rope_scaling": {"rope_type": kind, **rest}} for kind, rest in kinds.items()}
    made["longrope"]["original_max_position_embeddings"] = TRAINED  # where 4 looks for it
    return {"default": {}, **made}


def old_spelling(family: str, kind: str) -> dict[str, Any]:
    """What a dense folder of 4's time says of RoPE."""
    theta: dict[str, Any] = {"rope_theta": 500.0}
    if family == "gpt_neox":
        theta = {"rotary_emb_base": 500.0, "rotary_pct": SHARES[family]}
    if family in ("gpt2", "opt"):
        theta = {}
    if family == "phi":
        theta["partial_rotary_factor"] = SHARES[family]
    if family == "gemma3_text":
        theta["rope_local_base_freq"] = 50.0
    return theta | scalings(family)[kind]


CASES = [(family, kind) for family in FAMILY_NAMES for kind in scalings(family)]


def write_dense(family: str, kind: str, folder: Path) -> None:
    """A dense folder of 4's time: its configuration says nothing in 5's words."""
    tiny_hf(family, **old_spelling(family, kind)).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    path.write_text(json.dumps({"torch_dtype": config.pop("dtype"), **config, **old_spelling(family, kind)}))


def ids_for(family: str) -> torch.Tensor:
    length = 48 if family in ("gpt2", "opt") else LENGTH
    return torch.randint(5, 97, (2, length), generator=torch.Generator().manual_seed(1))


def stock_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with quiet_transformers():
        return logits(AutoModelForCausalLM.from_pretrained(folder).eval(), ids)


def loaded(folder: Path) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_pruned_and_dense_say_the_same_in_4_as_in_5(ask: Ask, tmp_path: Path) -> None:
    """For every family and kind of RoPE, from a dense folder of either time."""
    jobs, expected = [], {}

    def expect(folder: Path, ids: torch.Tensor) -> torch.Tensor:
        out = folder.with_name(f"{folder.name}.safetensors")
        jobs.append({"ask": "logits", "folder": str(folder), "ids": ids.tolist(), "out": str(out)})
        expected[out] = logits(loaded(folder), ids)
        return expected[out]

    for family, kind in CASES:
        place, ids = tmp_path / f"{family} {kind}", ids_for(family)
        write_dense(family, kind, place / "old")
        expect(place / "old", ids)
        if family in TIMES:
            loaded(place / "old").save_pretrained(place / "new")
        for time in ("old", "new") if family in TIMES else ("old",):
            for layout in (
                STOCK_LAYOUTS if (time, kind) in (("old", "default"), ("old", "none")) else ("blocks dropped",)
            ):
                model = Model(loaded(place / time))
                apply_all(model, layouts(model)[layout])
                if save(model, place / f"{layout} from {time}") == "A":
                    assert loads_in(model) == "transformers 4.57 and 5"
                    assert torch.equal(expect(place / f"{layout} from {time}", ids), logits(model, ids))
    wrong = {}
    for result, (out, logits_5) in zip(ask(jobs), expected.items(), strict=True):
        if result != {"missing": [], "unexpected": []}:
            wrong[str(out)] = result
        elif (off := float((load_file(out)["logits"] - logits_5).abs().max())) > 1e-4:
            wrong[str(out)] = {"off by": off}
    assert not wrong


def says(folder: Path, **changes: Any) -> Model:
    """A tiny model whose configuration has what 4 has no words for."""
    family = folder.name.partition(" ")[0]
    model = apply_all(Model(tiny_hf(family, **changes)), [DropBlock(1)])
    save(model, folder)
    return model


def test_what_4_cannot_hold_fails_there(ask: Ask, tmp_path: Path) -> None:
    local = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
    nested = {"sliding_attention": local, "full_attention": {"rope_type": "default", "rope_theta": 500.0}}
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0, "original_max_position_embeddings": TRAINED}
    factors = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "rope_type": "longrope", "rope_theta": 500.0}
    part = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    whole_heads = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "smollm3", "olmo2")
    both = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}, "full_attention": part}
    models = {
        "gemma3_text part": says(tmp_path / "gemma3_text part", rope_parameters=both),
        **{f"{name} part": says(tmp_path / f"{name} part", rope_parameters=part) for name in whole_heads},
        "gemma3_text local": says(tmp_path / "gemma3_text local", rope_parameters=nested),
        "olmo2 yarn": says(tmp_path / "olmo2 yarn", rope_parameters=yarn),
        "phi3 factor": says(tmp_path / "phi3 factor", rope_parameters=factors | {"attention_factor": 1.25}),
        "llama proportional": says(
            tmp_path / "llama proportional",
            rope_parameters={"rope_type": "proportional", "rope_theta": 500.0, "factor": 1.0},
        ),
    }
    jobs = []
    for name, model in models.items():
        ids = tiny_tokens(model, 2, LENGTH).ids
        assert loads_in(model) == "transformers 5"
        assert torch.equal(logits(loaded(tmp_path / name), ids), logits(model, ids))
        jobs.append(
            {"ask": "logits", "folder": str(tmp_path / name), "ids": ids.tolist(), "out": str(tmp_path / "out")}
        )
    assert [result.keys() for result in ask(jobs)] == [{"error"}] * len(models)


REFUSED = [
    (family, layout)
    for family in FAMILY_NAMES
    for layout in (*LAYOUTS, *(STREAM_LAYOUTS if family in REBASABLE else ()))
    if (layout not in STOCK_LAYOUTS and (family == "llama" or layout in ("block 0 without attention", "everything")))
    or layout == "sliced stream"
]  # fmt: skip


def test_what_stock_architectures_cannot_hold_is_refused_by_4(ask: Ask, tmp_path: Path) -> None:
    """By AutoModel, with leave to run the checkpoint's code, and by the stock class, which ignores the model's type."""
    jobs = []
    for family, layout in REFUSED:
        folder = tmp_path / f"{family} {layout}"
        if save(tiny_in(layout, family), folder) == "A":
            continue  # a family that cannot do the layout's edits
        stock = classes(family)["AutoModelForCausalLM"].__mro__[2].__name__
        for name, code in (("AutoModelForCausalLM", False), ("AutoModelForCausalLM", True), (stock, False)):
            options = {"trust_remote_code": code}
            jobs.append({"ask": "load", "folder": str(folder), "name": name, "options": options})
    loads = [job for job, result in zip(jobs, ask(jobs), strict=True) if "error" not in result]
    assert len(jobs) > 3 * 35
    assert loads == []


# --- tokenizers ---


def test_the_tokenizer_is_the_same_in_4(ask: Ask, tmp_path: Path) -> None:
    """One that 5 wrote, one as folders of 4's time have it, and one that was changed in memory."""
    tiny_hf("llama").save_pretrained(tmp_path / "of 5")
    tiny_tokenizer().save_pretrained(tmp_path / "of 5")
    shutil.copytree(tmp_path / "of 5", tmp_path / "of 4")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<pad>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "clean_up_tokenization_spaces": False,
        "chat_template": (tmp_path / "of 5" / "chat_template.jinja").read_text(),
    }  # fmt: skip
    (tmp_path / "of 4" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "of 4" / "chat_template.jinja").unlink()
    expected = {}
    for name, layout in (
        ("of 4", "everything"),
        ("of 5", "everything"),
        ("of 4", "blocks dropped"),
        ("changed", "dense"),
    ):
        model = load(str(tmp_path / ("of 5" if name == "changed" else name)))
        assert model.tokenizer is not None
        if name == "changed":
            model.tokenizer.add_special_tokens({"additional_special_tokens": ["12", "<|im_start|>", "<|im_end|>"]})
        apply_all(model, layouts(model)[layout])
        save(model, tmp_path / f"{name} {layout}")
        expected[str(tmp_path / f"{name} {layout}")] = run([{"ask": "tokens", "folder": str(tmp_path / name)}])[0]
    expected[str(tmp_path / "changed dense")] = run([{"ask": "tokens", "folder": str(tmp_path / "changed dense")}])[0]
    results = ask([{"ask": "tokens", "folder": folder} for folder in expected])
    assert dict(zip(expected, results, strict=True)) == expected
