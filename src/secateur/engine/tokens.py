"""Token matrices: what statistics and losses are taken over."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.assets import Bos, Purpose, Text, TextSource, read_text
from secateur.engine.chat import render_chat
from secateur.errors import DataError, InvalidOptionError
from secateur.model.handle import Model, require_positions
from secateur.model.modeling_secateur import Family
from secateur.run import Run

Count = Literal["all", "responses"]


@dataclass(frozen=True)
class Tokens:
    """Equal-length windows of token ids, each token with a weight.

    Attributes:
        ids: (samples, length), int64.
        weights: (samples, length), float32. Statistics weigh token t by weights[t]; a loss weighs the prediction OF
            token t by weights[t]. Plain text has weight one everywhere.
        source: where they came from; goes into records.
    """

    ids: Tensor
    weights: Tensor
    source: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ids: Tensor, weights: Tensor | None = None, source: Mapping[str, Any] | None = None) -> Tokens:
        """Wrap ids (samples, length); weight one where none is given.

        Raises:
            InvalidOptionError: not a matrix of at least one window of two tokens, or weights of another shape.
        """
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise InvalidOptionError(f"token ids are (samples, length), length at least 2, not {tuple(ids.shape)}")
        if weights is not None and weights.shape != ids.shape:
            raise InvalidOptionError(f"weights {tuple(weights.shape)} do not fit ids {tuple(ids.shape)}")
        if weights is None:
            weights = torch.ones(ids.shape, dtype=torch.float32)
        return cls(ids.long().cpu(), weights.float().cpu(), dict(source or {}))

    @property
    def samples(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def first(self, samples: int, length: int | None = None) -> Tokens:
        """The first `samples` windows, cut to their first `length` tokens.

        Raises:
            InvalidOptionError: more is asked than there is.
        """
        length = check_cut(samples, length, self.samples, self.length)
        return replace(self, ids=self.ids[:samples, :length], weights=self.weights[:samples, :length])

    def fingerprint(self) -> str:
        """sha256 over ids and weights."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.contiguous().numpy().tobytes())
        digest.update(self.weights.contiguous().numpy().tobytes())
        return digest.hexdigest()


def check_cut(samples: int, length: int | None, have_samples: int, have_length: int) -> int:
    """Check that the first `samples` windows can be cut to `length` tokens (their own if None); return the length.

    Raises:
        InvalidOptionError: more is asked than there is.
    """
    length = have_length if length is None else length
    if not (1 <= samples <= have_samples and 2 <= length <= have_length):
        raise InvalidOptionError(
            f"{samples} windows of {length} tokens asked from {have_samples} of {have_length}; "
            "a window needs at least 2 tokens"
        )
    return length


_IDS = {"source": "memory", "name": "token ids as given"}

TokenSource: TypeAlias = "TextSource | Tensor | Tokens"  # what `read_tokens` reads


def ready(source: object) -> Tokens | None:
    """`Tokens`, or windows of token ids as a matrix (samples, length); None for what has to be read or cut first.

    Raises:
        InvalidOptionError: a tensor of something else.
    """
    if isinstance(source, Tokens):
        return source
    if not isinstance(source, Tensor):
        return None
    if source.dtype.is_floating_point or source.dtype.is_complex or source.dtype == torch.bool:
        raise InvalidOptionError(f"token ids are whole numbers, not {source.dtype}")
    if source.dim() == 1:
        return None
    tokens = Tokens.of(source)
    return replace(tokens, source={**_IDS, "samples": tokens.samples, "length": tokens.length})


def wants_bos(family: Family, bos: Bos) -> bool:
    """Whether a family's texts are begun by a begin-of-sequence token.

    Raises:
        InvalidOptionError: another word.
    """
    if bos not in get_args(Bos):
        raise InvalidOptionError(f"bos is one of {', '.join(get_args(Bos))}, not {bos!r}")
    return bos == "always" or (bos == "auto" and family.needs_bos)


