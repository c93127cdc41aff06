"""Every way to load a checkpoint, each in a process of its own: with secateur, with remote code, and with neither.

The processes are offline and nobody answers their questions. They report as JSON, and the tests read the reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS_OF_FAMILY
from models import LAYOUTS, REBASABLE, STREAM_LAYOUTS, logits, tiny_in, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur import load
from secateur.export import save
from secateur.hf import quiet_transformers
from secateur.model import modeling_secateur
from secateur.model.modeling_secateur import FAMILIES

pytestmark = pytest.mark.slow  # a process for each way, each of which imports torch
MODELING = Path(modeling_secateur.__file__)
ALL = (*LAYOUTS, *STREAM_LAYOUTS)
KINDS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
FEW = ("block 0 without attention", "one KV group fewer", "all MLPs missing", "everything")

MORE = ("everything", *STREAM_LAYOUTS)  # of which all is tried
NO_HEAD_OR_ANOTHER = ("AutoModel", *(f"AutoModelFor{kind}" for kind in KINDS))

COMMON = """
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
manifest = json.loads((folder / "manifest.json").read_text())
report = {}


def attempt(load):
    # The logits of what was loaded, or what was raised.
    try:
        return logits(load())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def logits(model):
    # Of a model without a head: its hidden states.
    ids = torch.tensor(manifest["ids"])
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False)[0]


def finish():
    tensors = {name: value.clone() for name, value in report.items() if not isinstance(value, str)}
    save_file(tensors, folder / sys.argv[2])
    refusals = {name: value for name, value in report.items() if isinstance(value, str)}
    (folder / sys.argv[2]).with_suffix(".json").write_text(json.dumps(refusals))
"""

WITH_SECATEUR = (
    COMMON
    + """
import secateur  # the one line that the card asks for
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
for name in manifest["loaded"]:
    report[name] = attempt(lambda: AutoModelForCausalLM.from_pretrained(folder / name))
for name in manifest["more"]:
    report[name + "/base"] = attempt(lambda: AutoModel.from_pretrained(folder / name))
    report[name + "/unpickled"] = attempt(lambda: torch.load(folder / f"{name}.pt", weights_only=False))
finish()
"""
)

WITHOUT_SECATEUR = (
    COMMON
    + """
import importlib.abc


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "secateur":
            raise ModuleNotFoundError("No module named 'secateur'", name="secateur")


sys.meta_path.insert(0, NotInstalled())

import copy
import pickle

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as LABELLED

def own_type(name):
    return json.loads((folder / name / "config.json").read_text())["model_type"].removeprefix("secateur-")

HEADS = AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering
torch.set_num_threads(1)
for name in manifest["mixed"]:  # first with neither secateur nor trust: nothing of ours is in the process yet
    path, own = folder / name, getattr(transformers, manifest["own_class"][name])
    report[name + "/auto config"] = attempt(lambda: AutoConfig.from_pretrained(path))
    report[name + "/auto"] = attempt(lambda: AutoModelForCausalLM.from_pretrained(path))
    report[name + "/own"] = attempt(lambda: own.from_pretrained(path))
    # As versions of transformers do that know nothing of `per_layer_config` and read the whole configuration.
    entries = json.loads((path / "config.json").read_text())
    naive = {key: value for key, value in entries.items() if key not in ("per_layer_config", "model_type")}
    report[name + "/naive"] = attempt(lambda: own.from_pretrained(path, config=own.config_class(**naive)))
    report[name + "/forced"] = attempt(
        lambda: own.from_pretrained(path, config=own.config_class(**naive), ignore_mismatched_sizes=True)
    )
for name in manifest["more"]:
    base = AutoModel._model_mapping[getattr(transformers, manifest["own_class"][name]).config_class]
    report[name + "/own base"] = attempt(lambda: base.from_pretrained(folder / name))
    for head in HEADS:
        report[name + "/" + head.__name__] = attempt(lambda: head.from_pretrained(folder / name))
for name in manifest["stock"]:
    own = getattr(transformers, manifest["own_class"][name])
    report[name + "/stock"] = attempt(lambda: AutoModelForCausalLM.from_pretrained(folder / name))
    report[name + "/own stock"] = attempt(lambda: own.from_pretrained(folder / name))
for name in manifest["loaded"]:
    remote = attempt(lambda: AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True))
    report[name + "/remote"] = remote
