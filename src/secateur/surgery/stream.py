"""Changing the basis of the residual stream: what the edits `FoldNorms`, `Rebase` and their like do to weights.

All arithmetic is float64, cast back to the weights' dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InvalidEditError
from secateur.model.handle import Model
from secateur.model.layout import around, final_site
from secateur.model.modeling_secateur import (
    SKIPS,
    FoldedNorm,
    MappedEmbedding,
    MappedNorm,
    fold_block,
    map_embedding,
    set_width,
)
from secateur.model.views import Block
from secateur.surgery.edits import CentreEmbedding, FoldNorms, Rebase, StreamEdit, UntieHead

ORTHONORMAL = 1e-3  # how far a basis' Gram matrix may be from the identity; a basis in bfloat16 is farther


@torch.no_grad()
def change_stream(model: Model, edit: StreamEdit) -> None:
    """Make an edit of the residual stream real. One that is refused changes nothing.

    Raises:
        InvalidEditError: the edit does not fit the model.
    """
    match edit:
        case UntieHead():
            with model.open_ends(write=True):
                _untie_head(model)
        case CentreEmbedding():
            with model.open_ends(write=True):
                _centre_embedding(model)
        case FoldNorms():
            _fold_norms(model)
        case Rebase():
            _rebase(model, edit)


@torch.no_grad()
def bridge(model: Model, number: int) -> None:
    """Prepare a block for going: what writes the stream before it takes over the maps on its residual branch."""
    with model.open(number) as block:
        maps = (getattr(block.module, name, None) for name in SKIPS)
        skips = [skip.double() for skip in maps if skip is not None]
    after = [later for later in model.numbers if later > number]
    next_site = 2 * after[0] if after else final_site(model.numbers)
    if not skips:
        model.rebases.append((2 * number, next_site, None))
        return
    bridged = skips[0] @ skips[1] if len(skips) == 2 else skips[0]
    writer = around(model.numbers, 2 * number)[0]
    if writer is None:
        with model.open_ends(write=True):
            _rebase_embedding(model, bridged)
    else:
        with model.open(writer[0], write=True) as before:
            _rebase_writer(before, writer[1], bridged, model)
    model.rebases.append((2 * number, next_site, bridged))


def _untie_head(model: Model) -> None:
    layout = model.layout()
    if not layout.ends.tied:
        raise InvalidEditError("the head is not tied to the embedding")
    if layout.is_rebased:
        raise InvalidEditError("the residual stream was rebased already; untie the head before")
    head = model.hf.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.hf.config.tie_word_embeddings = False
    model.hf.all_tied_weights_keys = {}


def _centre_embedding(model: Model) -> None:
    layout = model.layout()
    if layout.ends.tied:
        raise InvalidEditError("the head shares the embedding's matrix; untie it before the embedding is centred")
    if layout.is_rebased:
        raise InvalidEditError("the residual stream was rebased already; centre the embedding before")
    weight = model.hf.get_input_embeddings().weight
    wide = weight.double()
    weight.copy_(wide - wide.mean(dim=1, keepdim=True))


def _fold_norms(model: Model) -> None:
    if model.layout().is_folded:
        raise InvalidEditError("the norms are folded already")
    for number in model.numbers:
        with model.open(number, write=True) as block:
            for half, norms in enumerate((block.family.attention_norms, block.family.mlp_norms)):
                for linear in _readers(block, half):
                    scale: Any = block.module.get_submodule(norms[0]).weight
                    _set(linear, "weight", linear.weight.double() * scale.double())
            fold_block(block.module, block.family)


def _rebase(model: Model, edit: Rebase) -> None:
    """Rotate what writes the stream at the site and what reads it, one block open after the other."""
    layout, basis = model.layout(), edit.basis
    writer, reader = around(model.numbers, edit.site)
    if not layout.is_folded:
        raise InvalidEditError("the norms' scales do not commute with a rotation; FoldNorms comes first")
    _check_basis(edit, layout.stream_width(edit.site))
    if writer is None:
        with model.open_ends(write=True):
            _rebase_embedding(model, basis)
    else:
        with model.open(writer[0], write=True) as block:
            _rebase_writer(block, writer[1], basis, model)
    if reader is None:
        with model.open_ends(write=True):
            _rebase_head(model, basis)
    else:
        with model.open(reader[0], write=True) as block:
            _rebase_reader(block, reader[1], basis, model)
    model.rebases.append((edit.site, edit.site, basis))


def _check_basis(edit: Rebase, width: int) -> None:
    basis = edit.basis
    if basis.dim() != 2 or basis.shape[0] != width or not 1 <= basis.shape[1] <= width:
        raise InvalidEditError(
            f"site {edit.site} has {width} coordinates; the basis has shape {tuple(basis.shape)}, not ({width}, k)"
        )
    if basis.is_meta:  # made up by a rehearsal
        return
    gram = basis.double().T @ basis.double()
    error = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
    if not error < ORTHONORMAL:  # NaN too
        raise InvalidEditError(
            f"the basis of site {edit.site} is not orthonormal: its Gram matrix is off by {error:.2g}"
        )


def _rebase_writer(block: Block, half: int, basis: Tensor, model: Model) -> None:
    """What is added to the stream, W <- Q^T W and b <- Q^T b, and its residual branch, S <- S Q."""
    if (block.has_attention, block.has_mlp)[half]:
        _turn_rows(_linear(block, (block.family.out, block.family.mlp_out)[half]), basis)
    skip, q = _skip_and(basis, block, half, model)
    _set_skip(block, half, q if skip is None else skip @ q, model)


def _rebase_reader(block: Block, half: int, basis: Tensor, model: Model) -> None:
    """What reads the stream, W <- W Q, and its residual branch, S <- Q^T S."""
    for linear in _readers(block, half):
        _turn_columns(linear, basis)
    skip, q = _skip_and(basis, block, half, model)
    _set_skip(block, half, q.T if skip is None else q.T @ skip, model)


def _rebase_embedding(model: Model, basis: Tensor) -> None:
    embedding = model.hf.get_input_embeddings()
    q = basis.to(embedding.weight.device, torch.float64)
    ends = model.layout().ends
    if not (ends.tied or ends.input_map):
        set_width(embedding, (embedding.weight.double() @ q).to(embedding.weight.dtype))
        return
    old = embedding.map.double() if isinstance(embedding, MappedEmbedding) else None
    map_embedding(embedding, (q if old is None else old @ q).to(embedding.weight.dtype))


def _rebase_head(model: Model, basis: Tensor) -> None:
    """The final norm loses its scale: an untied head takes it, or the map back to a tied head's coordinates."""
    head, norm = model.hf.get_output_embeddings(), model.hf.get_submodule(model.family.final_norm)
    ends = model.layout().ends
    mapped = ends.tied or ends.output_map
    place = head.weight.device if not mapped else next(norm.parameters()).device
    q = basis.to(place, torch.float64)
    if isinstance(norm, FoldedNorm):
        width, eps, scale = norm.width, norm.eps, torch.ones(1, device=place, dtype=torch.float64)
    else:
        width, eps, scale = norm.weight.numel(), norm.variance_epsilon, norm.weight.double().to(place)
    if mapped:
        old = norm.map.double() if isinstance(norm, MappedNorm) else torch.diag(scale)  # (stream, hidden)
        new_norm: FoldedNorm = MappedNorm(width, eps, (q.T @ old).to(head.weight.dtype))
    else:
        new_norm = FoldedNorm(width, eps)
        set_width(head, (head.weight.double() * scale @ q).to(head.weight.dtype))
    model.hf.set_submodule(model.family.final_norm, new_norm)