def bos_id_of(model: Model, bos: Bos) -> int | None:
    """The token that a model's texts are begun by; None where they are not.

    Raises:
        InvalidOptionError: another word than `Bos` has.
        DataError: it is wanted, and the tokenizer has none.
    """
    if not wants_bos(model.family, bos):
        return None
    said_by = model.hf.config if model.tokenizer is None else model.tokenizer
    token: int | None = getattr(said_by, "bos_token_id", None)
    if token is None:
        why = f"{model.family.model_type} models need" if bos == "auto" else "bos 'always' asks for"
        raise DataError(
            f"{why} a begin-of-sequence token, and the tokenizer has none (bos_token): put the model's own tokenizer "
            "beside its weights, or ask for bos 'never'"
        )
    return token


def begun(ids: Tensor, weights: Tensor, bos_id: int | None, weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """Ids and weights (tokens,) that begin with `bos_id`, once; as they are if it is None.

    Args:
        weight: of a token that is put before them.
    """
    if bos_id is None or ids[:1].tolist() == [bos_id]:
        return ids, weights
    return torch.cat([ids.new_tensor([bos_id]), ids]), torch.cat([weights.new_tensor([weight]), weights])


def tokenize(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    samples: int | None = None,
    seed: int = 0,
    count: Count = "all",
    bos_id: int | None = None,
) -> Tokens:
    """Cut a corpus into windows, as the papers do: one token stream without special tokens, consecutive windows.

    Args:
        length: tokens per window, `bos_id` included.
        samples: how many windows; all whole ones if None.
        seed: 0 takes the first windows in order; any other seed draws from all windows without replacement.
        count: "all" tokens weigh one; "responses": only what the assistant says, in chat data.
        bos_id: begins each window, which is a sequence of its own. It is never predicted, and weighs one in statistics
            as any first token does (nothing if only responses count). A window that begins with it by itself, as a
            conversation may, gets no second one.

    Raises:
        DataError: fewer windows than asked, or nothing to count.
        InvalidOptionError: a value out of its range.
    """
    if length < 2 or (samples is not None and samples < 1):
        raise InvalidOptionError(f"need at least 1 window of at least 2 tokens, not {samples} of {length}")
    _check_count(count)
    if text.conversations is not None:
        ids, weights = render_chat(text.conversations, tokenizer, responses_only=count == "responses")
    elif count == "responses":
        raise _no_responses(text.name)
    else:
        ids = _encode(text.text or "", tokenizer)
        weights = torch.ones(len(ids))
    facts = {**text.provenance, "name": text.name, "count": count}
    tokens = _windows(
        ids, weights, facts, length=length, samples=samples, seed=seed, bos_id=bos_id, bos_weight=float(count == "all")
    )
    if not tokens.weights[:, 1:].any():
        raise DataError(f"the windows taken from '{text.name}' have no token of a response; take more or longer ones")
    return tokens


def _check_count(count: Count) -> None:
    if count not in get_args(Count):
        raise InvalidOptionError(f"count is one of {', '.join(get_args(Count))}, not {count!r}")


def _no_responses(name: str) -> DataError:
    return DataError(f"'{name}' is plain text; only chat data (rows with `messages`) has responses to count")


def _windows(
    ids: Tensor, weights: Tensor, facts: Mapping[str, Any], *, length: int, samples: int | None, seed: int,
    bos_id: int | None, bos_weight: float = 1.0,
) -> Tokens:  # fmt: skip
    """A stream of tokens (tokens,) cut into windows, as `tokenize` says.

    Args:
        bos_weight: of a `bos_id` that is put before a window.
    """
    rows, row_weights = _cut(ids, weights, length, bos_id, bos_weight)
    windows = len(rows)
    if windows < (samples or 1):
        raise DataError(
            f"'{facts['name']}' has {len(ids)} tokens, that is {windows} windows of {length}; {samples or 1} are "
            "needed. Ask for fewer or shorter windows, or bring a longer text"
        )
    order = torch.arange(windows)
    if seed:
        order = torch.randperm(windows, generator=Run(seed).rng("windows"))
    order = order[:samples]
    drawn = {"samples": len(order), "length": length, "seed": seed, "windows_available": windows}
    return Tokens.of(rows[order], row_weights[order], {**facts, **drawn, "bos": bos_id is not None})


def _cut(ids: Tensor, weights: Tensor, length: int, bos_id: int | None, bos_weight: float) -> tuple[Tensor, Tensor]:
    """Consecutive whole windows of a stream, ids and weights (windows, length)."""
    if bos_id is None:
        whole = len(ids) // length * length
        return ids[:whole].view(-1, length), weights[:whole].view(-1, length)
    windows: list[tuple[Tensor, Tensor]] = []
    start = 0
    while (end := start + length - (ids[start : start + 1].tolist() != [bos_id])) <= len(ids):
        windows.append(begun(ids[start:end], weights[start:end], bos_id, bos_weight))
        start = end
    if not windows:
        return ids.new_empty(0, length), weights.new_empty(0, length)
    return torch.stack([row for row, _ in windows]), torch.stack([row for _, row in windows])


def read_tokens(
    model: Model,
    source: TokenSource,
    *,
    purpose: Purpose,
    length: int,
    samples: int | None = None,
    seed: int = 0,
    count: Count | None = "all",
    bos: Bos = "auto",
    **places: Any,
) -> Tokens:
    """Windows for a model.

    Args:
        source: a text as `secateur.assets.read_text` takes it: a name, the path of a file, a list of documents or a
            `datasets.Dataset`. Or token ids: a stream (tokens,), which is cut as a text's is, or windows
            (samples, length), which are taken as they are; so are `Tokens`.
        purpose: "calibration" or "evaluation": which split of a named text.
        length, samples, seed, count: see `secateur.engine.tokens.tokenize`. If count is None, of chat data responses
            count, of plain text all.
        bos: whether each window that is cut begins with the begin-of-sequence token: "always", "never", or "auto", if
            the model's family needs it.
        places: of `read_text`: `data` (folder with the named texts, for machines without a hub), `cache`, `text_field`
            (the column of rows that holds text or conversations, where it is none that is known).

    Raises:
        DataError: the text is missing, unreadable or too short; the model has no tokenizer, or another model's, or one
            without the begin-of-sequence token that is wanted.
        InvalidOptionError: windows longer than the model's positions; a source of another kind; ids outside the
            vocabulary.
    """
    if count is not None:
        _check_count(count)
    wants_bos(model.family, bos)  # refuses another word, of ids as of a text
    if (tokens := ready(source)) is not None:
        check_tokens(model, tokens)
        return tokens
    require_positions(model.max_length, length)
    bos_id = bos_id_of(model, bos)
    if isinstance(source, Tensor):
        if count == "responses":
            raise _no_responses(_IDS["name"])
        stream = source.long().cpu()
        ones = torch.ones(len(stream))
        tokens = _windows(stream, ones, _IDS, length=length, samples=samples, seed=seed, bos_id=bos_id)
        check_tokens(model, tokens)
        return tokens
    if model.tokenizer is None:
        raise DataError("the model has no tokenizer; give token ids instead of a text")
    text = read_text(source, purpose=purpose, **places)
    count = count or ("all" if text.conversations is None else "responses")
    tokens = tokenize(text, model.tokenizer, length=length, samples=samples, seed=seed, count=count, bos_id=bos_id)
    if (highest := int(tokens.ids.max())) >= model.vocab_size:
        raise DataError(
            f"the tokenizer does not fit the model: it gives token id {highest} for '{text.name}', and the model's "
            f"vocabulary has {model.vocab_size}. Put the model's own tokenizer beside its weights"
        )
    return tokens


def check_tokens(model: Model, tokens: Tokens) -> None:
    low, high = int(tokens.ids.min()), int(tokens.ids.max())
    if low < 0 or high >= model.vocab_size:
        raise InvalidOptionError(f"token ids from {low} to {high} do not fit the vocabulary of {model.vocab_size}")
    if not (torch.isfinite(tokens.weights).all() and (tokens.weights >= 0).all() and tokens.weights.any()):
        raise InvalidOptionError("the tokens' weights must be finite and not negative, and some above 0")


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # verbose=False: a corpus is longer than the model's positions, which is no fault here
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
