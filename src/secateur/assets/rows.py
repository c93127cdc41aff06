"""Rows of a user's data: which of their columns hold text, and what stands there."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from secateur.assets.corpus import Conversation, Instruction, Text, chat_text, join_rows, plain_text
from secateur.errors import DataError

CHATS = ("messages", "conversations", "conversation")
_PAIRED = ("instruction", "prompt")  # which need an answer beside them
_FORMS = ("text", *CHATS, *_PAIRED, "content")  # the first that a row has is read
_TRAINING = (*CHATS, *_PAIRED, "text", "content")  # and to train on: instructions before a `text`
_CONTEXTS, _ANSWERS = ("input", "context"), ("output", "response", "completion")
COLUMNS = (*_FORMS, *_CONTEXTS, *_ANSWERS)  # all that are looked at
FORM = "`text`, `messages`, `conversations`, `instruction` with `output`, `prompt` with `completion`, or `content`"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


class ContentPart(Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Message(Struct):
    """What of a message reaches a tokenizer; further fields are left out."""

    role: str
    content: str | list[str | ContentPart]


def text_of_rows(
    rows: Iterable[tuple[str, object]],
    name: str,
    facts: Mapping[str, str],
    *,
    where: str,
    field: str | None = None,
    training: bool = False,
) -> Text:
    """The documents, joined with a blank line, or the conversations of rows.

    An instruction or prompt with its answer is a document, too.

    Args:
        rows: each with its place, for messages; a string is a document.
        where: the place of all.
        field: the column that holds text or a conversation; one of `FORM` if None, the first that a row has.
        training: instructions are read before a `text` beside them.

    Raises:
        DataError: with the row and what would be right.
    """
    documents: list[str | Instruction] = []
    conversations: list[Conversation] = []
    columns: dict[str, None] = {}
    for place, row in rows:
        column, read = _read_row(row, place, field, training)
        columns[column] = None
        if isinstance(read, list):
            conversations.append(read)
        else:
            documents.append(read)
        if documents and conversations:
            raise DataError(f"{place} and the rows before it mix documents and conversations; put them into two files.")
    if not documents and not conversations:
        raise DataError(f"{where} is empty: it needs at least one row with {FORM}.")
    facts = {**facts, "documents": str(len(documents or conversations)), "columns": ", ".join(columns)}
    if conversations:
        return chat_text(name, conversations, facts)
    instructions = tuple(document for document in documents if isinstance(document, Instruction))
    if training and instructions and len(instructions) < len(documents):
        raise DataError(f"{where} mixes instructions and other documents; put them into two files.")
    text = join_rows((d.text if isinstance(d, Instruction) else d for d in documents), "documents")
    return plain_text(name, text, facts, where=where, instructions=instructions if training else ())


def table_columns(names: Sequence[str], where: str, field: str | None) -> list[str]:
    """Of a table's columns those to be read.

    Raises:
        DataError: none holds text, or two that would be read have one name.
    """
    if (_chosen(names) if field is None else field) not in names:
        raise _no_column(names, where, field)
    wanted = [name for name in names if (name in COLUMNS if field is None else name == field)]
    if twice := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise DataError(f"{where} has several columns called {', '.join(twice)}; give them names of their own.")
    return wanted


def _read_row(
    row: object, where: str, field: str | None, training: bool
) -> tuple[str, str | Instruction | Conversation]:
    """The column that is read, and what it holds. A value that is null counts as not there."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with columns, got {type(row).__name__}; {FORM}.")
    values = {name: value for name, value in row.items() if value is not None}
    answers = [name for name in _ANSWERS if name in row]
    unanswered = bool(answers) and not any(name in values for name in answers)
    if unanswered and training:
        values[answers[0]] = ""  # what makes examples leaves the row out
    column = _chosen(values, training=training) if field is None else field
    if column is None and unanswered and any(name in values for name in _PAIRED):
        raise DataError(f"{where} has no answer: '{answers[0]}' is null. Leave the row out, or give it one.")
    if column is None or column not in values:
        empty = _chosen(row, training=training) if field is None else field
        if empty in row:
            raise DataError(f"{where} has no text: '{empty}' is null. Leave the row out, or give it one.")
        raise _no_column(row, where, field)
    if field is None and "text" in values and (chat := next((name for name in CHATS if name in values), None)):
        raise DataError(f"{where} has both 'text' and '{chat}'; say which to read as --text-field (`text_field`).")
    read: str | Instruction | Conversation
    if field is None and column in _PAIRED:
        read = _pair(values, column, where)
    elif column in CHATS or (field is not None and _holds_messages(values[column])):
        read = _conversation(values, column, where)
    else:
        read = _plain(values, column, where)
    try:
        msgspec.json.encode(read)
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair; no tokenizer takes it
        raise DataError(f"{where} has half of a surrogate pair (\\ud800 to \\udfff).") from None
    return column, read


