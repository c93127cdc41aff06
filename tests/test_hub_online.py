"""Models and texts of the hub: a stand-in on loopback serves them, refuses them or drops them; see `hub_server`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import OUTSIDER, TOKEN, Client, Hub, Repository
from models import tiny, tiny_tokens
from oracles import write_model, write_texts
from test_cli import call
from transformers import AutoModelForCausalLM

import secateur
from secateur.assets.catalog import CATALOG
from secateur.errors import FetchError, InvalidOptionError
from secateur.model.coerce import borrowed
from secateur.output import save
from secateur.record import RECORD

pytestmark = pytest.mark.slow
OLD, NEW = "a" * 40, "b" * 40
TEXT = CATALOG.texts["wikitext2"]
UNKNOWN_TOKEN = "hf_revoked"
WEIGHTS = "model.safetensors"
WORDS = ("--method", "2ssp", "--sparsity", 0.4, "--samples", 3, "--length", 16)
FAULTS: dict[str, int | str] = {
    "config.json": 503, WEIGHTS: "cut", RECORD: 503, "SHA256SUMS": 502,
    "tokenizer.json": "cut", "tokenizer_config.json": 500,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What lies on the hub, and a text to calibrate on."""
    place = tmp_path_factory.mktemp("hub")
    folders = {"old": write_model(place / "old"), "new": write_model(place / "new", "gpt2"), "pruned": place / "pruned"}
    model = secateur.load(str(folders["old"]))
    save(
        secateur.prune(model, "2ssp", sparsity=0.3, calibration=tiny_tokens(model, 3, 8), stage1_only=True),
        folders["pruned"],
    )
    (folders["new"] / "LICENSE").write_text("Be kind.")
    (place / "pickle").mkdir()
    for name, content in (("config.json", (folders["old"] / "config.json").read_bytes()), ("pytorch_model.bin", b"0")):
        (place / "pickle" / name).write_bytes(content)
    (place / "consolidated").mkdir()
    (place / "consolidated" / "config.json").write_bytes((folders["old"] / "config.json").read_bytes())
    (place / "consolidated" / "consolidated.safetensors").write_bytes(b"0")
    files = {split: f"{TEXT.config}/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")}
    for split, name in files.items():
        (place / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        rows = [" = Title = \n", "", *[f" One sentence of {split} . \n"] * 200]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), place / "text" / name)
    card = "".join(f"  - split: {split}\n    path: {name}\n" for split, name in files.items())
    (place / "text" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {TEXT.config}\n  data_files:\n{card}---\n"
    )
    folders |= {name: place / name for name in ("pickle", "consolidated")}
    return folders | {"text": place / "text", "plain": write_texts(place)[0]}


@pytest.fixture(scope="module")
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    two = Repository({OLD: folders["old"], NEW: folders["new"]}, {"main": OLD, "v2.0": NEW, "a/branch": NEW})

    def one(folder: str, access: str = "open", **faults: int | str) -> Repository:
        return Repository({OLD: folders[folder]}, {"main": OLD}, access, faults)

    with Hub() as hub:
        hub.repositories |= {
            "org/m": two, "org/gated": one("old", "gated"),
            "org/private": one("old", "private"), "org/pruned": one("pruned"),
            "org/pickle": one("pickle"), "org/consolidated": one("consolidated"),
            "org/licence": one("new", LICENSE=503),
            "org/no-right": one("old", **{WEIGHTS: 403}),
            **{f"org/fault-{name}": one("pruned", **{name: fault}) for name, fault in FAULTS.items()},
        }  # fmt: skip
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Client]:
    with Client(hub.endpoint, home) as client:
        yield client


@pytest.fixture
def offline(client: Client, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, which is offline as all tests are, has the client's cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))


def assert_loaded(answer: SimpleNamespace, folder: Path) -> None:
    assert answer.error is None, answer.says
    assert answer.fingerprint == secateur.load(str(folder)).fingerprint()
    assert answer.tokenizer


@pytest.mark.parametrize(
    ("revision", "commit", "folder"),
    [(None, OLD, "old"), ("v2.0", NEW, "new"), ("a/branch", NEW, "new"), (NEW, NEW, "new")],
)
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    revision: str | None, commit: str, folder: str, client: Client, folders: dict[str, Path]
) -> None:
    answer = client.ask("load", "org/m", revision=revision)
    assert_loaded(answer, folders[folder])
    assert (answer.source["name"], answer.source["repository"], answer.source["revision"]) == ("org/m", "org/m", commit)