for name in manifest["more"]:
    report[name + "/base"] = attempt(lambda: AutoModel.from_pretrained(folder / name, trust_remote_code=True))
    report[name + "/answers"] = attempt(
        lambda: AutoModelForQuestionAnswering.from_pretrained(folder / name, trust_remote_code=True)
    )
for name in manifest["saved_again"]:
    model = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
    model.save_pretrained(folder / "again" / name)
    report[name + "/copied"] = attempt(lambda: pickle.loads(pickle.dumps(copy.deepcopy(model))))
    for trust in (False, True):  # a tokenizer is no code of ours
        tokenizer = AutoTokenizer.from_pretrained(folder / name, trust_remote_code=trust)
        report[f"{name}/text {trust}"] = tokenizer.decode(tokenizer("Hello!")["input_ids"])
    if own_type(name) in LABELLED:  # transformers has no such class for every family
        classifier = AutoModelForSequenceClassification.from_pretrained(
            folder / name, trust_remote_code=True, num_labels=3, pad_token_id=0
        )
        classifier.save_pretrained(folder / "labels" / name)
        report[name + "/labels"] = logits(classifier)
        report[name + "/labels again"] = attempt(
            lambda: AutoModelForSequenceClassification.from_pretrained(folder / "labels" / name, trust_remote_code=True)
        )
    report[name + "/again"] = attempt(
        lambda: AutoModelForCausalLM.from_pretrained(folder / "again" / name, trust_remote_code=True)
    )
    prompt = torch.tensor(manifest["ids"])
    report[name + "/generated"] = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0).float()
