"""Texts by name and by path: joining, order of places, errors that help, hub and saved data sets."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from secateur.assets import Text, read_text, text_names
from secateur.assets.catalog import CATALOG
from secateur.errors import DataError, FetchError, MissingExtraError, UnknownNameError

SHARED = Path(__file__).parents[2] / "shared" / "data"
WIKI = " \n = Title = \n \n One\u2028sentence\x85. \n"
WIKI_JOINED = "\n\n = Title = \n\n\n\n\n One\u2028sentence\x85. \n"
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECATEUR_DATA", "SECATEUR_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path) -> Text:
    return read_text(str(path), purpose="calibration")


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def plain(text: Text) -> str:
    assert text.text is not None
    assert text.conversations is None
    return text.text


# --- local files ---


def test_plain_files_are_taken_as_they_are_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    content = " \n = Title =\r\n\n\nzwölf\u2028x\n"
    for suffix in (".txt", ".raw", ".md"):
        text = read(write(tmp_path / f"a{suffix}", content))
        assert plain(text) == content
        assert text.provenance["path"] == str(tmp_path / f"a{suffix}")
        assert text.provenance["sha256"] == hashlib.sha256(content.encode()).hexdigest()
    for name, marked in (("b.txt", b"\xef\xbb\xbfword"), ("b.jsonl", b'\xef\xbb\xbf{"text": "word"}')):
        assert plain(read(write(tmp_path / name, marked))) == "word"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_documents_are_joined_by_a_blank_line(tmp_path: Path, suffix: str) -> None:
    content = lines({"text": "one\n", "url": "x"}, {"text": "two"}) + "\n"
    text = read(write(tmp_path / f"a{suffix}", content.replace("\n", "\r\n")))
    assert (plain(text), text.provenance["documents"]) == ("one\n\n\ntwo", "2")


def test_chat_lines_become_conversations(tmp_path: Path) -> None:
    extra = [{**CHAT[0], "name": "Ann"}, CHAT[1]]
    text = read(write(tmp_path / "a.jsonl", lines({"messages": CHAT}, {"messages": extra})))
    assert text.text is None
    assert text.conversations == (CHAT, CHAT)
    assert json.loads(json.dumps(dict(text.provenance))) == text.provenance


def test_instructions_are_documents_of_prompt_and_output(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Say hello.", "output": "Hello!"},
    ]  # fmt: skip
    content = plain(read(write(tmp_path / "a.jsonl", lines(*rows))))
    one, two = content.split("\n\nBelow is an instruction")
    assert one.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3")
    assert two.endswith("### Instruction:\nSay hello.\n\n### Response:\nHello!")
    with_text = [{**row, "text": "whole"} for row in rows]  # as Stanford's own files have it
    assert plain(read(write(tmp_path / "b.jsonl", lines(*with_text)))) == "whole\n\nwhole"


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    "rows",
    [[{"text": "one", "n": 1}, {"text": "two", "n": 2}], [{"messages": CHAT}],
     [{"instruction": "one", "input": "", "output": "two", "n": 1}]],
)  # fmt: skip
def test_parquet_gives_what_json_lines_give(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    table, flat = read(write_parquet(tmp_path / "a.parquet", rows)), read(write(tmp_path / "a.jsonl", lines(*rows)))
    assert (table.text, table.conversations) == (flat.text, flat.conversations)
    assert table.provenance["text_sha256"] == flat.provenance["text_sha256"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [([{"body": "x", "n": 1}], "columns: body, n.*--text-field"), ([{"input": "x", "output": "y"}], "`instruction`"),
     ([{"text": "one"}, {"text": None}], "row 2"), ([{"messages": [{"role": "user"}]}], "row 1"),
     ([{"text": "one", "messages": CHAT}], "both")],
)  # fmt: skip
def test_wrong_parquet_is_refused(tmp_path: Path, rows: list[Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=rf"a\.parquet.*{says}"):
        read(file)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"secateur\[data\]"):
        read(file)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t\n", "empty"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.jsonl", b'{"text": " "}\n', "empty"),
        ("a.txt", b"good\ngood\nb\xe4d\n", "line 3.*UTF-8"),
        ("a.txt", "wide".encode("utf-16"), "line 1.*UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3.*JSON"),
        ("a.json", b'{\n "text": "a"\n},\n', "line 1.*every line"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2.*columns: body.*--text-field"),
        ("a.jsonl", b'{"instruction": "a"}\n', "line 1.*columns: instruction"),
        ("a.jsonl", b'{"text": "a", "messages": [{"role": "user", "content": "b"}]}\n', "line 1.*both"),
        ("a.jsonl", b'{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n', "line 2.*mix"),
        ("a.jsonl", b'{"text": 3}\n', "line 1.*`str`.*text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1.*surrogate"),
        ("a.jsonl", b'{"messages": []}\n', "line 1.*length >= 1.*messages"),
        ("a.jsonl", b'{"messages": "hello"}\n', "line 1.*array.*messages"),
        ("a.jsonl", b'{"messages": ["hello"]}\n', r"line 1.*object.*messages\[0\]"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": null}]}\n', "line 1.*message 1.*content"),
        ("a.parquet", b"not parquet", "Parquet"),
        ("a.doc", b"text\nhello\n", r"unknown kind.*\.txt.*\.parquet"),
    ],
)
def test_a_file_that_will_not_do_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=says) as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_missing_files_and_unknown_names_differ(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "folder.txt" / "x", "x").parent)
    for name, purpose, error, says in (
        (str(tmp_path / "a.txt"), "evaluation", DataError, "no file"),
        ("typo.txt", "evaluation", DataError, "no file"),
        (folder, "evaluation", DataError, "is a folder"),
        (str(tmp_path), "evaluation", DataError, "is a folder"),
        ("owner/name", "evaluation", DataError, "no file"),
        ("wikitext", "evaluation", UnknownNameError, r"Did you mean 'wikitext2'.*\.jsonl"),
        ("c4", "evaluate", UnknownNameError, "Did you mean 'evaluation'"),
    ):
        with pytest.raises(error, match=says):
            read_text(name, purpose=purpose)  # type: ignore[arg-type]  # of a list


# --- a data folder ---


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write(folder / "c4/c4_train_shard00000_first1000.jsonl", lines({"text": "train a"}, {"text": "train b"}))
    write(folder / "c4/c4_validation_2000.jsonl", lines({"text": "validation"}))
    write(folder / "wikitext2/wiki.test.raw", WIKI)
    write(folder / "wikitext2/wiki.valid.raw", WIKI.replace("Title", "Valid"))
    write(folder / "fineweb_edu/fineweb_edu_sample_1MB.txt", "a\n\nb\n")
    return folder


@pytest.mark.parametrize(
    ("name", "purpose", "joined", "split"),
    [
        ("c4", "calibration", "train a\n\ntrain b", "train"),
        ("c4", "evaluation", "validation", "validation"),
        ("wikitext2", "calibration", WIKI_JOINED.replace("Title", "Valid"), "validation"),
        ("wikitext2", "evaluation", WIKI_JOINED, "test"),
        ("fineweb-edu", "calibration", "a\n\nb\n", "train"),
        ("fineweb-edu", "evaluation", "a\n\nb\n", "train"),
    ],
)
def test_known_texts_are_found_in_the_folder(data: Path, name: str, purpose: Any, joined: str, split: str) -> None:
    assert set(text_names()) == {"c4", "wikitext2", "fineweb-edu", "demo"}
    text = read_text(name, purpose=purpose, data=data)
    assert (plain(text), text.name) == (joined, name)
    facts = text.provenance
    assert (facts["split"], facts["licence"]) == (split, CATALOG.texts[name].licence)
    assert facts["sha256"] == hashlib.sha256(Path(facts["path"]).read_bytes()).hexdigest()
    assert facts["text_sha256"] == hashlib.sha256(joined.encode()).hexdigest()


def test_wikitext_train_is_preferred_and_line_ends_do_not_matter(data: Path) -> None:
    assert plain(read(data / "wikitext2/wiki.test.raw")) == WIKI  # a user's own raw file is not joined as WikiText
    write(data / "wikitext2/wiki.train.raw", WIKI.replace("\n", "\r\n"))
    text = read_text("wikitext2", purpose="calibration", data=data)
    assert (plain(text), text.provenance["split"]) == (WIKI_JOINED, "train")


def test_a_data_folder_is_asked_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the text it never leads to the hub; the environment may name it, too."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("SECATEUR_DATA", str(data))
    assert plain(read_text("c4", purpose="evaluation")) == "validation"
    (data / "wikitext2/wiki.valid.raw").unlink()
    with pytest.raises(DataError) as caught:
        read_text("wikitext2", purpose="calibration")
    places = ("wikitext2/wiki.train.raw", "wikitext2/wiki.valid.raw", "wikitext-2", "SECATEUR_DATA")
    assert [place for place in places if place not in str(caught.value)] == []
    for wrong, says in ((data.parent, "--data"), (data / "nowhere", "no data folder")):
        with pytest.raises(DataError, match=says):
            read_text("c4", purpose="evaluation", data=wrong)


def test_wikitext_of_the_shared_data_is_the_papers_text() -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared data is not on this machine")
    raw = SHARED / "wikitext2" / "wiki.test.raw"
    text = read_text("wikitext2", purpose="evaluation", data=SHARED)
    with raw.open(encoding="utf-8", newline="\n") as file:
        rows = [row if row.strip() else "" for row in file]
    assert len(rows) == 4358
    assert plain(text) == "\n\n".join(rows)
    # 304,986 tokens of SmolLM2: seen once with the demo tokenizer, and the count of the reference.
    assert len(plain(text)) == 1_294_336
    assert text.provenance["text_sha256"].startswith("696cca6b65a171b0")
    assert text.provenance["sha256"].startswith("173c87a53759e020")


# --- data sets saved to disk ---


def save(folder: Path, rows: dict[str, list[str]] | list[str], split: str | None = None) -> None:
    datasets = pytest.importorskip("datasets")
    if isinstance(rows, dict):
        saved = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in rows.items()})
    else:
        saved = datasets.Dataset.from_dict({"text": rows}, split=split)
    datasets.disable_progress_bars()
    saved.save_to_disk(str(folder))
    datasets.enable_progress_bars()


def test_saved_data_sets_are_read_by_split(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = ["", " = Title = \n", "", " One\u2028sentence\x85. \n"]  # as the hub has them
    save(tmp_path / "wikitext-2", {"test": rows, "validation": ["valid\n"]})
    save(tmp_path / "c4_train", [f"document {n}" for n in range(1002)], "train")
    save(tmp_path / "c4_val", ["validation"], "train")
    save(tmp_path / "fineweb-edu", ["edu"])
    capfd.readouterr()
    wiki = read_text("wikitext2", purpose="evaluation", data=tmp_path)
    assert (plain(wiki), wiki.provenance["split"]) == (WIKI_JOINED, "test")
    assert plain(read_text("wikitext2", purpose="calibration", data=tmp_path)) == "valid\n"
    c4 = read_text("c4", purpose="calibration", data=tmp_path)
    assert plain(c4).endswith("document 999")
    assert c4.provenance["documents"] == "1000"
    assert plain(read_text("c4", purpose="evaluation", data=tmp_path)) == "validation"
    edu = read_text("fineweb-edu", purpose="evaluation", data=tmp_path)
    assert (plain(edu), "split" in edu.provenance) == ("edu", False)
    assert capfd.readouterr() == ("", "")


def test_a_saved_data_set_of_another_split_or_kind_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "wikitext-2", ["row\n"], "test")
    with pytest.raises(DataError, match=r"'test'.*'train' or 'validation'"):
        read_text("wikitext2", purpose="calibration", data=tmp_path)
    save(tmp_path / "c4_train", {"test": ["row"]})
    with pytest.raises(DataError, match="splits test; 'train'"):
        read_text("c4", purpose="calibration", data=tmp_path)
    write(tmp_path / "c4_val" / "notes", "x")
    with pytest.raises(DataError, match="save_to_disk"):
        read_text("c4", purpose="evaluation", data=tmp_path)


# --- the hub ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for `datasets`, with one data set of 3000 rows."""
    rows = ({"text": f"document {number}"} for number in range(3000))
    fake = Mock(load_dataset=Mock(return_value=rows), are_progress_bars_disabled=Mock(return_value=False))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def assert_quiet(hub: Mock) -> None:
    names = [name for name, *_ in hub.method_calls if name != "are_progress_bars_disabled"]
    assert names == ["disable_progress_bars", "load_dataset", "enable_progress_bars"]