@pytest.mark.parametrize("revision", ["nope", NEW[:7], "c" * 40])
def test_an_unknown_revision_is_named(revision: str, client: Client) -> None:
    answer = client.ask("load", "org/m", revision=revision)
    assert answer.error == "FetchError"
    assert f"org/m has no revision '{revision}'" in answer.says
    shown = client.ask("run", "inspect", "org/m", "--revision", revision)
    assert shown.code == 3
    assert f"no revision '{revision}'" in shown.err


@pytest.mark.parametrize(
    ("name", "token", "says"),
    [
        ("org/gated", None, "is gated: accept its licence at https://huggingface.co/org/gated"),
        ("org/gated", OUTSIDER, "is gated: accept its licence at https://huggingface.co/org/gated"),
        ("org/gated", UNKNOWN_TOKEN, "does not know your token"),
        ("org/private", None, "has no org/private as it was asked for, or it is private"),
        ("org/private", OUTSIDER, "has no org/private as it was asked for, or it is private"),
        ("org/private", UNKNOWN_TOKEN, "does not know your token"),
        ("org/absent", None, "has no org/absent as it was asked for, or it is private"),
        ("org/absent-safetensors", TOKEN, "has no org/absent-safetensors as it was asked for, or it is private"),
        ("org/no-right", TOKEN, "your token needs the right to read it"),
    ],
)
def test_who_may_not_read_is_told_why(name: str, token: str | None, says: str, client: Client) -> None:
    answer = client.ask("load", name, token=token)
    assert answer.error == "FetchError"
    assert says in answer.says
    for other in ("is gated:", "it is private:", "does not know your token", "needs the right"):
        assert other in f"{says}:" or other not in answer.says


@pytest.mark.parametrize("name", ["org/gated", "org/private"])
def test_a_token_opens(name: str, client: Client, hub: Hub, folders: dict[str, Path]) -> None:
    hub.requests.clear()
    assert_loaded(client.ask("load", name, token=TOKEN), folders["old"])
    assert {token for _, _, token in hub.requests} == {TOKEN}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_the_hub_fails_to_give_is_no_file_that_is_not_there(
    name: str, client: Client, hub: Hub, folders: dict[str, Path]
) -> None:
    """Else a model would lose its history or its tokenizer, or be said to have no safetensors."""
    answer = client.ask("load", f"org/fault-{name}")
    assert answer.error == "FetchError"
    assert f"status {FAULTS[name]}" in answer.says or "check the network" in answer.says
    hub.repositories[f"org/fault-{name}"].faults.clear()
    answer = client.ask("load", f"org/fault-{name}")
    assert_loaded(answer, folders["pruned"])
    assert answer.parents == 1


@pytest.mark.parametrize(
    ("name", "says"), [("pickle", "pickles only"), ("consolidated", "has no .* or model.safetensors")]
)
def test_weights_in_no_file_that_is_read(name: str, says: str, client: Client) -> None:
    answer = client.ask("load", f"org/{name}")
    assert answer.error == "CheckpointError"
    assert re.search(says, answer.says)


def test_without_a_connection_and_offline_the_cache_serves(
    client: Client, hub: Hub, folders: dict[str, Path], offline: None
) -> None:
    online = client.ask("load", "org/pruned")
    with hub.away():
        answer = client.ask("load", "org/pruned")
        assert_loaded(answer, folders["pruned"])
        assert answer.parents == 1
        answer = client.ask("load", "org/never")
        assert answer.error == "FetchError"
        assert "check the network" in answer.says
    model = secateur.load("org/pruned")
    assert (model.fingerprint(), len(model.parents)) == (online.fingerprint, 1)
    for name, revision in (("org/never", None), ("org/pruned", "other")):
        with pytest.raises(FetchError, match=r"HF_HUB_OFFLINE is set"):
            secateur.load(name, revision=revision)


