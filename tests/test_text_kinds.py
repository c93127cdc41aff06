"""Whatever text people have is read alike: every kind of file and column, packed or not, and what is in memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tiny_tokenizer
from test_cli import _own_world, call, world  # noqa: F401  # fixtures

import secateur
from secateur.assets import Text, read_text
from secateur.assets.files import kind_of
from secateur.engine.tokens import Tokens, read_tokens
from secateur.errors import DataError, InvalidOptionError, MissingExtraError, UnknownNameError
from secateur.judge.judging import Judging
from secateur.model.handle import Model

Rows = list[dict[str, Any]]

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good\nday"}]
SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good\nday"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "Good\nday"}]}]  # fmt: skip
RAGGED = [{**CHAT[0], "name": "Ann"}, {**CHAT[1], "weight": 1, "tools": ["x"]}]
TEXTS = ['0012, "so"', "NA", "2020-01-01", "zwölf\u2028\n\n\tend"]  # which readers that guess would change
FORMS: Mapping[str, tuple[Rows, list[str] | list[list[dict[str, str]]]]] = {  # rows, and what is to be read of them
    "text": ([{"text": text, "n": n} for n, text in enumerate(TEXTS)], TEXTS),
    "content": ([{"title": "T", "content": text} for text in TEXTS], TEXTS),
    "messages": ([{"messages": CHAT, "prompt": "Hello"}, {"messages": RAGGED}], [CHAT, CHAT]),
    "parts": ([{"messages": PARTS}], [CHAT]),
    "sharegpt": ([{"id": "1", "conversations": SHAREGPT}], [CHAT]),
    "sharegpt as messages": ([{"conversations": CHAT}], [CHAT]),
    "human": ([{"conversation": [{**CHAT[0], "role": "human"}, {**CHAT[1], "role": "gpt"}]}], [CHAT]),
    "alpaca": (
        [{"instruction": "Add.", "input": "1 and 2", "output": "3"}],
        ["Below is an instruction that describes a task, paired with an input that provides further context. Write a "
         "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
         "### Response:\n3"],
    ),
    "dolly": (
        [{"instruction": "Hi.", "context": "", "response": "Ho.", "category": "open"}],
        ["Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
         "### Instruction:\nHi.\n\n### Response:\nHo."],
    ),
    "prompt": ([{"prompt": "one ", "completion": "two"}], ["one two"]),
    "prompt of messages": ([{"prompt": CHAT[:1], "completion": CHAT[1:]}], [CHAT]),
}  # fmt: skip


def table(rows: Rows, delimiter: str) -> bytes:
    """As a spreadsheet has them; what no cell can hold as JSON."""
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, list(dict.fromkeys(name for row in rows for name in row)), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: v if isinstance(v, str | int) else json.dumps(v) for name, v in row.items()})
    return sink.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    pyarrow, sink = pytest.importorskip("pyarrow"), io.BytesIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return bytes(sink.getvalue())


WRITERS = {
    ".jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": lambda rows: table(rows, ","),
    ".tsv": lambda rows: table(rows, "\t"),
    ".parquet": parquet,
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source: Any, **options: Any) -> Text:
    return read_text(source, purpose="calibration", **options)


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_file_gives_the_same_text(tmp_path: Path, suffix: str, packing: str) -> None:
    for name, (rows, content) in FORMS.items():
        if name == "prompt of messages" and suffix in (".csv", ".tsv"):  # where a prompt is a string, whatever is in it
            continue
        path = write(tmp_path / f"{name}{suffix}{packing}", PACKERS[packing](WRITERS[suffix](rows)))
        text = read(str(path))
        if text.conversations is not None:
            assert list(text.conversations) == content, name
        else:
            assert text.text == "\n\n".join(content), name  # type: ignore[arg-type]  # of strings
        assert text.provenance["documents"] == str(len(rows))


@pytest.mark.parametrize("packing", PACKERS)
def test_plain_text_is_unpacked(tmp_path: Path, packing: str) -> None:
    packed = PACKERS[packing]("Wörter\r\n".encode())
    for name in (f"a.txt{packing}", "renamed.txt"):  # what a file is, its first bytes say
        assert read(write(tmp_path / name, packed)).text == "Wörter\r\n"


def test_files_are_known_by_their_suffix() -> None:
    kinds = {name: kind_of(Path(name)) for name in ("a.b.JSONL", "a.csv.GZ", "a.tar.gz", "gz", "a.doc", "a.zst")}
    assert kinds == {
        "a.b.JSONL": ".jsonl",
        "a.csv.GZ": ".csv",
        "a.tar.gz": None,
        "gz": None,
        "a.doc": None,
        "a.zst": None,
    }


def test_a_list_of_strings_is_a_list_of_documents(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", json.dumps(TEXTS))).text == "\n\n".join(TEXTS)


def test_rows_of_several_forms_are_documents(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"prompt": "two ", "completion": "three"}, {"text": None, "content": "four"}]
    text = read(write(tmp_path / "a.parquet", parquet(rows)))
    assert (text.text, text.provenance["columns"]) == ("one\n\ntwo three\n\nfour", "text, prompt, content")


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_column_of_any_name(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "not this", "body": "one", "chat": CHAT}, {"text": "", "body": "two", "chat": CHAT}]
    path = write(tmp_path / f"a{suffix}", WRITERS[suffix](rows))
    body = read(path, text_field="body")
    assert (body.text, body.provenance["columns"]) == ("one\n\ntwo", "body")
    assert read(path).text == "not this\n\n"
    assert read(path, text_field="chat").conversations == (CHAT, CHAT)  # of a table as JSON
    with pytest.raises(DataError, match=r"'boddy'.*columns: text, body, chat"):
        read(path, text_field="boddy")


def test_instructions_are_kept_apart_to_train_on(tmp_path: Path) -> None:
    """And read before the `text` that some sets have beside them."""
    row = {"text": "whole", "instruction": "Add.", "input": "1 and 2", "output": "3"}
    path = write(tmp_path / "a.parquet", parquet([row]))
    assert (read(path).text, read(path).instructions) == ("whole", ())
    (instruction,) = read_text(path, purpose="training").instructions
    assert instruction.text.endswith("### Input:\n1 and 2\n\n### Response:\n3")
    pairs = write(tmp_path / "b.csv", "prompt,completion\none ,two\n")
    (pair,) = read_text(pairs, purpose="training").instructions
    assert (pair.prompt, pair.output) == ("one ", "two")
    null = write(tmp_path / "d.jsonl", "\n".join(json.dumps(each) for each in (row, {**row, "output": None})))
    assert [each.output for each in read_text(null, purpose="training").instructions] == ["3", ""]
    mixed = write(tmp_path / "c.jsonl", json.dumps(row) + '\n{"text": "x"}')
    with pytest.raises(DataError, match="mixes instructions"):
        read_text(mixed, purpose="training")


BAD: Mapping[str, tuple[str, bytes, str]] = {
    "no known column": ("a.csv", b"title,body\nx,y\n", "columns: title, body.*--text-field"),
    "no known column, Parquet": ("a.parquet", b"", "columns: title, body.*--text-field"),
    "only answers": ("a.csv", b"input,output\nx,y\n", "columns: input, output"),
    "a header alone": ("a.csv", b"text\n", "is empty"),
    "blank": ("a.tsv", b"\n\n", "a.tsv"),
    "a column twice": ("a.csv", b"text,text\nx,y\n", "several columns called text"),
    "too many values": ("a.csv", b"text,n\nx,1\nx,y,2\n", "row 2 has 3 values.*2 columns"),
    "an open quote": ("a.csv", b'text\n"x\n', "line 2.*unexpected end"),
    "not UTF-8": ("a.csv", b"text\nx\nb\xe4d\n", "line 3.*UTF-8"),
    "broken gzip": ("a.txt.gz", gzip.compress(b"word" * 99)[:-9], "damaged"),
    "no gzip": ("a.txt.gz", b"\x1f\x8bword", "damaged"),
    "broken zstd": ("a.txt.zst", b"\x28\xb5\x2f\xfdword", "damaged"),
    "packed nothing": ("a.txt.gz", gzip.compress(b""), "is empty"),
    "the wrong suffix": ("a.parquet.gz", gzip.compress(b'{"text": "x"}'), "Parquet"),
    "a picture": (
        "a.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
        "line 1.*'image_url'",
    ),
    "no list": ("a.csv", b'messages\n"[{\'role\': \'user\'}]"\n', "row 1.*'messages' begins as a JSON list"),
    "a chat and a text": ("a.jsonl", b'{"text": "x", "conversations": []}', "both 'text' and .*--text-field"),
    "no answer": ("a.jsonl", b'{"instruction": "x", "output": null}', "line 1 has no answer: 'output' is null"),
    "a null": ("a.jsonl", b'{"text": null}', "line 1 has no text: 'text' is null"),
    "a tool call": (
        "a.jsonl", b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]}',
        "line 1: message 2 .assistant. has no text.*tool calls",
    ),
    "a list of strings": ("a.json", b'{"text": ["x", "y"]}', "line 1: `text` holds a list; give one string a row"),
    "two lists": ("a.json", b'{"chosen": [{"content": "x"}], "rejected": []}', "columns: chosen, rejected"),
    "unnamed messages": ("a.json", b'{"dialog": [{"role": "user", "content": "x"}]}', "columns: dialog"),
    "a number": ("a.json", b'[{"content": "x"}, {"content": 7}]', "row 2.*content"),
    "an empty list": ("a.json", b"[]", "is empty"),
    "a number in the list": ("a.json", b'[7]', "row 1: expected an object.*int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, says = BAD[case]
    path = write(tmp_path / name, content or parquet([{"title": "x", "body": "y"}]))
    with pytest.raises(DataError, match=says) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"text": "x", "n": 1},
        {"version": "1", "data": [{"text": "x"}]},
        {"content": [{"type": "text", "text": "x"}]},
    ],
)
def test_a_file_may_be_one_object(tmp_path: Path, content: Any) -> None:
    for indent in (None, 2):
        assert read(write(tmp_path / "a.json", json.dumps(content, indent=indent))).text == "x"


def test_only_parquet_and_zstd_need_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FORMS["text"][0]
    needy = [write(tmp_path / "a.parquet", parquet(rows)), write(tmp_path / "a.txt.zst", zstd(b"word"))]
    for package in ("pyarrow", "datasets", "pandas"):
        monkeypatch.setitem(sys.modules, package, None)
    for suffix in (".jsonl", ".json", ".csv", ".tsv"):
        assert read(write(tmp_path / f"a{suffix}.gz", gzip.compress(WRITERS[suffix](rows)))).text == "\n\n".join(TEXTS)
    for path in needy:
        with pytest.raises(MissingExtraError, match=r"secateur\[data\]"):
            read(path)


# --- in memory ---


@pytest.fixture
def model() -> Model:
    made = tiny("llama")
    made.tokenizer = tiny_tokenizer()
    return made


DOCUMENTS = ["a rose is a rose " * 9, "is a rose"]


def test_a_list_and_a_data_set_are_read_as_their_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for rows, _ in FORMS.values():
        assert_alike(read(datasets.Dataset.from_list(rows)), read(write(tmp_path / "a.jsonl", WRITERS[".jsonl"](rows))))
    split = datasets.Dataset.from_dict({"text": TEXTS, "body": DOCUMENTS * 2}, split="train").with_format("torch")
    listed = read(TEXTS)
    assert_alike(listed, read(split))
    assert (listed.provenance["source"], read(split).provenance["source"]) == ("memory", "dataset")
    assert (read(split).provenance["split"], read(split, text_field="body").text) == (
        "train",
        "\n\n".join(DOCUMENTS * 2),
    )
    with pytest.raises(DataError, match="columns: title"):
        read(datasets.Dataset.from_dict({"title": ["x"]}))
    split.save_to_disk(str(tmp_path / "saved"))
    assert_alike(listed, read(tmp_path / "saved"))
    several = datasets.DatasetDict({"train": split})
    several.save_to_disk(str(tmp_path / "several"))
    assert read(str(tmp_path / "several" / "train"), text_field="body").text == "\n\n".join(DOCUMENTS * 2)
    with pytest.raises(DataError, match=r"splits train; give one, as .*several/train"):
        read(tmp_path / "several")
    for wrong in (several, split.to_iterable_dataset()):
        with pytest.raises(InvalidOptionError, match=type(wrong).__name__):
            read(wrong)


def test_every_sequence_of_strings_is_a_list() -> None:
    datasets = pytest.importorskip("datasets")
    for documents in (tuple(TEXTS), datasets.Dataset.from_dict({"text": TEXTS})["text"]):
        assert_alike(read(documents), read(TEXTS))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([{"text": "x"}], r"Dataset\.from_list"),
        ([[1, 2]], r"torch\.tensor"),
        (torch.ones(2, 3, dtype=torch.long).numpy(), r"torch\.from_numpy"),
        (iter(["x"]), r"list\(\.\.\.\)"),
        ("two\nlines", "as a list"),
        ("word " * 99, "as a list"),
        ("C4", "Did you mean 'c4'"),
    ],
)
def test_what_is_nearly_a_text_is_told_the_way(wrong: Any, says: str) -> None:
    with pytest.raises((InvalidOptionError, UnknownNameError), match=says) as caught:
        read(wrong)
    assert len(str(caught.value)) < 400


def assert_alike(one: Text, other: Text) -> None:
    assert (one.text, one.conversations) == (other.text, other.conversations)
    assert one.provenance["text_sha256"] == other.provenance["text_sha256"]


@pytest.mark.parametrize(
    "wrong",
    [None, 7, b"bytes", {"text": "x"}, [1, 2], [], ["x", None], {"a", "b"}, object()],
    ids=lambda wrong: type(wrong).__name__,
)
def test_anything_else_is_refused(model: Model, wrong: Any) -> None:
    with pytest.raises((InvalidOptionError, DataError), match=r"a text is|is empty"):
        read(wrong)
    if wrong is not None:
        with pytest.raises((InvalidOptionError, DataError), match=r"a text is|is empty"):
            secateur.prune(model, "shortgpt", sparsity=0.3, calibration=wrong, samples=2, length=8)


def test_a_pruning_is_calibrated_on_what_is_in_memory(tmp_path: Path, model: Model) -> None:
    """By whichever way the tokens came, they and the result are the same."""
    words: dict[str, Any] = {"samples": 3, "length": 8}
    windows = read_tokens(model, DOCUMENTS, purpose="calibration", **words)
    stream = read_tokens(model, DOCUMENTS, purpose="calibration", length=8).ids.flatten()
    path = write(tmp_path / "a.csv", table([{"text": text} for text in DOCUMENTS], ","))
    for source in (tuple(DOCUMENTS), str(path), windows, windows.ids.int()):
        assert read_tokens(model, source, purpose="calibration", **words).fingerprint() == windows.fingerprint()
    records = []
    for calibration in (DOCUMENTS, path, windows.ids, stream):
        fresh = tiny("llama")
        fresh.tokenizer = tiny_tokenizer()
        records.append(secateur.prune(fresh, "shortgpt", sparsity=0.3, calibration=calibration, **words).record)
    assert len({record.fingerprint for record in records}) == 1
    facts = [record.calibration or {} for record in records]
    assert [each["source"] for each in facts] == ["memory", "file", "memory", "memory"]
    assert {(each["samples"], each["length"]) for each in facts} == {(3, 8)}
    assert facts[0]["text_sha256"] == facts[1]["text_sha256"]
    assert str(tmp_path) not in json.dumps(facts)
    ids = windows.ids
    for wrong in (ids.float(), ids[None], ids[0, 0], ids + 10**6, stream[:9], ids[:, :1]):
        with pytest.raises((InvalidOptionError, DataError)):
            secateur.prune(model, "shortgpt", sparsity=0.3, calibration=wrong, **words)


def test_a_model_is_judged_on_what_is_in_memory(tmp_path: Path, model: Model) -> None:
    path = write(tmp_path / "a.csv", table([{"body": text} for text in DOCUMENTS], ","))
    windows = read_tokens(model, DOCUMENTS, purpose="evaluation", length=8)
    texts = {"mine": DOCUMENTS, "file": path, "ids": windows.ids, "ready": Tokens.of(windows.ids)}
    report = secateur.evaluate(model, Judging(texts=texts, length=8), text_field="body")
    assert [each.text for each in report.model.perplexity] == list(texts)
    assert len({each.perplexity for each in report.model.perplexity}) == 1
    for wrong in ("wikitext2", [DOCUMENTS], windows.ids, None):
        with pytest.raises(InvalidOptionError, match="mine"):
            Judging(texts=wrong)


# --- the commands ---

COMMANDS: Mapping[str, tuple[object, ...]] = {  # with what makes each quick
    "prune": ("--sparsity", 0.5, "--method", "shortgpt", "--calibration", "DATA", "--samples", 2, "--length", 16),
    "eval": ("--perplexity", "DATA", "--length", 16),
    "recover": ("--data", "DATA", "--max-steps", 1, "--global-batch", 2, "--max-length", 16, "--rank", 2),
    "compare": ("--methods", "shortgpt", "--sparsities", 0.5, "--calibration", "DATA", "--texts", "DATA",
                "--samples", 2, "--length", 16, "--eval-length", 16),
    "ablate": ("--what", "repeats", "--method", "shortgpt", "--seeds", 0, "--calibration", "DATA", "--texts", "DATA",
               "--samples", 2, "--length", 16, "--eval-length", 16),
}  # fmt: skip


def words_of(command: str, model: Path, data: Path, out: Path) -> list[object]:
    given = [data if word == "DATA" else word for word in COMMANDS[command]]
    return [command, model, *given, *([] if command == "eval" else ["--out", out])]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_the_columns(command: str, world: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    data = write(tmp_path / "a.csv.gz", gzip.compress(table([{"body": "a rose " * 99, "n": 1}] * 3, ",")))
    words = words_of(command, world["model"], data, tmp_path / "out")
    for wrong in ((), ("--text-field", "boddy")):
        told = call(*words, *wrong)
        assert (told.code, told.err.count("\n")) == (3, 1)
        assert "its columns: body, n" in told.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_any_column(command: str, world: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    data = write(tmp_path / "a.csv.gz", gzip.compress(table([{"body": "a rose " * 99, "n": 1}] * 3, ",")))
    told = call(*words_of(command, world["model"], data, tmp_path / "out"), "--text-field", "body", "--json")
    assert told.code == 0, told.err
    files = [path.read_text() for path in (tmp_path / "out").rglob("*.json")]
    if command not in ("eval", "recover"):
        assert any('"columns": "body"' in text for text in files)
    assert not any(str(tmp_path) in text for text in files)
