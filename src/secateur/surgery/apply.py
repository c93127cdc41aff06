"""The only code that changes a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from secateur.errors import InvalidEditError, UnsupportedEditError
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.model.modeling_secateur import Family, drop_attention, drop_mlp, keep_heads, keep_neurons
from secateur.model.views import Block, twin
from secateur.surgery.edits import (
    BlockEdit,
    CentreEmbedding,
    DropAttention,
    DropBlock,
    DropMLP,
    Edit,
    FoldNorms,
    KeepHeads,
    KeepNeurons,
    Rebase,
    SetWeight,
    StreamEdit,
    UntieHead,
)
from secateur.surgery.stream import bridge, change_stream


def apply(model: Model, edit: Edit) -> None:
    """Make an edit real: modules shrink, the configuration follows. An edit that is refused changes nothing.

    Raises:
        UnsupportedEditError: the family cannot do it.
        InvalidEditError: the edit does not fit the model, or changes what a walk under way has computed already.
    """
    require_edits(model.family, type(edit))
    _check_walks(model, edit)
    if isinstance(edit, StreamEdit):
        change_stream(model, edit)
    elif isinstance(edit, DropBlock):
        _check_drop(model, edit)
        bridge(model, edit.block)
        model.forget_block(edit.block)
    else:
        with model.open(edit.block, write=True) as block, torch.no_grad():
            _check_block(block, edit)
            _change(block, edit)
    model.edits_applied += 1
    model.state_config()


@contextmanager
def trial(block: Block, edits: Sequence[BlockEdit]) -> Iterator[None]:
    """For the time of the context the block is edited so, then it is as it was. Tensors that stay are not copied."""
    family, module = block.family, block.module
    norms = (*family.attention_norms, *family.mlp_norms, *family.shared_norms)
    parts = {path: module.get_submodule(path) for path in (family.attention, *family.mlp, *norms)} if edits else {}
    try:
        for path, part in parts.items():
            module.set_submodule(path, twin(part))
        with torch.no_grad():
            for edit in edits:
                _check_block(block, edit)
                _change(block, edit)
        yield
    finally:
        for path, part in parts.items():
            module.set_submodule(path, part)


def predict(layout: Layout, edit: Edit) -> Layout:
    """The layout after an edit, by arithmetic alone."""
    match edit:
        case UntieHead():
            return layout.with_ends(replace(layout.ends, tied=False))
        case CentreEmbedding():
            return layout
        case FoldNorms():
            return layout.folded()
        case Rebase():
            return layout.rebased(edit.site, edit.basis.shape[1])
    before = layout.blocks[edit.block]
    match edit:
        case DropBlock():
            return layout.without_block(edit.block)
        case DropAttention():
            return layout.with_block(edit.block, before.without_attention())
        case DropMLP():
            return layout.with_block(edit.block, before.without_mlp())
        case KeepNeurons():
            return layout.with_block(edit.block, before.with_width(len(edit.index)))
        case KeepHeads():
            return layout.with_block(edit.block, before.with_kv_heads(len(edit.index)))
        case SetWeight():
            return layout


def require_edits(family: Family, *kinds: type[Edit]) -> None:
    """Check that a family can do edits of these kinds.

    Raises:
        UnsupportedEditError: it cannot; with the reason.
    """
    for kind in kinds:
        stream = kind in get_args(StreamEdit)
        reason = family.cannot.get(kind.__name__) or (family.no_rebase if stream else None)
        if reason is not None:
            raise UnsupportedEditError(f"{family.model_type} cannot do {kind.__name__}: {reason}")


def _check_walks(model: Model, edit: Edit) -> None:
    """Refuse an edit behind a walk. Folding and untying change no activation."""
    match edit:
        case FoldNorms() | UntieHead():
            return
        case CentreEmbedding():
            place = None
        case Rebase():
            place = edit.site // 2
        case _:
            place = edit.block
    for guard in list(model.guards):  # one may take its leave
        if (reason := guard(place)) is not None:
            raise InvalidEditError(reason)


def _check_drop(model: Model, edit: DropBlock) -> None:
    model.position(edit.block)
    if len(model.numbers) == 1:
        raise InvalidEditError(f"block {edit.block} is the last one; a model needs at least one")


def _change(block: Block, edit: BlockEdit) -> None:
    module, family = block.module, block.family
    match edit:
        case DropAttention():
            drop_attention(module, family)
        case DropMLP():
            drop_mlp(module, family)
        case KeepNeurons():
            keep_neurons(module, family, torch.tensor(edit.index))
            if edit.out_weight is not None:
                block.set_weight("mlp_out", edit.out_weight)
        case KeepHeads():
            keep_heads(module, family, torch.tensor(edit.index))
            if edit.out_weight is not None:
                block.set_weight("attention_out", edit.out_weight)
        case SetWeight():
            block.set_weight(edit.role, edit.tensor)


def _check_block(block: Block, edit: BlockEdit) -> None:
    if isinstance(edit, (DropAttention, KeepHeads)) and not block.has_attention:
        raise InvalidEditError(f"block {block.number} has no attention")
    if isinstance(edit, (DropMLP, KeepNeurons)) and not block.has_mlp:
        raise InvalidEditError(f"block {block.number} has no MLP")
    match edit:
        case KeepNeurons():
            _check_index(block, edit.index, block.shape.width, "neurons")
            _check_weight(block, edit.out_weight, (block.weight("mlp_out").shape[0], len(edit.index)))
        case KeepHeads():
            _check_index(block, edit.index, block.shape.kv_heads, "KV heads")
            rows, columns = block.weight("attention_out").shape
            columns = columns // block.shape.kv_heads * len(edit.index)
            _check_weight(block, edit.out_weight, (rows, columns))
        case SetWeight():
            if edit.role not in block.roles:
                raise InvalidEditError(f"block {block.number} has no '{edit.role}'; it has {', '.join(block.roles)}")
            _check_weight(block, edit.tensor, tuple(block.weight(edit.role).shape))


def _check_index(block: Block, index: Sequence[int], size: int, what: str) -> None:
    if not index:
        raise InvalidEditError(f"block {block.number}: keeping no {what} would empty the module; drop it instead")
    if list(index) != sorted(set(index)) or index[0] < 0 or index[-1] >= size:
        raise InvalidEditError(
            f"block {block.number} has {size} {what}; the kept ones must be distinct, ascending and among them"
        )


def _check_weight(block: Block, weight: Tensor | None, shape: tuple[int, ...]) -> None:
    if weight is None:
        return
    if tuple(weight.shape) != shape:
        raise InvalidEditError(f"block {block.number}: the weight has shape {tuple(weight.shape)}, not {shape}")
    if weight.is_meta:
        if not next(block.module.parameters()).is_meta:  # of a hollow model
            raise InvalidEditError(f"block {block.number}: the edit only names its weight, as records do")
        return
    if not torch.isfinite(weight).all():
        raise InvalidEditError(f"block {block.number}: the weight has NaN or Inf")
