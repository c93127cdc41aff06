"""Packages of others: installed for real, used from the command line, reloaded where neither they nor secateur are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from models import tiny_tokenizer
from oracles import write_model, write_texts
from transformers import AutoModelForCausalLM, Starcoder2Config

PLUGIN = ROOT / "tests" / "plugin"
SOURCE = str(ROOT / "src")


def fresh(*command: object, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a new process that finds secateur, and the packages installed into `path`."""
    where = os.pathsep.join([*([str(path)] if path else []), SOURCE])
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHONPATH": where, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def secateur(*words: object, path: Path | None = None) -> str:
    done = fresh(sys.executable, "-c", "from secateur.cli import main; main()", *words, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed tests/plugin."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source")  # a build leaves things there
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    done = fresh(sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source")
    assert done.returncode == 0, done.stderr
    return folder / "site"


def write_starcoder(folder: Path) -> Path:
    """A tiny model of a family that secateur does not have."""
    config = Starcoder2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


RELOAD = """
import json, sys, torch
folder, secateur_is_there = sys.argv[1], sys.argv[2] == "with"
if secateur_is_there:
    import secateur
    model = secateur.load(folder).hf
else:
    sys.modules["secateur"] = None
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print(json.dumps(model(input_ids=torch.arange(5, 17)[None], use_cache=False).logits.tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "words", "tier"),
    [
        ("llama", ("--method", "least-added", "--protect", 2), "A"),
        ("starcoder2", ("--method", "2ssp", "--attentions", 1), "B"),
    ],
)
def test_a_method_and_a_family_prune_save_and_reload(
    family: str, words: tuple[object, ...], tier: str, installed: Path, tmp_path: Path
) -> None:
    model = write_starcoder(tmp_path / "model") if family == "starcoder2" else write_model(tmp_path / "model", family)
    calibration = ("--calibration", write_texts(tmp_path)[0], "--samples", 3, "--length", 16)
    words = ("prune", model, "--sparsity", 0.5, *calibration, *words, "--out", tmp_path / "out", "--json")
    told = json.loads(secateur(*words, path=installed))
    assert told["tier"] == tier
    assert told["sparsity"]["achieved"]["blocks"] == pytest.approx(0.5, abs=0.05)
    logits = []
    for how in ("with", "without"):  # the package itself is not needed any more
        done = fresh(sys.executable, "-c", RELOAD, tmp_path / "out", how, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        logits.append(torch.tensor(json.loads(done.stdout)))
    assert torch.allclose(*logits, atol=1e-6)


@pytest.mark.slow
def test_the_commands_list_what_is_installed(installed: Path) -> None:
    listed = json.loads(secateur("methods", "--json", path=installed))["least-added"]
    assert listed["options"].keys() == {"norm", "protect"}
    shown = secateur("prune", "--help", path=installed)
    assert "--protect" in shown
    assert "least-added: how a vector is measured" in re.sub(r"[│\s]+", " ", shown)
    assert "--protect" not in secateur("prune", "--help")


BROKEN = {
    "gone": "import no_such_module",
    "stops": "raise SystemExit",
    "ours": "from secateur.methods import get_method, method\nmethod({facts}, '2ssp')(get_method('shortgpt').prune)",
    "shadow": '''
def prune(model, tokens, budget, run, *, data: int = 1, round_to: int = 1, order: bool = False):
    """Do it.

    Args:
        data: an option of the command's, too.
        round_to: another.
        order: a word in other methods.
    """
    yield
method({facts}, 'shadow')(prune)
''',
}


@pytest.mark.slow
def test_a_broken_package_is_told_and_stops_no_command(tmp_path: Path) -> None:
    facts = "**dict(paper='p', unit='u', samples=1, length=2, bibtex='@b', edits=())"
    head = "from secateur.methods import method\n"
    for name, code in BROKEN.items():
        code = code.replace("{facts}, '2ssp'", f"'2ssp', {facts}").replace("{facts}, 'shadow'", f"'shadow', {facts}")
        (tmp_path / f"broken_{name}.py").write_text(head + code)
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    for group in ("methods", "families"):
        entries = "".join(f"{name} = broken_{name}\n" for name in BROKEN if name != "shadow" or group == "methods")
        with (info / "entry_points.txt").open("a") as file:
            file.write(f"[secateur.{group}]\n{entries}")
    command, told = (sys.executable, "-c", "from secateur.cli import main; main()"), {}
    for words in (("methods",), ("prune", "--help"), ("inspect", write_model(tmp_path / "model"))):
        done = fresh(*command, *words, path=tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
        told[words[0]] = done.stderr
    modules = ("broken_gone", "broken_stops", "broken_ours")
    assert [[module in shown for module in modules] for shown in told.values()] == [[True] * 3] * 3
    assert all(f"'{option}' of shadow" in told["prune"] for option in ("data", "round_to", "order"))


@pytest.mark.slow
def test_the_packages_own_tests_pass(installed: Path) -> None:
    done = fresh(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_contract.py", path=installed, cwd=PLUGIN
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_shows_the_package_as_it_is() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = {block.strip() for block in re.findall(r"^```\w+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)}
    files = [PLUGIN / "pyproject.toml", *sorted(PLUGIN.rglob("*.py"))]
    assert [str(file) for file in files if file.read_text().strip() not in shown] == [
        str(PLUGIN / "secateur_example" / "__init__.py")
    ]
