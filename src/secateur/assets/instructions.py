"""Training data: instructions in the Alpaca form, and what a data set's licence is known to be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.assets.catalog import KNOWN_TEXTS
from secateur.assets.local import _decode, _read_bytes
from secateur.assets.rows import INSTRUCTION_FORM, Instruction, instruction
from secateur.assets.text import Text
from secateur.assets.texts import read_text
from secateur.errors import DataError

ALPACA_LICENCE = "CC BY-NC 4.0 (Stanford Alpaca data): non-commercial use only"
_LICENCE_BY_SHA256 = {  # of files that are known, whatever they are called
    "39fbf2b9cb05fd6c733c22ba68d34263995b260f4a056a39065f1d0f8774920c": ALPACA_LICENCE,
}


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """A data set of instructions; `provenance` as a `Text` has it."""

    name: str
    rows: tuple[Instruction, ...]
    provenance: Mapping[str, str]


def read_training(name: str, *, data: Path | None = None, cache: Path | None = None) -> Instructions | Text:
    """Training data by the path of a file, or a known text's name.

    A .jsonl file (or a .json file with one list) whose first row has an `instruction` is read in the Alpaca form; any
    other is what `read_text` makes of it: conversations, or plain text.

    Raises:
        DataError, with the line; UnknownNameError, FetchError, MissingExtraError as `read_text`.
    """
    path = Path(name).expanduser()
    if name in KNOWN_TEXTS or path.suffix.lower() not in (".jsonl", ".json") or not path.exists():
        return read_text(name, purpose="calibration", data=data, cache=cache)
    content = _read_bytes(path)
    rows = _rows(content, path)
    first = next(rows, None)
    if first is None or not (isinstance(first[1], dict) and "instruction" in first[1]):
        return read_text(name, purpose="calibration", data=data, cache=cache)
    read = tuple(instruction(row, where) for where, row in (first, *rows))
    sha256 = hashlib.sha256(content).hexdigest()
    facts = {"source": "file", "path": str(path.absolute()), "sha256": sha256, "documents": str(len(read))}
    return Instructions(name=name, rows=read, provenance=facts)


def licence_of(read: Instructions | Text) -> tuple[str | None, str]:
    """A data set's licence, as far as known, and what it is known by."""
    if licence := read.provenance.get("licence"):
        return licence, "the data set's name"
    if licence := _LICENCE_BY_SHA256.get(read.provenance.get("sha256", "")):
        return licence, "the file's sha256"
    if isinstance(read, Instructions) and "alpaca" in Path(read.name).name.lower():
        return ALPACA_LICENCE, "the file's name"
    return None, "nothing"


def _rows(content: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of every line that is not blank, or of every entry where the file is one list."""
    text = _decode(content, path)
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}: begins as a JSON list and is none ({error}).") from None
        yield from ((f"{path}, row {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{where}: not JSON ({error}); every line must be one object, {INSTRUCTION_FORM}."
                ) from None