def _chosen(names: Collection[str], *, training: bool = False) -> str | None:
    """The column to be read, if there is one."""
    answered = any(name in names for name in _ANSWERS)
    forms = _TRAINING if training else _FORMS
    return next((form for form in forms if form in names and (answered or form not in _PAIRED)), None)


def _no_column(names: Iterable[str], where: str, field: str | None) -> DataError:
    wanted = FORM if field is None else f"'{field}'"
    return DataError(
        f"{where} has nothing in {wanted}; its columns: {', '.join(map(str, names)) or 'none'}. Say which holds the "
        "text as --text-field (`text_field`)."
    )


def _pair(values: Mapping[str, Any], column: str, where: str) -> Instruction | Conversation:
    answer = next(name for name in _ANSWERS if name in values)
    if column == "prompt" and isinstance(values[column], list):
        said = _conversation(values, answer, where) if values[answer] != "" else []
        return [*_conversation(values, column, where), *said]
    context = next((name for name in _CONTEXTS if name in values), None) if column == "instruction" else None
    return Instruction(
        instruction=_plain(values, column, where), output=_plain(values, answer, where),
        input=_plain(values, context, where) if context else "", verbatim=column == "prompt",
    )  # fmt: skip


def _holds_messages(value: object) -> bool:
    """Whether messages stand in a column whose name does not say so, perhaps as JSON."""
    if isinstance(value, list):
        return any(map(is_message, value))
    if not isinstance(value, str):
        return False
    try:
        read = json.loads(value) if value.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(read, list) and bool(read) and all(map(is_message, read))


def is_message(entry: object) -> bool:
    """Whether it is one of a conversation."""
    return isinstance(entry, Mapping) and ("role" in entry or "from" in entry)


def _conversation(values: Mapping[str, Any], column: str, where: str) -> Conversation:
    """Messages of role and content, or as ShareGPT spells them; a table may hold them as JSON."""
    value = values[column]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: '{column}' begins as a JSON list and is none ({error}).") from None
    if isinstance(value, list):
        value = [_spelt(message) for message in value]
        _require_content(value, where)
    messages = _typed({column: value}, column, Annotated[list[Message], Meta(min_length=1)], where)
    return [{"role": message.role, "content": _joined(message.content, where)} for message in messages]


def _spelt(message: Any) -> Any:
    """A message in the chat templates' spelling."""
    if not isinstance(message, Mapping):
        return message
    if message.get("from") is not None:
        message = {"role": message["from"], "content": message.get("value")}
    role = message.get("role")
    return {**message, "role": _ROLES.get(role, role)} if isinstance(role, str) else message


def _require_content(messages: list[Any], where: str) -> None:
    for number, message in enumerate(messages, start=1):
        if isinstance(message, Mapping) and "role" in message and message.get("content") is None:
            calls = ", only tool calls, which are not read" if message.get("tool_calls") else ""
            raise DataError(
                f"{where}: message {number} ({message['role']}) has no text as its `content`{calls}. Give it one (it "
                "may be empty), or leave the row out."
            )


def _joined(content: str | list[str | ContentPart], where: str) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if isinstance(part, ContentPart) and (part.type != "text" or part.text is None):
            raise DataError(f"{where} has a message with a part of kind '{part.type}'; only text can be read.")
    return "".join(part if isinstance(part, str) else part.text or "" for part in content)


def _plain(values: Mapping[str, Any], column: str, where: str) -> str:
    """A column's text, which may stand in parts, as a message's does."""
    value = values[column]
    if not isinstance(value, list):
        return str(_typed(values, column, str, where))
    if not any(isinstance(part, Mapping) for part in value):
        raise DataError(
            f"{where}: `{column}` holds a list; give one string a row: join its entries, or make a row of each (token "
            "ids can be given in Python, as a tensor)."
        )
    return _joined(_typed(values, column, list[str | ContentPart], where), where)


def _typed(values: Mapping[str, Any], column: str, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(values[column], kind)
    except msgspec.ValidationError as error:
        said = str(error).replace("$", column, 1) if "$" in str(error) else f"{error} - at `{column}`"
        raise DataError(f"{where}: {said}.") from None
