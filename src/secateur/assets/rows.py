"""What a row of a user's JSON lines or Parquet file may be: a document, a conversation, an instruction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from secateur.assets.text import Conversation
from secateur.errors import DataError

FIELDS = ("text", "messages", "instruction", "input", "output")
INSTRUCTION_FORM = '{"instruction": "...", "input": "...", "output": "..."}'
FORM = f'{{"text": "..."}}, {{"messages": [{{"role": "user", "content": "..."}}, ...]}} or {INSTRUCTION_FORM}'

_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One row in the Alpaca form; `input` may be empty."""

    instruction: str
    input: str
    output: str


def checked(rows: Iterable[tuple[str, object]]) -> Iterator[tuple[str, str | Conversation]]:
    """(where, document or conversation) of every row."""
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {_json_type(row)}; every line must be one object, {FORM}.")
        if {"text", "messages"} <= row.keys():
            raise DataError(f"{where} has both 'text' and 'messages'; every row must be {FORM}.")
        if "text" in row:
            yield where, string(row["text"], "'text'", where)
        elif "messages" in row:
            yield where, _conversation(row["messages"], where)
        elif "instruction" in row:
            read = instruction(row, where)
            yield where, alpaca_prompt(read) + read.output
        else:
            raise DataError(f"{where} has neither 'text' nor 'messages' nor 'instruction'; every row must be {FORM}.")


def instruction(row: object, where: str) -> Instruction:
    """A row in the Alpaca form, in which `input` may be left out."""
    if not isinstance(row, dict) or not {"instruction", "output"} <= row.keys():
        found = f"the fields {', '.join(map(str, row))}" if isinstance(row, dict) else "no object"
        raise DataError(f"{where} has {found}; every row must be {INSTRUCTION_FORM} (without `input` is fine).")
    given = {**row, "input": row.get("input") or ""}
    fields = {key: string(given[key], f"'{key}'", where) for key in ("instruction", "input", "output")}
    return Instruction(**fields)


def alpaca_prompt(row: Instruction) -> str:
    """The prompt of Stanford Alpaca, which the response follows."""
    if row.input:
        return (
            f"{_TASK}, paired with an input that provides further context. {_ANSWER}{row.instruction}\n\n"
            f"### Input:\n{row.input}\n\n### Response:\n"
        )
    return f"{_TASK}. {_ANSWER}{row.instruction}\n\n### Response:\n"


def _conversation(value: object, where: str) -> Conversation:
    """The messages' role and content; further fields do not reach a tokenizer and are left out."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a list with at least one message, not {value!r:.80}.")
    conversation = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f'{where}: a message must be {{"role": ..., "content": ...}}, not {message!r:.80}.')
        conversation.append({key: string(message[key], f"'{key}'", where) for key in ("role", "content")})
    return conversation


def string(value: object, what: str, where: str) -> str:
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


def same_kind(rows: Iterable[tuple[str, str | Conversation]], path: Path) -> list[str | Conversation]:
    """All rows, which must be all documents or all conversations."""
    found: list[str | Conversation] = []
    for where, row in rows:
        if found and type(row) is not type(found[0]):
            raise DataError(f"{where} and the rows before it mix documents and 'messages'; put them into two files.")
        found.append(row)
    if not found:
        raise DataError(f"{path} is empty: it needs at least one row, {FORM}.")
    return found