@pytest.mark.parametrize(
    ("name", "purpose", "count"),
    [("c4", "calibration", 1000), ("c4", "evaluation", 1100), ("fineweb-edu", "evaluation", 500),
     ("wikitext2", "evaluation", 3000)],
)  # fmt: skip
def test_the_hub_is_read_at_the_pinned_commit(hub: Mock, name: str, purpose: Any, count: int) -> None:
    text = read_text(name, purpose=purpose, data=None)
    known, place = CATALOG.texts[name], CATALOG.texts[name].place(purpose)
    args, kwargs = hub.load_dataset.call_args
    assert args == (known.repository, known.config)
    assert kwargs == {
        "revision": known.revision, "split": place.splits[0],
        "data_files": {place.splits[0]: place.data_file} if name == "c4" else None,
        "streaming": place.documents is not None,
    }  # fmt: skip
    assert text.provenance["revision"] == kwargs["revision"]
    assert text.provenance["repository"] == known.repository
    assert plain(text).endswith(f"document {count - 1}")
    assert len(list(hub.load_dataset.return_value)) == 3000 - count  # a stream was read no further
    assert_quiet(hub)
    assert all(isinstance(value, str) for value in text.provenance.values())


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"secateur\[data\]"):
        read_text("c4", purpose="calibration")


@pytest.mark.parametrize(
    ("error", "says"),
    [("GatedRepoError", "gated.*licence at https://huggingface.co/datasets/allenai/c4.*hf auth login"),
     ("RepositoryNotFoundError", "hub has no allenai/c4.*HF_TOKEN"),
     ("RevisionNotFoundError", "allenai/c4 has no revision"),
     (ConnectionError("Couldn't reach 'allenai/c4' on the Hub (OfflineModeIsEnabled)"), "HF_HUB_OFFLINE.*demo"),
     (ConnectionError("Name or service not known"), "network.*--data.*Name or service not known"),
     (TimeoutError("timed out"), "network.*timed out")],
    ids=str,
)  # fmt: skip
def test_hub_errors_name_the_way_out(hub: Mock, error: str | Exception, says: str) -> None:
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    raised = getattr(errors, error)("its words", response=response) if isinstance(error, str) else error
    hub.load_dataset.side_effect = raised
    with pytest.raises(FetchError, match=says):
        read_text("c4", purpose="calibration")
    assert_quiet(hub)
