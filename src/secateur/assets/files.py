"""Texts and rows in the user's own files: plain text, JSON, CSV and Parquet, packed or not.

Parsed here and not by `datasets`: its readers guess types (a text "2020-01-01" becomes a time, "0012" a number, "NA"
nothing), leave locks in the user's cache, and read neither zstd by themselves nor a packed Parquet file.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from secateur.assets.corpus import Text, plain_text
from secateur.assets.hub import dataset_rows, open_folder
from secateur.assets.rows import COLUMNS, FORM, is_message, table_columns, text_of_rows
from secateur.errors import DataError, MissingExtraError

_PLAIN = (".txt", ".raw", ".md")
_LINES = (".jsonl", ".json", ".ndjson")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_PLAIN, *_LINES, *_DELIMITERS, ".parquet")
_PACKED = (".gz", ".zst")
KNOWN = f"{', '.join(_SUFFIXES)}, and each also {' or '.join(_PACKED)}"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how they begin, as no text in UTF-8 can


def kind_of(path: PurePath) -> str | None:
    """The suffix by which a text's file is read, without that of its packing; None if it is no such file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _SUFFIXES else None


def read_file(path: Path, name: str | None = None, *, field: str | None = None, training: bool = False) -> Text:
    """Read a plain text file as it is, and any other by its rows, as `text_of_rows` does; or a data set's folder.

    A byte order mark is dropped.

    Args:
        field, training: of a file with rows; see `text_of_rows`.

    Raises:
        DataError: with the file, the line (or row) and what would be right.
        MissingExtraError: Parquet or zstd without pyarrow.
    """
    path = Path(os.path.expanduser(path)).absolute()
    if os.path.isdir(path):
        return _read_folder(path, name or str(path), field, training)
    kind = kind_of(path)
    if kind is None and os.path.exists(path):
        raise DataError(f"{path}: unknown kind of file; known are {KNOWN}.")
    stored = _read_bytes(path)
    facts = {"source": "file", "path": str(path), "sha256": hashlib.sha256(stored).hexdigest()}
    name, content = name or str(path), _unpacked(stored, path)
    if kind in _PLAIN:
        return plain_text(name, _decode(content, path), facts, where=str(path))
    if kind in _LINES:
        rows = _json_values(_decode(content, path), path, field)
    elif kind in _DELIMITERS:
        rows = _csv_rows(_decode(content, path), path, _DELIMITERS[kind], field)
    else:
        rows = _parquet_rows(content, path, field)
    return text_of_rows(rows, name, facts, where=str(path), field=field, training=training)


def _read_folder(path: Path, name: str, field: str | None, training: bool) -> Text:
    """A data set, or one split of it, that `datasets` saved to disk."""
    if not any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        raise DataError(f"{path} is a folder; give a file ({KNOWN}), or a folder that datasets.save_to_disk wrote.")
    saved = open_folder(path)
    if isinstance(saved, dict):
        raise DataError(f"{path} has the splits {', '.join(saved)}; give one, as {path / next(iter(saved))}.")
    _, rows, facts = dataset_rows(saved, field, str(path))
    return text_of_rows(rows, name, {**facts, "path": str(path)}, where=str(path), field=field, training=training)


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no file {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"cannot read {str(path)[:200]}: {getattr(error, 'strerror', None) or error}.") from error
    if not content:
        raise DataError(f"{path} is empty: a text needs at least one document with words in it.")
    return content


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8."
        ) from None


def _unpacked(content: bytes, path: Path) -> bytes:
    """The content, unpacked if it is gzip or zstd, whatever the file is called."""
    try:
        if content.startswith(_GZIP):
            return gzip.decompress(content)
        if content.startswith(_ZSTD):
            pyarrow = _pyarrow(path)
            return bytes(pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd").read())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged and cannot be unpacked: {error}.") from error
    return content


def _json_values(text: str, path: Path, field: str | None) -> Iterator[tuple[str, object]]:
    """(where, value) of every line that is not blank; of every entry where the file is one list, or one object with
    such a list; or of the one object."""
    entries: object = None
    if text.lstrip().startswith("["):
        entries = _json(text, str(path), "begins as a list and is none")
    elif (whole := _whole_object(text)) is not None and (entries := _wrapped_rows(whole, field)) is None:
        yield f"{path}, line 1", whole
        return
    if isinstance(entries, list):
        yield from ((f"{path}, row {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _json(line, where, f"every line must be one object with {FORM}, or the file one list")


def _whole_object(text: str) -> dict[str, object] | None:
    """The object that the file is; None where it is none, or several lines of them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _wrapped_rows(whole: dict[str, object], field: str | None) -> list[object] | None:
    """The rows in an object that is none itself, as {"version": 1, "data": [...]}; None where it is a row."""
    if any(name in whole for name in (COLUMNS if field is None else (field,))):
        return None
    nested = [value for value in whole.values() if isinstance(value, (list, dict))]
    if len(nested) != 1 or not isinstance(nested[0], list):
        return None
    rows = nested[0]
    return rows if rows and all(isinstance(row, dict) and not is_message(row) for row in rows) else None


def _json(text: str, where: str, why: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {why}.") from None


def _csv_rows(text: str, path: Path, delimiter: str, field: str | None) -> Iterator[tuple[str, object]]:
    """(where, row) of every row below the header; every value is a string."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a document may be longer than 128 kB
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}.") from None
    finally:
        csv.field_size_limit(before)
    header = rows[0] if rows else []
    table_columns(header, str(path), field)
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(header):
            raise DataError(f"{path}, row {number} has {len(row)} values; the header has {len(header)} columns.")
        yield f"{path}, row {number}", dict(zip(header, row, strict=True))


def _parquet_rows(content: bytes, path: Path, field: str | None) -> Iterator[tuple[str, object]]:
    """(where, row) of every row, with the columns that are read."""
    pyarrow = _pyarrow(path)
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        rows = file.read(columns=table_columns(file.schema_arrow.names, str(path), field)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError.of("pyarrow", "data", f"reading {path.name}") from None
    return pyarrow
