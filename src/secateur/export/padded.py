"""A stock checkpoint of any pruned model: what differs from block to block is filled up with zeros.

It loads everywhere and computes the same logits, at the speed of its widest block: little memory is saved. A neuron, a
head or a module of zeros adds exactly zero to the residual stream: its output projection reads nothing from it. Heads
are added by whole KV groups behind those that are there, so every query head reads the KV head that it read before.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from secateur.export.spelling import add_old_spelling
from secateur.export.stock import config_of_shape, versions
from secateur.export.weights import write_model
from secateur.hf import quiet_transformers
from secateur.model.handle import Model
from secateur.model.modeling_secateur import (
    Family,
    Linear,
    Shape,
    has_attention,
    has_mlp,
    head_dim_of,
    plain_config,
    row_dim,
    shape_of,
)

REBASED = (
    "takes a residual stream that is the same at every block; this one was rotated or sliced, which puts a matrix on "
    "each residual branch that no zeros make up for"
)
LIBRARY = "transformers"  # as the hub calls it
USAGE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR")
```

transformers was run with this form."""


def refuses(model: Model) -> str | None:
    target = _target(model)
    return target if isinstance(target, str) else None


def write(model: Model, folder: Path, max_shard_size: str = "5GB") -> dict[str, str]:
    config = _target(model)
    assert not isinstance(config, str), config  # else `refuses` said so
    sums = write_model(_Padded(model, config), folder, max_shard_size)
    add_old_spelling(folder, config, model.family)
    return sums


def nbytes(model: Model) -> int:
    config = _target(model)
    assert not isinstance(config, str), config
    return sum(parameter.nbytes for parameter in _Padded(model, config).hf.parameters())


def loads_in(model: Model) -> str:
    config = _target(model)
    said = "transformers 5" if isinstance(config, str) else versions(config, model.family)
    return f"{said}, and whatever loads a stock {model.family.model_type} model"


def stream_is_plain(model: Model) -> bool:
    """Whether every block reads and writes the residual stream in the coordinates and the width of the whole."""
    layout = model.layout()
    ends = layout.ends
    mapped = ends.input_map or ends.output_map or {ends.input, ends.output} != {ends.hidden}
    return not (layout.is_rebased or mapped)


