"""Texts in the user's own files: plain text, JSON lines and Parquet."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from secateur.assets.text import Conversation, Text, chat_text, join_rows, plain_text
from secateur.errors import DataError, MissingExtraError

_PLAIN = (".txt", ".raw", ".md")
_LINES = (".jsonl", ".json")
_PARQUET = (".parquet",)
SUFFIXES = (*_PLAIN, *_LINES, *_PARQUET)

_FORM = '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


def read_file(path: Path, name: str | None = None) -> Text:
    """Read a text file as it is, or the `text` or `messages` of a .jsonl, .json or .parquet file.

    Documents are joined with a blank line. A byte order mark is dropped. Raises DataError with the file, the
    line (or row) and what would be right; MissingExtraError for Parquet without pyarrow.
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
    found = _same_kind(_checked(rows), path)
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
            raise DataError(f"{where}: not JSON ({error}); every line must be one object, {_FORM}.") from None


def _parquet_rows(data: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of every row, with the columns `text` and `messages` as far as there are any."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError.of("pyarrow", "data", f"reading {path.name}") from None
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        columns = [column for column in ("text", "messages") if column in file.schema_arrow.names]
        if not columns:
            raise DataError(
                f"{path} has the columns {', '.join(file.schema_arrow.names)}; "
                "it needs one called 'text' (strings) or 'messages' (lists of role and content)."
            )
        rows = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _checked(rows: Iterable[tuple[str, object]]) -> Iterator[tuple[str, str | Conversation]]:
    """(where, document or conversation) of every row."""
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {_json_type(row)}; every line must be one object, {_FORM}.")
        fields = [field for field in ("text", "messages") if field in row]
        if len(fields) != 1:
            found = "both 'text' and 'messages'" if fields else "neither 'text' nor 'messages'"
            raise DataError(f"{where} has {found}; every row must be {_FORM}.")
        value = row[fields[0]]
        yield (
            where,
            _conversation(value, where) if fields[0] == "messages" else _string(value, "'text'", where),
        )


def _conversation(value: object, where: str) -> Conversation:
    """The messages' role and content; further fields do not reach a tokenizer and are left out."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a list with at least one message, not {value!r:.80}.")
    conversation = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f'{where}: a message must be {{"role": ..., "content": ...}}, not {message!r:.80}.')
        conversation.append({key: _string(message[key], f"'{key}'", where) for key in ("role", "content")})
    return conversation


def _string(value: object, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be a string, not a JSON {_json_type(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair; no tokenizer takes it
        raise DataError(f"{where}: {what} has half of a surrogate pair (\\ud800 to \\udfff).") from None
    return value


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _same_kind(rows: Iterable[tuple[str, str | Conversation]], path: Path) -> list[str | Conversation]:
    """All rows, which must be all documents or all conversations."""
    found: list[str | Conversation] = []
    for where, row in rows:
        if found and type(row) is not type(found[0]):
            raise DataError(f"{where} and the rows before it mix 'text' and 'messages'; put them into two files.")
        found.append(row)
    if not found:
        raise DataError(f"{path} is empty: it needs at least one row, {_FORM}.")
    return found