assert not any(name.partition(".")[0] == "secateur" for name in sys.modules)
finish()
"""
)


class Checkpoints:
    """A folder of checkpoints and what their logits are. All will be tried, those of the `loaded` layouts loaded."""

    def __init__(self, folder: Path, layouts: list[tuple[str, str]], loaded: tuple[str, ...]) -> None:
        self.folder = folder
        self.ids = torch.randint(5, 97, (2, 12), generator=torch.Generator().manual_seed(3))
        self.expected: dict[str, torch.Tensor] = {}
        names: dict[str, list[str]] = {"A": [], "B": []}
        own_class: dict[str, str] = {}
        for family, layout in layouts:
            name = f"{family}-{ALL.index(layout)}"
            model = tiny_in(layout, family)
            model.tokenizer = tiny_tokenizer() if layout == "everything" else None
            names[save(model, folder / name)].append(name)
            self.expected[name] = logits(model, self.ids)
            with torch.no_grad():
                self.expected[name + "/base"] = model.hf.base_model(input_ids=self.ids).last_hidden_state
            if layout in MORE:
                torch.save(model.hf, folder / f"{name}.pt")
            own_class[name] = type(model.hf).__mro__[2].__name__
        self.stock, self.mixed = names["A"], names["B"]
        self.loaded = [name for name in self.mixed if ALL[int(name.partition("-")[2])] in loaded]
        self.saved_again = [name for name in self.mixed if ALL[int(name.partition("-")[2])] == "everything"]
        self.more = [name for name in self.loaded if ALL[int(name.partition("-")[2])] in MORE]
        lists = {
            "more": self.more,
            "mixed": self.mixed,
            "stock": self.stock,
            "loaded": self.loaded,
            "saved_again": self.saved_again,
        }
        manifest = {"ids": self.ids.tolist(), "own_class": own_class, **lists}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        self.with_secateur, self.without_secateur = (
            self._run(code, name) for name, code in (("with", WITH_SECATEUR), ("without", WITHOUT_SECATEUR))
        )

    def _run(self, code: str, name: str) -> Report:
        own = {"HF_MODULES_CACHE": str(self.folder / "modules"), "HF_HOME": str(self.folder / "home")}
        done = subprocess.run(
            [sys.executable, "-c", code, str(self.folder), f"{name}.safetensors"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, cwd=self.folder,
            env={**os.environ, **own, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Report(self, self.folder / name, done.stderr)


class Report:
    """What one process found: logits or a refusal, per checkpoint and attempt."""

    def __init__(self, checkpoints: Checkpoints, path: Path, errors: str) -> None:
        self.checkpoints = checkpoints
        self.logits = load_file(path.with_suffix(".safetensors"))
        self.refusals: dict[str, str] = json.loads(path.with_suffix(".json").read_text())
        self.errors = errors

    def assert_right(self, names: list[str], attempt: str = "") -> None:
        assert names
        for name in names:
            assert name + attempt in self.logits, self.refusals[name + attempt]
            expected = self.checkpoints.expected[name + "/base" if attempt == "/base" else name]
            assert torch.allclose(self.logits[name + attempt], expected, atol=1e-6), name

    def assert_refused(self, names: list[str], attempt: str, reason: str = "") -> None:
        assert names
        for name in names:
            assert name + attempt not in self.logits, f"{name}{attempt} was loaded"
            assert reason in self.refusals[name + attempt]


def assert_every_way(checkpoints: Checkpoints) -> None:
    """With secateur imported, or its code trusted, all load; with neither, only stock ones do.

    Nor by the family's own class, which ignores `model_type`: never a model with random weights in it.
    """
    ours, theirs = checkpoints.with_secateur, checkpoints.without_secateur
    ours.assert_right(checkpoints.loaded)
    ours.assert_right(checkpoints.more, "/base")
    ours.assert_right(checkpoints.more, "/unpickled")
    assert "newly initialized" not in ours.errors
    theirs.assert_right(checkpoints.loaded, "/remote")
    theirs.assert_right(checkpoints.more, "/base")
    theirs.assert_refused(checkpoints.more, "/answers", "Unrecognized configuration class")
    theirs.assert_right(checkpoints.stock, "/stock")
    theirs.assert_right(checkpoints.stock, "/own stock")
    for attempt in ("/auto config", "/auto"):
        theirs.assert_refused(checkpoints.mixed, attempt, "trust_remote_code")
    for attempt in NO_HEAD_OR_ANOTHER:
        theirs.assert_refused(checkpoints.more, f"/{attempt}", "trust_remote_code")
    for attempt in ("/own", "/naive", "/forced"):
        theirs.assert_refused(checkpoints.mixed, attempt)
    theirs.assert_refused(checkpoints.more, "/own base")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    chosen = [("llama", layout) for layout in (*FEW, "one KV group each", "sliced stream")]
    chosen += [(family, "everything") for family in KINDS_OF_FAMILY[1:]]
    chosen += [(family, "blocks dropped") for family in KINDS_OF_FAMILY]
    chosen += [("qwen3", "sliced stream and more")]  # the one with a tied head
    loaded = ("everything", "nothing left but norms", *STREAM_LAYOUTS)
    return Checkpoints(tmp_path_factory.mktemp("few"), chosen, loaded)


def test_every_kind_of_family_loads_in_every_way(checkpoints: Checkpoints) -> None:
    for names in (checkpoints.mixed, checkpoints.stock, checkpoints.loaded, checkpoints.saved_again):
        assert {name.partition("-")[0] for name in names} >= set(KINDS_OF_FAMILY)
    assert_every_way(checkpoints)


def test_the_modeling_file_is_carried_along(checkpoints: Checkpoints) -> None:
    """Saved by `save_pretrained` of a model that its own code made, it loads again, everywhere."""
    theirs = checkpoints.without_secateur
    theirs.assert_right(checkpoints.saved_again, "/again")
    theirs.assert_right(checkpoints.saved_again, "/copied")
    for name in checkpoints.saved_again:
        again = checkpoints.folder / "again" / name
        assert (again / MODELING.name).read_bytes() == MODELING.read_bytes()
        assert torch.equal(logits(load(str(again)), checkpoints.ids), checkpoints.expected[name])
        assert [theirs.refusals[f"{name}/text {trust}"] for trust in (False, True)] == ["Hello!", "Hello!"]
        assert torch.equal(theirs.logits[name + "/labels again"], theirs.logits[name + "/labels"])
        hf = load(str(checkpoints.folder / name)).hf  # generation needs no secateur either
        ours = hf.generate(checkpoints.ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(theirs.logits[name + "/generated"].long(), ours)


def test_the_checkpoints_code_is_not_run_when_secateur_is_there(checkpoints: Checkpoints) -> None:
    """Even if trusted: the package has the same classes, and its own stand-ins for missing modules."""
    folder = checkpoints.folder / checkpoints.saved_again[0]
    with quiet_transformers():
        hf: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(hf).__module__ == type(hf.config).__module__ == modeling_secateur.__name__


def test_all_modes_hold_for_every_layout_of_every_family(tmp_path: Path) -> None:
    every = [(family, layout) for family in FAMILIES for layout in LAYOUTS]
    every += [(family, layout) for family in REBASABLE for layout in STREAM_LAYOUTS]
    assert_every_way(Checkpoints(tmp_path, every, ALL))