def test_record_and_card_have_name_and_commit(
    client: Client, home: Path, folders: dict[str, Path], tmp_path: Path, offline: None
) -> None:
    words = ("--calibration", folders["plain"], *WORDS)
    told = client.ask("run", "prune", "org/m", "--revision", "v2.0", *words, "--out", tmp_path / "hub")
    assert told.code == 0, told.err
    # the same out of the cache, by its folder
    snapshot = home / "hub" / "models--org--m" / "snapshots" / NEW
    assert call("prune", snapshot, *words, "--out", tmp_path / "snapshot").code == 0
    for out in (tmp_path / "hub", tmp_path / "snapshot"):
        record = json.loads((out / RECORD).read_text())
        assert {key: record["model"][key] for key in ("name", "source", "repository", "revision")} == {
            "name": "org/m", "source": "hub", "repository": "org/m", "revision": NEW,
        }  # fmt: skip
        assert str(home) not in (out / RECORD).read_text()
        card = (out / "README.md").read_text()
        assert "\nbase_model: org/m\n" in card
        assert "# org/m, pruned by" in card
        assert f"`{NEW}`" in card
        assert (out / "LICENSE").read_text() == "Be kind."
    with borrowed(AutoModelForCausalLM.from_pretrained(snapshot)) as adopted:
        assert (adopted.source["name"], adopted.source["revision"]) == ("org/m", NEW)
    with borrowed(AutoModelForCausalLM.from_pretrained("org/m", revision="v2.0")) as adopted:
        assert (adopted.source["repository"], adopted.tokenizer is not None) == ("org/m", True)
        assert "revision" not in adopted.source  # which is not known
    with pytest.raises(InvalidOptionError, match="leave the revision out"):
        secateur.load(str(snapshot), revision=OLD)


def test_a_licence_that_cannot_be_had_costs_no_pruning(
    client: Client, folders: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--calibration", folders["plain"], *WORDS, "--out", tmp_path / "out")
    told = client.ask("run", "prune", "org/licence", *words)
    assert told.code == 0
    assert "LICENSE is not handed on" in told.err
    assert not (tmp_path / "out" / "LICENSE").exists()
    assert secateur.load(str(tmp_path / "out")).tokenizer is not None


@pytest.mark.parametrize(
    ("repository", "says"),
    [
        (Repository({TEXT.revision: Path()}, {}, "private"), "or it is private"),
        (Repository({NEW: Path()}, {}), f"has no revision '{TEXT.revision}'"),
        (
            Repository({TEXT.revision: Path()}, {}, "gated"),
            "is gated: accept its licence at https://huggingface.co/datasets/",
        ),
    ],
)
def test_a_text_that_the_hub_refuses(repository: Repository, says: str, client: Client, hub: Hub) -> None:
    hub.repositories[f"datasets/{TEXT.repository}"] = repository
    answer = client.ask("text", "wikitext2")
    assert answer.error == "FetchError"
    assert says in answer.says


def test_a_text_of_the_hub(client: Client, hub: Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    hub.repositories[f"datasets/{TEXT.repository}"] = Repository(
        {TEXT.revision: folders["text"]}, {"main": TEXT.revision}
    )
    answer = client.ask("text", "wikitext2")
    assert answer.error is None, answer.says
    assert "One sentence of test ." in answer.text
    assert answer.facts["revision"] == TEXT.revision
    with hub.away():
        assert client.ask("text", "wikitext2").text == answer.text


def test_a_pruned_model_is_pushed_by_its_own_method_and_comes_back(client: Client, hub: Hub, tmp_path: Path) -> None:
    """`push_to_hub` is transformers', so what goes up is the model, its code and a plain card."""
    model, hub.uploads = tiny("llama"), tmp_path / "hub"
    tokens, mixed = tiny_tokens(model, 3, 8), tmp_path / "mixed"
    save(secateur.prune(model, "2ssp", sparsity=0.4, calibration=tokens, attentions=1), mixed)
    pushed = client.ask("push", mixed, "org/pushed", token=TOKEN)
    assert pushed.error is None, pushed.says
    repository = hub.repositories["org/pushed"]
    files = {path.name for path in repository.commits[repository.refs["main"]].iterdir()}
    assert {"config.json", WEIGHTS, "modeling_secateur.py", "README.md"} <= files
    fetched = client.ask("fetch", "org/pushed")
    assert fetched.error is None, fetched.says
    assert fetched.logits == pushed.logits
    loaded = client.ask("load", "org/pushed")
    assert loaded.fingerprint == secateur.load(str(mixed)).fingerprint()