def _readers(block: Block, half: int) -> list[nn.Linear]:
    """The linear maps that read the stream for the attention (0) or the MLP (1), if it is there."""
    there, paths = ((block.has_attention, block.family.qkv), (block.has_mlp, block.family.mlp_in))[half]
    return [_linear(block, path) for path in paths] if there else []


def _linear(block: Block, path: str) -> nn.Linear:
    return block.linear(path)  # type: ignore[return-value]  # no family with `Conv1D` can be rebased


def _turn_rows(linear: nn.Linear, basis: Tensor) -> None:
    q = basis.to(linear.weight.device, torch.float64)
    _set(linear, "weight", q.T @ linear.weight.double())
    if linear.bias is not None:
        _set(linear, "bias", q.T @ linear.bias.double())
    linear.out_features = q.shape[1]


def _turn_columns(linear: nn.Linear, basis: Tensor) -> None:
    _set(linear, "weight", linear.weight.double() @ basis.to(linear.weight.device, torch.float64))
    linear.in_features = basis.shape[1]


def _set(linear: nn.Linear, name: str, value: Tensor) -> None:
    old = getattr(linear, name)
    setattr(linear, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))


def _skip_and(basis: Tensor, block: Block, half: int, model: Model) -> tuple[Tensor | None, Tensor]:
    """The map on a residual branch (None for the identity) and the basis, float64 on the block's device."""
    old = getattr(block.module, SKIPS[half])
    return None if old is None else old.double(), basis.to(_like(block, model).device, torch.float64)


def _set_skip(block: Block, half: int, value: Tensor, model: Model) -> None:
    like = _like(block, model)
    setattr(
        block.module, SKIPS[half], nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
    )


def _like(block: Block, model: Model) -> Tensor:
    """A parameter of the block; one from outside where it lost them all."""
    for parameter in block.module.parameters():
        return parameter
    with model.open_ends():
        weight: Tensor = model.hf.get_input_embeddings().weight
        return weight
