"""The one shape in which every corpus reaches a tokenizer, and the rules by which documents are joined."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from secateur.errors import DataError

Purpose = Literal["calibration", "evaluation", "training"]
Joining = Literal["documents", "wikitext"]
Bos = Literal["auto", "always", "never"]  # a begin-of-sequence token before each text; auto: if the family needs it
Conversation = list[dict[str, str]]  # messages, each {"role", "content"}


_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A row in the Alpaca form, whose `input` may be empty; or a prompt and its completion, which are not put into
    Alpaca's prompt (`verbatim`)."""

    instruction: str
    input: str
    output: str
    verbatim: bool = False

    @property
    def prompt(self) -> str:
        """The prompt of Stanford Alpaca, which the response follows; or the row's own."""
        if self.verbatim:
            return self.instruction
        if self.input:
            return (
                f"{_TASK}, paired with an input that provides further context. {_ANSWER}{self.instruction}\n\n"
                f"### Input:\n{self.input}\n\n### Response:\n"
            )
        return f"{_TASK}. {_ANSWER}{self.instruction}\n\n### Response:\n"

    @property
    def text(self) -> str:
        """As a document."""
        return self.prompt + self.output


@dataclass(frozen=True, kw_only=True)
class Text:
    """One corpus, ready for a tokenizer: either plain text or conversations, never both.

    Attributes:
        text: joined as its protocol demands; None for chat data.
        conversations: None for plain text.
        instructions: of a text that is read for training, where its documents are instructions.
        provenance: where it came from, as far as known: `source` (file, data folder, hub, pypi, memory, dataset),
            `path`, `repository`, `config`, `package`, `split`, `revision` (resolved), `documents`, `columns` (that were
            read), `licence`, `sha256` (of a single file); always `text_sha256`, of what the tokenizer will see, so that
            equal texts can be told.
    """

    name: str
    text: str | None
    conversations: tuple[Conversation, ...] | None
    provenance: Mapping[str, str]
    instructions: tuple[Instruction, ...] = ()


def join_rows(rows: Iterable[str], joining: Joining) -> str:
    """Join a data set's rows with a blank line.

    WikiText's rows are lines that keep their newline, and a blank one counts as "": the text of GPTQ,
    SparseGPT and SliceGPT. Any other joining gives other tokens, and another perplexity.
    """
    if joining == "wikitext":
        return "\n\n".join(row if row.strip() else "" for row in rows)
    return "\n\n".join(rows)


def wikitext_rows(raw: str) -> list[str]:
    """The rows of a `wiki.*.raw` file: its lines, newline kept, as the hub's data set has them."""
    # Not str.splitlines: it would also cut at U+2028, U+0085 and the like.
    lines = raw.replace("\r\n", "\n").split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def plain_text(
    name: str, text: str, provenance: Mapping[str, str], *, where: str, instructions: tuple[Instruction, ...] = ()
) -> Text:
    """A plain Text with its `text_sha256`; DataError naming `where` if there is nothing but white space."""
    if not text.strip():
        raise DataError(f"{where} is empty: a text needs at least one document with words in it.")
    facts = _with_sha256(provenance, text)
    return Text(name=name, text=text, conversations=None, provenance=facts, instructions=instructions)


def chat_text(name: str, conversations: Iterable[Conversation], provenance: Mapping[str, str]) -> Text:
    """A Text of conversations with its `text_sha256` (of their canonical JSON)."""
    chats = tuple(conversations)
    canonical = json.dumps(chats, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return Text(name=name, text=None, conversations=chats, provenance=_with_sha256(provenance, canonical))


def _with_sha256(provenance: Mapping[str, str], text: str) -> dict[str, str]:
    return {**provenance, "text_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}
