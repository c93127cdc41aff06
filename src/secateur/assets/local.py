"""Texts in the user's own files: plain text, JSON lines and Parquet."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from secateur.assets.rows import FIELDS, FORM, checked, same_kind
from secateur.assets.text import Text, chat_text, join_rows, plain_text
from secateur.errors import DataError, MissingExtraError

_PLAIN = (".txt", ".raw", ".md")
_LINES = (".jsonl", ".json")
_PARQUET = (".parquet",)
SUFFIXES = (*_PLAIN, *_LINES, *_PARQUET)


def read_file(path: Path, name: str | None = None) -> Text:
    """Read a text file as it is, or the `text`, the `messages` or the instructions of a .jsonl, .json or .parquet file.

    Documents are joined with a blank line. An instruction with its output is a document: Stanford Alpaca's prompt, then
    the output. A byte order mark is dropped. Raises DataError with the file, the line (or row) and what would be right;
    MissingExtraError for Parquet without pyarrow.
    """
    path = Path(os.path.expanduser(path)).absolute()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file '{suffix}'; known are {', '.join(SUFFIXES)}.")
    data = _read_bytes(path)
    facts = {"source": "file", "path": str(path), "sha256": hashlib.sha256(data).hexdigest()}
    name = name or str(path)
    if suffix in _PLAIN:
        return plain_text(name, _decode(data, path), facts, where=str(path))
    rows = _json_rows(data, path) if suffix in _LINES else _parquet_rows(data, path)
    found = same_kind(checked(rows), path)
    facts["documents"] = str(len(found))
    if found and not isinstance(found[0], str):
        return chat_text(name, (row for row in found if not isinstance(row, str)), facts)
    documents = (row for row in found if isinstance(row, str))
    return plain_text(name, join_rows(documents, "documents"), facts, where=str(path))


def _read_bytes(path: Path) -> bytes:
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder; give a file ({', '.join(SUFFIXES)}).")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no file {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"cannot read {str(path)[:200]}: {getattr(error, 'strerror', None) or error}.") from error
    if not data:
        raise DataError(f"{path} is empty: a text needs at least one document with words in it.")
    return data


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8."
        ) from None


def _json_rows(data: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of every line that is not blank."""
    for number, line in enumerate(_decode(data, path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); every line must be one object, {FORM}.") from None


def _parquet_rows(data: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of every row, with the columns that are read as far as there are any."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError.of("pyarrow", "data", f"reading {path.name}") from None
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        columns = [column for column in FIELDS if column in file.schema_arrow.names]
        if not columns or set(columns) <= {"input", "output"}:
            raise DataError(
                f"{path} has the columns {', '.join(file.schema_arrow.names)}; "
                "it needs one called 'text' (strings), 'messages' (lists of role and content) or 'instruction'."
            )
        rows = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
