"""Texts and training data in the user's own files: plain text, JSON lines and Parquet."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from secateur.assets.corpus import Text, chat_text, join_rows, plain_text
from secateur.errors import DataError, MissingExtraError

_PLAIN = (".txt", ".raw", ".md")
LINES = (".jsonl", ".json")
SUFFIXES = (*_PLAIN, *LINES, ".parquet")
_INSTRUCTION = '{"instruction": "...", "input": "...", "output": "..."}'
_FORM = f'{{"text": "..."}}, {{"messages": [{{"role": "user", "content": "..."}}, ...]}} or {_INSTRUCTION}'
_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
ALPACA_LICENCE = "CC BY-NC 4.0 (Stanford Alpaca data): non-commercial use only"
_LICENCE_BY_SHA256 = {  # of files that are known, whatever they are called
    "39fbf2b9cb05fd6c733c22ba68d34263995b260f4a056a39065f1d0f8774920c": ALPACA_LICENCE
}


class Message(Struct):
    """What of a message reaches a tokenizer; further fields are left out."""

    role: str
    content: str


class Row(Struct):
    """A row of a user's file: a document, a conversation or an instruction."""

    text: str | UnsetType = UNSET
    messages: Annotated[list[Message], Meta(min_length=1)] | UnsetType = UNSET
    instruction: str | UnsetType = UNSET
    input: str | None = None
    output: str | UnsetType = UNSET


class Instruction(Struct, frozen=True, kw_only=True):
    """One row in the Alpaca form; `input` may be empty."""

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """The prompt of Stanford Alpaca, which the response follows."""
        if self.input:
            return (
                f"{_TASK}, paired with an input that provides further context. {_ANSWER}{self.instruction}\n\n"
                f"### Input:\n{self.input}\n\n### Response:\n"
            )
        return f"{_TASK}. {_ANSWER}{self.instruction}\n\n### Response:\n"


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """A data set of instructions; `provenance` as a `Text` has it."""

    name: str
    rows: tuple[Instruction, ...]
    provenance: Mapping[str, str]

    @property
    def licence(self) -> tuple[str | None, str]:
        """The data set's licence, as far as known, and what it is known by."""
        if licence := _LICENCE_BY_SHA256.get(self.provenance["sha256"]):
            return licence, "the file's sha256"
        named = "alpaca" in Path(self.name).name.lower()
        return (ALPACA_LICENCE, "the file's name") if named else (None, "nothing")


def read_file(path: Path, name: str | None = None) -> Text:
    """Read a text file as it is, or the `text`, the `messages` or the instructions of a .jsonl, .json or .parquet file.

    Documents are joined with a blank line. An instruction with its output is a document: Stanford Alpaca's prompt, then
    the output. A byte order mark is dropped.

    Raises:
        DataError: with the file, the line (or row) and what would be right.
        MissingExtraError: Parquet without pyarrow.
    """
    path = Path(os.path.expanduser(path)).absolute()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file '{suffix}'; known are {', '.join(SUFFIXES)}.")
    content = _read_bytes(path)
    facts = {"source": "file", "path": str(path), "sha256": hashlib.sha256(content).hexdigest()}
    name = name or str(path)
    if suffix in _PLAIN:
        return plain_text(name, _decode(content, path), facts, where=str(path))
    documents, conversations = [], []
    for where, value in _json_values(content, path) if suffix in LINES else _parquet_rows(content, path):
        row = _row(value, where)
        if row.messages is not UNSET:
            conversations.append([{"role": each.role, "content": each.content} for each in row.messages])
        else:
            documents.append(_document(row, value, where))
        if documents and conversations:
            raise DataError(f"{where} and the rows before it mix documents and 'messages'; put them into two files.")
    if not documents and not conversations:
        raise DataError(f"{path} is empty: it needs at least one row, {_FORM}.")
    facts["documents"] = str(len(documents or conversations))
    if conversations:
        return chat_text(name, conversations, facts)
    return plain_text(name, join_rows(documents, "documents"), facts, where=str(path))


def read_instructions(path: Path, name: str) -> Instructions | None:
    """The rows of a .jsonl file, or of a .json file with one list, if the first has an `instruction`; else None.

    Raises:
        DataError: with the line, for rows that are not in the Alpaca form (without `input` is fine).
    """
    content = _read_bytes(path)
    values = _json_values(content, path, lists=True)
    first = next(values, None)
    if first is None or not (isinstance(first[1], dict) and "instruction" in first[1]):
        return None
    rows = tuple(_instruction(_row(value, where), value, where) for where, value in (first, *values))
    sha256 = hashlib.sha256(content).hexdigest()
    facts = {"source": "file", "path": str(path.absolute()), "sha256": sha256, "documents": str(len(rows))}
    return Instructions(name=name, rows=rows, provenance=facts)


def _row(value: object, where: str) -> Row:
    try:
        row = msgspec.convert(value, Row)
        msgspec.json.encode(row)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {error}; every row must be one object, {_FORM}.") from None
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair; no tokenizer takes it
        raise DataError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff).") from None
    if row.text is not UNSET and row.messages is not UNSET:
        raise DataError(f"{where} has both 'text' and 'messages'; every row must be {_FORM}.")
    return row


def _document(row: Row, value: object, where: str) -> str:
    if row.text is not UNSET:
        return row.text
    if row.instruction is UNSET:
        raise DataError(f"{where} has neither 'text' nor 'messages' nor 'instruction'; every row must be {_FORM}.")
    read = _instruction(row, value, where)
    return read.prompt + read.output


def _instruction(row: Row, value: object, where: str) -> Instruction:
    if row.instruction is UNSET or row.output is UNSET:
        fields = ", ".join(map(str, value)) if isinstance(value, dict) else ""
        raise DataError(f"{where} has the fields {fields}; every row must be {_INSTRUCTION} (without `input` is fine).")
    return Instruction(instruction=row.instruction, input=row.input or "", output=row.output)


def _read_bytes(path: Path) -> bytes:
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder; give a file ({', '.join(SUFFIXES)}).")
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


def _json_values(content: bytes, path: Path, *, lists: bool = False) -> Iterator[tuple[str, object]]:
    """(where, value) of every line that is not blank or, with `lists`, of every entry where the file is one list."""
    text = _decode(content, path)
    if lists and text.lstrip().startswith("["):
        entries = _json(text, str(path), "begins as a list and is none")
        assert isinstance(entries, list)
        yield from ((f"{path}, row {number}", entry) for number, entry in enumerate(entries, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _json(line, where, f"every line must be one object, {_FORM}")


def _json(text: str, where: str, why: str) -> object:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {why}.") from None


def _parquet_rows(content: bytes, path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of every row, with the columns that are read as far as there are any."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError.of("pyarrow", "data", f"reading {path.name}") from None
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        columns = [column for column in Row.__struct_fields__ if column in file.schema_arrow.names]
        if not columns or set(columns) <= {"input", "output"}:
            raise DataError(
                f"{path} has the columns {', '.join(file.schema_arrow.names)}; "
                "it needs one called 'text' (strings), 'messages' (lists of role and content) or 'instruction'."
            )
        rows = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