def _target(model: Model) -> PreTrainedConfig | str:
    """The configuration of the smallest stock model that holds every block; or why there is none."""
    if not stream_is_plain(model):
        return REBASED
    family, blocks = model.family, list(model.layout().blocks.values())
    shapes = [block.shape for block in blocks]
    stated: Any = plain_config(model.hf.config, family, shapes)
    heads = getattr(stated, family.query_heads)
    most = getattr(stated, family.kv_heads) if family.kv_heads else heads
    head_dim = max(block.head_dim for block in blocks) or getattr(stated, "head_dim", stated.hidden_size // heads)
    width = max(shape.width for shape in shapes) or 1
    config: PreTrainedConfig | str = "has no such number of heads"
    for groups in range(max(shape.kv_heads for shape in shapes) or 1, most + 1):  # a stock class may not take fewer
        config = config_of_shape(model, Shape(width, groups * heads // most, groups), head_dim)
        if not isinstance(config, str):
            break
    return config


class _Padded:
    """A stock model without weights, whose tensors are made of a model's, part by part; `Parts` of `write_model`."""

    def __init__(self, model: Model, config: PreTrainedConfig) -> None:
        with torch.device("meta"), quiet_transformers():
            self.hf: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        self.hf.generation_config = model.hf.generation_config
        self.numbers = model.numbers
        self._model = model
        self._blocks: nn.ModuleList = self.hf.get_submodule(model.family.blocks)
        dtypes = {name: tensor.dtype for name, tensor in model.hf.state_dict().items()}
        for name, parameter in self.hf.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, model.dtype))

    def open(self, number: int) -> AbstractContextManager[Any]:
        return self._model.open(number)

    def open_ends(self) -> AbstractContextManager[None]:
        return self._model.open_ends()

    def state(self, number: int | None = None) -> dict[str, Tensor]:
        """The tensors of a part by name, zeros among them; those of closed parts are worth their shapes only."""
        model, family = self._model, self._model.family
        there = model.state(number)
        if number is None:
            inside = f"{family.blocks}."
            wanted = {name: tensor for name, tensor in self.hf.state_dict().items() if not name.startswith(inside)}
            like = model.hf.get_input_embeddings().weight
            return {name: there[name] if name in there else _filler(name, want, like) for name, want in wanted.items()}
        place = model.position(number)
        return padded_block(model.blocks[place], self._blocks[place], family, f"{family.blocks}.{place}.")


def padded_block(block: nn.Module, target: Any, family: Family, prefix: str) -> dict[str, Tensor]:
    """A block's tensors in the shapes of a larger one.

    Args:
        block: with any shape; on `meta` where it is closed.
        target: a stock block that is at least as large in everything, on `meta`.
        prefix: put before the names.

    Returns:
        Each tensor of the target by name. What is added to a linear map is zero; a norm that is not there has scale 1.
    """
    there = block.state_dict()
    like = next(iter(there.values()), torch.empty(0))
    sizes = _sizes(block, family), _sizes(target, family)
    made: dict[str, Tensor] = {}
    for name, want in target.state_dict().items():
        path, _, kind = name.rpartition(".")
        if name not in there:
            made[prefix + name] = _filler(name, want, like, norm=not isinstance(target.get_submodule(path), Linear))
            continue
        tensor = there[name]
        for rows in (True, False):
            have, need = (size.get((path, rows)) for size in sizes)
            if have and need and (rows or kind == "weight"):
                dim = 0 if kind == "bias" else row_dim(target.get_submodule(path)) ^ (not rows)
                tensor = _stretched(tensor, dim, have, need)
        made[prefix + name] = tensor
    return made


def _sizes(block: nn.Module, family: Family) -> dict[tuple[str, bool], tuple[int, ...]]:
    """How many rows (True) or columns (False) of each linear map belong to heads or neurons; several where parts of
    that many lie one behind the other in one map. Maps that are gone are not in it."""
    shape, sizes = shape_of(block, family), {}
    if has_attention(block, family):
        head_dim = head_dim_of(block, family)
        query, kv = shape.query_heads * head_dim, shape.kv_heads * head_dim
        of_layout: dict[str, list[tuple[int, ...]]] = {
            "separate": [(query,), (kv,), (kv,)],
            "blocks": [(query, kv, kv)],
            "per_head": [(query + kv + kv,)],
        }
        rows = zip(family.qkv, of_layout[family.qkv_layout], strict=True)
        sizes = {(path, True): parts for path, parts in rows} | {(family.out, False): (query,)}
    if has_mlp(block, family):
        sizes |= {(path, True): (shape.width,) * (1 + family.fused_mlp_in) for path in family.mlp_in}
        sizes |= {(family.mlp_out, False): (shape.width,)}
    return sizes


def _stretched(tensor: Tensor, dim: int, have: Iterable[int], need: Iterable[int]) -> Tensor:
    """A tensor whose parts along `dim`, `have` long, are `need` long, with zeros behind each."""
    have, need = list(have), list(need)
    if have == need:
        return tensor
    pieces = []
    for part, length in zip(tensor.detach().split(have, dim), need, strict=True):
        shape = list(part.shape)
        shape[dim] = length - part.shape[dim]
        pieces += [part, part.new_zeros(shape)]
    return torch.cat(pieces, dim)


def _filler(name: str, want: Tensor, like: Tensor, *, norm: bool = True) -> Tensor:
    """What stands for a tensor that the model has not: scales of norms are one, all else is zero."""
    value = float(norm and name.endswith("weight"))
    return torch.full(want.shape, value, dtype=want.dtype, device=like.device)
