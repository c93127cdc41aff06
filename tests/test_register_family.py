"""Families that other packages add: registered, pruned, and loaded where nobody knows them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from models import apply_all, layouts, logits, stream_layouts, tiny_tokens
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from secateur import Family, Model, load, register_family
from secateur.errors import CheckpointError, InvalidOptionError, NameTakenError, UnsupportedModelError
from secateur.export import save
from secateur.model import family_plugins
from secateur.model.modeling_secateur import FAMILIES, ROW

HELIUM = Family(model_type="helium", no_rebase=None)
STARCODER = Family(
    model_type="starcoder2", mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj", no_rebase="its norm has a bias",
    requires={"use_bias": True},
)  # fmt: skip


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def foreign(row: Family, **settings: Any) -> Any:
    """A small stock model of a family that secateur does not have."""
    config = CONFIG_MAPPING[row.model_type](
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("row", "layout"), [(HELIUM, "everything"), (HELIUM, "sliced stream and more"), (STARCODER, "everything")]
)
def test_its_models_are_pruned_and_load_where_nobody_knows_them(row: Family, layout: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=row.model_type):
        Model(foreign(row))
    register_family(row)
    register_family(row)  # once more does no harm
    model = Model(foreign(row))
    apply_all(model, {**layouts(model), **(stream_layouts(model) if row.no_rebase is None else {})}[layout])
    assert model.hollow().layout() == model.layout()
    assert save(model, tmp_path / "pruned") == "B"
    del FAMILIES[row.model_type]
    for again in (load(str(tmp_path / "pruned")), load(str(tmp_path / "pruned")).hollow()):
        assert (again.family, again.layout().parameters) == (row, model.layout().parameters)
    ids = tiny_tokens(model, 2, 9).ids
    assert torch.equal(logits(load(str(tmp_path / "pruned")), ids), logits(model, ids))
    again = load(str(tmp_path / "pruned"))
    again.hf.save_pretrained(tmp_path / "again")
    assert load(str(tmp_path / "again")).fingerprint() == again.fingerprint()


def test_a_stock_layout_is_saved_without_a_row(tmp_path: Path) -> None:
    register_family(HELIUM)
    model = Model(foreign(HELIUM))
    assert save(apply_all(model, layouts(model)["blocks dropped"]), tmp_path / "stock") == "A"
    assert ROW not in json.loads((tmp_path / "stock" / "config.json").read_text())


def test_a_name_has_one_row() -> None:
    with pytest.raises(NameTakenError, match="another family 'llama'"):
        register_family(Family(model_type="llama", out="self_attn.dense"))
    assert FAMILIES["llama"].out == "self_attn.o_proj"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "helium", "out": "self_attn.__class__"}, "out is the dotted path of a module"),
    ({"model_type": "helium", "width": "exec('x')"}, "width is the name of an attribute"),
    ({"model_type": "helium", "counts": {"config._attn": "kv_heads"}}, "counts is attributes with"),
    ({"model_type": "helium", "counts": {"heads": "heads"}}, "counts is attributes with"),
    ({"model_type": "helium", "qkv": ["self_attn.qkv"]}, "'separate' does not go with 1 projection"),
    ({"model_type": "helium", "qkv": "self_attn.q_proj"}, "qkv is the paths of"),
    ({"model_type": "helium", "no_rebase": None, "mlp_norms": []}, "one norm before each module"),
    ({"model_type": "helium", "requires": {"a": [1]}}, "requires is settings with their values"),
    ({"model_type": "helium", "default_width": "4"}, "default_width is a whole number"),
    ({"model_type": "../helium"}, "model_type is a model_type of transformers"),
    ({"model_type": "helium", "forward": "x"}, "has no 'forward'; it has model_type"),
    ({"out": "x"}, "names its model_type"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model of a family that was there when it was saved; to be copied."""
    folder = tmp_path_factory.mktemp("helium") / "pruned"
    register_family(HELIUM)
    try:
        model = Model(foreign(HELIUM))
        save(apply_all(model, layouts(model)["everything"]), folder)
    finally:
        del FAMILIES[HELIUM.model_type]
    return folder


@pytest.mark.parametrize(("row", "message"), [*BAD, ("helium", "is an object")])
def test_a_row_holds_names_and_paths_only(row: Any, message: str, written: Path, tmp_path: Path) -> None:
    """Whoever wrote it: a package here, or a checkpoint from anywhere."""
    register_family(HELIUM)
    shutil.copytree(written, tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    (tmp_path / "pruned" / "config.json").write_text(json.dumps({**config, ROW: row}))
    with pytest.raises(CheckpointError, match=message):
        load(str(tmp_path / "pruned"))
    if "has" not in message and "names its" not in message and "object" not in message:
        with pytest.raises(InvalidOptionError, match=message):
            register_family(Family(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}))


def test_a_checkpoint_describes_its_own_family(tmp_path: Path) -> None:
    register_family(HELIUM)
    model = Model(foreign(HELIUM))
    save(apply_all(model, layouts(model)["everything"]), tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config[ROW] == {"model_type": "helium", "no_rebase": None}
    (tmp_path / "pruned" / "config.json").write_text(json.dumps({**config, ROW: {"model_type": "olmo"}}))
    with pytest.raises(CheckpointError, match="names secateur-helium and describes the family olmo"):
        load(str(tmp_path / "pruned"))


def test_transformers_must_have_its_class() -> None:
    with pytest.raises(InvalidOptionError, match="no causal language model of type 'no-such'"):
        register_family(Family(model_type="no-such"))


def test_installed_packages_bring_theirs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A broken one is told of and left out; the others come through."""
    (tmp_path / "others.py").write_text(
        "from secateur import Family\n"
        "ONE = Family(model_type='helium')\n"
        "SEVERAL = [Family(model_type='starcoder2', mlp_in=('mlp.c_fc',), mlp_out='mlp.c_proj')]\n"
        "TAKEN = Family(model_type='llama', out='x')\n"
        "NONE = 3\n"
    )
    names = {"one": "ONE", "several": "SEVERAL", "taken": "TAKEN", "none": "NONE", "missing": "MISSING"}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        family_plugins, "entry_points",
        lambda group: [EntryPoint(name, f"others:{value}", group) for name, value in names.items()],
    )  # fmt: skip
    family_plugins.register_all()
    assert {"helium", "starcoder2"} < FAMILIES.keys()
    told = [record.getMessage() for record in caplog.records]
    assert [message.split("'")[1] for message in told] == ["taken", "none", "missing"]
    assert all("others:" in message for message in told)
