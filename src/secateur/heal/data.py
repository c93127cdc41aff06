"""Rows of token ids with labels: what a recovery trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from secateur.assets import Conversation, Instruction, Text
from secateur.engine.chat import counted, render_conversation, response_spans
from secateur.engine.tokens import begun, tokenize
from secateur.errors import DataError
from secateur.heal.settings import Settings, Template
from secateur.record import TrainingData
from secateur.run import Run

IGNORED = -100  # the label of a token on which there is no loss


@dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
        ids: (length,), int64.
        labels: (length,): the id itself where its prediction counts, else IGNORED; the first token is never predicted.
    """

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Examples:
    """Rows to train on, rows held out, and what they are; whose licence is not known here."""

    train: tuple[Example, ...] = field(repr=False)
    held_out: tuple[Example, ...] = field(repr=False)
    facts: TrainingData


def make_examples(
    read: Text, tokenizer: PreTrainedTokenizerBase, settings: Settings, *, bos_id: int | None = None
) -> Examples:
    """Tokenize a data set and hold rows out, drawn by the seed.

    Instructions: the loss counts the response and the end-of-text token after it. Conversations: what the assistant
    says. Plain text: windows of `max_length` tokens, all counted. Longer rows are cut at their end; a row of which no
    counted token is left goes, and so does an instruction without an output.

    Args:
        bos_id: begins each row, once. Without it instructions begin as the tokenizer begins a text, conversations as
            their template does, windows with their text.

    Raises:
        DataError: too few rows; nothing counted in any; a tokenizer that cannot tell where its tokens lie.
    """
    length = settings.max_length
    if read.instructions:
        verbatim = settings.template == "alpaca" and all(row.verbatim for row in read.instructions)
        form = "prompts and completions" if verbatim else f"instructions, {settings.template} template"
        given, rows = len(read.instructions), _instructions(read.instructions, tokenizer, settings.template)
    elif read.conversations is not None:
        form, given = "conversations", len(read.conversations)
        rows = [_conversation(each, tokenizer, row) for row, each in enumerate(read.conversations)]
    else:
        windows = tokenize(read, tokenizer, length=length, bos_id=bos_id).ids
        form, given = "plain text, windows", len(windows)
        rows = [(ids, torch.ones(length, dtype=torch.bool)) for ids in windows]
    rows = [begun(ids, counts, bos_id) for ids, counts in rows]
    usable = [row for row in (_example(ids, counts, length) for ids, counts in rows) if row is not None]
    if not usable:
        raise DataError(
            f"'{read.name}': no row has a counted token within {length} tokens; prompts are longer than that, or "
            "there are no responses. Raise max_length, or bring other data"
        )
    if len(usable) < 2:
        raise DataError(f"'{read.name}' gives one row of {length} tokens; at least 2 are needed, one to hold out")
    order = torch.randperm(len(usable), generator=Run(settings.seed).rng("held out")).tolist()
    some = settings.held_out_of(len(usable))
    train = tuple(usable[row] for row in sorted(order[some:]))
    held_out = tuple(usable[row] for row in sorted(order[:some]))
    facts = TrainingData(
        name=PurePath(read.name).name if len(PurePath(read.name).parts) > 1 else read.name, form=form,
        **{key: read.provenance[key] for key in ("sha256", "text_sha256", "revision") if key in read.provenance},
        rows=given, dropped=given - len(usable), cut=sum(len(ids) > length for ids, _ in rows), train=len(train),
        held_out=some, train_tokens=sum(len(row.ids) for row in train),
        counted_tokens=sum(int((row.labels != IGNORED).sum()) for row in train), bos=bos_id is not None,
        licence=None, licence_known_by=None, fingerprint=_fingerprint(train, held_out),
    )  # fmt: skip
    return Examples(train, held_out, facts)


def _fingerprint(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    """sha256 over ids and labels, in order."""
    digest = hashlib.sha256(f"{len(train)} {len(held_out)}".encode())
    for row in (*train, *held_out):
        digest.update(str(len(row.ids)).encode())
        digest.update(row.ids.numpy().tobytes())
        digest.update(row.labels.numpy().tobytes())
    return digest.hexdigest()


def collate(rows: Sequence[Example], pad: int = 0) -> dict[str, Tensor]:
    """Rows as one batch, filled up at their ends: input_ids and labels, (rows, longest).

    No attention mask is needed: attention is causal, so no token sees what fills up behind it.
    """
    return {
        "input_ids": pad_sequence([row.ids for row in rows], batch_first=True, padding_value=pad),
        "labels": pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORED),
    }


def _example(ids: Tensor, counts: Tensor, length: int) -> Example | None:
    """The row cut to `length`, None if nothing in it counts."""
    ids, counts = ids[:length], counts[:length].clone()
    counts[:1] = False
    if not counts.any():
        return None
    return Example(ids.clone(), torch.where(counts, ids, IGNORED))


def _instructions(
    rows: Iterable[Instruction], tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[tuple[Tensor, Tensor]]:
    answered = [row for row in rows if row.output.strip()]
    if template == "chat":
        asked = [f"{row.instruction}\n\n{row.input}" if row.input else row.instruction for row in answered]
        chats = [
            [{"role": "user", "content": user}, {"role": "assistant", "content": row.output}]
            for user, row in zip(asked, answered, strict=True)
        ]
        return [_conversation(chat, tokenizer, number) for number, chat in enumerate(chats)]
    start = tokenizer("", verbose=False)["input_ids"]  # what the tokenizer begins a text with, if anything
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id in start else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [_encode(row.text, [(len(row.prompt), len(row.text))], tokenizer, begin, end) for row in answered]


def _conversation(messages: Conversation, tokenizer: PreTrainedTokenizerBase, row: int) -> tuple[Tensor, Tensor]:
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, which conversations (and template 'chat') need")
    text = render_conversation(tokenizer, messages, row)
    return _encode(text, response_spans(tokenizer, messages, text, row), tokenizer)


def _encode(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase,
    begin: Sequence[int] = (), end: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ids between those given, and whether each counts: inside one of the character spans, or of `end`."""
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} cannot tell where its tokens lie in the text; a fast one can")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counts = counted(encoded["offset_mapping"], spans)
    ids = torch.tensor([*begin, *encoded["input_ids"], *end], dtype=torch.long)
    return ids, torch.tensor([*(False for _ in begin), *counts, *(True for _ in end)], dtype=torch.bool)
