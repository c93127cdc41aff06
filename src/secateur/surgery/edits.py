"""Edits: frozen data that say what to remove or change. Block numbers are those of the model as loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from secateur.errors import InvalidEditError


@dataclass(frozen=True)
class DropBlock:
    """Remove a whole block."""

    block: int


@dataclass(frozen=True)
class DropAttention:
    """Remove a block's attention and its norm; the residual stream passes by."""

    block: int


@dataclass(frozen=True)
class DropMLP:
    """Remove a block's MLP and its norm; the residual stream passes by."""

    block: int


@dataclass(frozen=True, eq=False)
class KeepNeurons:
    """Keep some FFN neurons of a block.

    Attributes:
        index: numbers of the kept neurons, ascending.
        out_weight: new weight of the output projection, (hidden, kept), where the method compensates.
    """

    block: int
    index: tuple[int, ...]
    out_weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class KeepHeads:
    """Keep some KV groups of a block: each KV head with the query heads that read it.

    Attributes:
        index: numbers of the kept KV heads, ascending.
        out_weight: new weight of the output projection, (hidden, kept query heads * head_dim).
    """

    block: int
    index: tuple[int, ...]
    out_weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SetWeight:
    """Replace the weight of one linear map by another of the same shape.

    Attributes:
        role: q, k, v (or qkv), attention_out, gate, up (or gate_up), mlp_out.
        tensor: the new weight, (out, in).
    """

    block: int
    role: str
    tensor: Tensor


@dataclass(frozen=True)
class UntieHead:
    """Give the LM head a matrix of its own, a copy of the embedding's."""


@dataclass(frozen=True)
class CentreEmbedding:
    """Subtract from each token's embedding the mean of its coordinates. This changes the model."""


@dataclass(frozen=True)
class FoldNorms:
    """Move the scales of the blocks' RMSNorms into the linear maps that read them; no logit changes."""


@dataclass(frozen=True, eq=False)
class Rebase:
    """Express the residual stream at one site in other coordinates: fewer, where the basis has fewer columns.

    With a square basis no logit changes. The norms must be folded before.

    Attributes:
        site: 2n: what enters block n; 2n + 1: between its attention and its MLP; after the last block: what enters
            the final norm.
        basis: (coordinates before, coordinates after), orthonormal columns.
    """

    site: int
    basis: Tensor


BlockEdit = DropBlock | DropAttention | DropMLP | KeepNeurons | KeepHeads | SetWeight
StreamEdit = UntieHead | CentreEmbedding | FoldNorms | Rebase
Edit = BlockEdit | StreamEdit
EDITS: dict[str, type[Edit]] = {cls.__name__: cls for cls in (*get_args(BlockEdit), *get_args(StreamEdit))}


def named(edit: Edit) -> Edit:
    """What is kept of an edit once it is real: each tensor on `meta`, with its name, the sha256 of its bytes."""
    tensors = {field.name: getattr(edit, field.name) for field in fields(edit)}
    names: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            names[name] = tensor.detach().to("meta")
            names[name].sha256 = _sha256(tensor)
    return replace(edit, **names) if names else edit


def to_json(edit: Edit) -> dict[str, Any]:
    """An edit as JSON; a tensor is named by the sha256 of its bytes."""
    entry: dict[str, Any] = {"edit": type(edit).__name__}
    for field in fields(edit):
        value = getattr(edit, field.name)
        if isinstance(value, Tensor):
            digest = getattr(value, "sha256", None) or _sha256(value)
            entry[field.name] = {"sha256": digest, "shape": list(value.shape)}
        elif isinstance(value, tuple):
            entry[field.name] = list(value)
        elif value is not None:
            entry[field.name] = value
    return entry


def from_json(entry: dict[str, Any]) -> Edit:
    """The edit of a record.

    Raises:
        InvalidEditError: unknown kind or fields, or an edit that carries a tensor, which a record only names.
    """
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in entry.items() if name != "edit"
    }
    if any(isinstance(value, dict) for value in values.values()):
        where = f"block {entry['block']}" if "block" in entry else f"site {entry.get('site')}"
        raise InvalidEditError(f"{entry['edit']} of {where} carries a tensor, which the record only names")
    try:
        return EDITS[entry["edit"]](**values)
    except (KeyError, TypeError) as error:
        raise InvalidEditError(f"no valid edit: {entry}") from error


def keep(index: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Indices in the form that edits take: ascending whole numbers."""
    return tuple(sorted(int(i) for i in index))


def _sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
