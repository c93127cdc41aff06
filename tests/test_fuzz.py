"""Whatever comes in: success, or a reason in one line and exit code 2 or 3. No traceback, no half of an output, and
the model's folder as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import BLOCKS, HIDDEN
from oracles import write_model, write_texts
from test_cli import call, contents

from secateur import folders, load
from secateur.errors import SecateurError
from secateur.methods import methods
from secateur.model.modeling_secateur import FAMILIES, PREFIX

CASES = 200 if os.environ.get("SECATEUR_CI") == "1" else 20
pytestmark = pytest.mark.slow


def fuzz(cases: int) -> settings:
    """The same cases each time; a function's folder serves all of them, and each puts it in order first."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=cases, derandomize=True, deadline=None, database=None, suppress_health_check=slow)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder with a model and a text, and the text. Nothing is synced to disk: that is three quarters of the time,
    and test_folders.py looks at it."""
    monkeypatch.setattr(folders, "_sync_entry", lambda path: None)
    write_model(tmp_path / "model", hidden_size=HIDDEN)
    return tmp_path, write_texts(tmp_path)[0]


def assert_one_outcome(folder: Path, text: Path, *words: object) -> int:
    """Prune the model in a folder; whatever happens, it is one of the two outcomes."""
    before = contents(folder)
    told = call(
        "prune", folder / "model", "--sparsity", 0.4, "--calibration", text, "--samples", 2, "--length", 8, "--out",
        folder / "out", *words,
    )  # fmt: skip
    after = contents(folder)
    assert {name: after.pop(name) for name in before} == before
    assert told.code in (0, 2, 3)
    assert "Traceback" not in told.err
    if told.code == 0 and (folder / "out").exists():
        assert load(str(folder / "out")).parents
    else:
        assert after == {}, told.err
        assert not (folder / "out").exists()
    if told.code == 3:
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
    return told.code


def changed(world: tuple[Path, Path], change: Callable[[Path], object], *words: object) -> int:
    """Prune a copy of the model after `change`."""
    work = world[0] / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(world[0] / "model", work / "model")
    change(work / "model")
    return assert_one_outcome(work, world[1], "--attentions", 0, *words)


# --- configurations ---


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([HIDDEN, BLOCKS, 48, 8, 1e30, -0.5, 0.0]),
    st.text(max_size=8), st.lists(st.one_of(st.integers(-1, 3), st.text(max_size=3)), max_size=5),
    st.dictionaries(st.text(max_size=6), st.integers(-2, 2), max_size=2),
)  # fmt: skip
KEYS = st.sampled_from(
    ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
     "intermediate_size", "vocab_size", "max_position_embeddings", "rope_parameters", "rms_norm_eps", "hidden_act",
     "layer_types", "tie_word_embeddings", "attention_bias", "mlp_bias", "dtype", "torch_dtype", "architectures",
     "auto_map", "quantization_config", "text_config", "is_encoder_decoder", "num_experts", "pad_token_id",
     "eos_token_id", "per_layer_config", "use_cache", "pretraining_tp", "attention_dropout", "id2label", "num_labels",
     "attn_implementation", "transformers_version", "sliding_window"]
)  # fmt: skip


CLAIMED = st.fixed_dictionaries({"model_type": st.sampled_from([*FAMILIES, *(f"{PREFIX}{x}" for x in FAMILIES), "x"])})


@fuzz(CASES)
@given(changes=st.one_of(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), CLAIMED), dry=st.booleans())
def test_any_configuration(changes: dict[str, Any], dry: bool, world: tuple[Path, Path]) -> None:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    code = changed(world, change, *(["--dry-run"] if dry else []))
    assert (world[0] / "work" / "out").exists() == (code == 0 and not dry)


# --- files ---


NAMES = st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                         "model.safetensors"])  # fmt: skip


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, Callable[[bytes], bytes]]:
    """A file's name, and what happens to its bytes: flipped, cut, doubled, replaced."""
    name, where, byte = draw(NAMES), draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=4))
    if name == "model.safetensors" and draw(st.booleans()):
        where *= 0.05  # the header, of which there is little
    kind = draw(st.sampled_from(["flip", "cut", "insert", "replace"]))

    def hurt(content: bytes) -> bytes:
        place = int(where * len(content))
        if kind == "flip":
            return content[:place] + bytes(b ^ byte[0] for b in content[place : place + 1]) + content[place + 1 :]
        if kind == "cut":
            return content[:place]
        return content[:place] + byte + content[place:] if kind == "insert" else byte

    return name, hurt


@fuzz(CASES)
@given(hurt=damage())
def test_any_damage_to_a_file(hurt: tuple[str, Callable[[bytes], bytes]], world: tuple[Path, Path]) -> None:
    name, change = hurt
    changed(world, lambda model: (model / name).write_bytes(change((model / name).read_bytes())))


@fuzz(CASES)
@given(content=st.one_of(st.binary(max_size=40), st.builds(lambda n, rest: n.to_bytes(8, "little") + rest,
       st.integers(0, 2**64 - 1), st.binary(max_size=40))))  # fmt: skip
def test_any_bytes_as_weights(content: bytes, world: tuple[Path, Path]) -> None:
    folder, _ = world
    path = folder / "model" / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SecateurError):
        load(str(folder / "model"))


@fuzz(CASES // 4)
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".txt", ".jsonl", ".json", ".parquet", ".csv", ""]))
def test_any_bytes_as_text(content: bytes, suffix: str, world: tuple[Path, Path]) -> None:
    text = world[0] / f"text{suffix}"
    text.write_bytes(content)
    assert changed(world, lambda model: None, "--calibration", text) in (0, 3)


# --- command lines ---


SHARED = ("--sparsity", "--method", "--of", "--round-to", "--calibration", "--samples", "--length", "--seed", "--count",
          "--perplexity", "--eval-samples", "--eval-length", "--max-shard-size", "--device", "--dtype", "--revision",
          "--data", "--cache-dir", "--log-level")  # fmt: skip
FLAGS = ("--dry-run", "--overwrite", "--json", "--stage1-only", "--no-such-flag", "--version", "--", "-x")
OPTIONS = sorted({"--" + name.replace("_", "-") for each in methods().values() for name in each.options} - set(FLAGS))
WORDS = st.one_of(
    st.sampled_from(["", "0", "1", "-1", "nan", "inf", "1e400", "0.5", "2", "99999999999999999999", "abc", "demo2",
                     "all", "blocks", "model", "2ssp", "l1", "kl", "none", "None", "..", "/", "~nobody/x", "{}",
                     "\ud800", "cpu", "cuda:9", "float16", "9" * 5000]),
    st.text(max_size=6),
)  # fmt: skip
PAIRS = st.tuples(st.sampled_from([*SHARED, *OPTIONS]), WORDS)


@fuzz(CASES)
@given(pairs=st.lists(PAIRS, min_size=1, max_size=3), flags=st.lists(st.sampled_from(FLAGS), max_size=2))
def test_any_command_line(pairs: list[tuple[str, str]], flags: list[str], world: tuple[Path, Path]) -> None:
    folder, text = world
    shutil.rmtree(folder / "out", ignore_errors=True)
    words = [word for pair in pairs for word in pair]
    assert_one_outcome(folder, text, "--cache-dir", folder / "cache", *words, *flags)


@fuzz(CASES // 4)
@given(
    command=st.sampled_from(["eval", "inspect", "methods", "fetch", "prune", "x"]),
    words=st.lists(
        st.one_of(WORDS, st.sampled_from(["--json", "--verify", "--inference", "--beams", "--fail-if", "--help"])),
        max_size=3,
    ),
)
def test_any_words_to_any_command(command: str, words: list[str], world: tuple[Path, Path]) -> None:
    folder, _ = world
    before = contents(folder)
    if "demo" not in words:  # which would be fetched
        assert call(command, *words).code in (0, 2, 3)
    assert contents(folder) == before
