"""A model as numbers: what each block has, and what every part costs in parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from secateur.model.modeling_secateur import (
    Family,
    Linear,
    Shape,
    has_attention,
    has_mlp,
    head_dim_of,
    in_features,
    out_features,
    shape_of,
)

if TYPE_CHECKING:
    from secateur.model.handle import Model


@dataclass(frozen=True)
class BlockLayout:
    """One block in numbers. All but `shape` and `head_dim` count parameters; biases count with their module.

    Attributes:
        attention, mlp: the module itself, 0 where it is gone.
        attention_norms, mlp_norms: the norms that go with it.
        shared_norms: the norms that go with the second of the two.
        neuron: one FFN neuron (its gate and up rows, its down column).
        kv_group: one KV head with the query heads that read it.
        rest: whatever else the block has.
    """

    shape: Shape
    head_dim: int
    attention: int
    attention_norms: int
    mlp: int
    mlp_norms: int
    neuron: int
    kv_group: int
    rest: int
    shared_norms: int = 0

    @property
    def parameters(self) -> int:
        norms = self.attention_norms + self.mlp_norms + self.shared_norms
        return self.attention + self.mlp + norms + self.rest

    def without_attention(self) -> BlockLayout:
        shape = Shape(self.shape.width, 0, 0)
        shared = self.shared_norms if self.shape.width else 0
        return replace(
            self, shape=shape, head_dim=0, attention=0, attention_norms=0, shared_norms=shared, kv_group=0
        )  # fmt: skip

    def without_mlp(self) -> BlockLayout:
        shape = replace(self.shape, width=0)
        shared = self.shared_norms if self.shape.kv_heads else 0
        return replace(self, shape=shape, mlp=0, mlp_norms=0, shared_norms=shared, neuron=0)

    def with_width(self, width: int) -> BlockLayout:
        gone = self.shape.width - width
        return replace(self, shape=replace(self.shape, width=width), mlp=self.mlp - gone * self.neuron)

    def with_kv_heads(self, kv_heads: int) -> BlockLayout:
        group = self.shape.query_heads // self.shape.kv_heads
        shape = Shape(self.shape.width, kv_heads * group, kv_heads)
        gone = self.shape.kv_heads - kv_heads
        return replace(self, shape=shape, attention=self.attention - gone * self.kv_group)


@dataclass(frozen=True)
class Layout:
    """A whole model in numbers.

    Attributes:
        blocks: by block number of the model as loaded; a dropped block is absent.
        other: parameters outside the blocks (embeddings, final norm, head), tied ones counted once.
    """

    blocks: Mapping[int, BlockLayout]
    other: int

    @classmethod
    def of(cls, model: Model) -> Layout:
        """Read the layout off the real modules. Shapes need no weights, so no block is opened."""
        family, modules = model.family, list(model.blocks)
        blocks = {number: read_block(module, family) for number, module in zip(model.numbers, modules, strict=True)}
        inside = {id(parameter) for module in modules for parameter in module.parameters()}
        return cls(blocks=blocks, other=sum(p.numel() for p in model.hf.parameters() if id(p) not in inside))

    @property
    def block_parameters(self) -> int:
        return sum(block.parameters for block in self.blocks.values())

    @property
    def parameters(self) -> int:
        return self.block_parameters + self.other

    def with_block(self, number: int, block: BlockLayout | None) -> Layout:
        """The same layout with one block replaced, or dropped."""
        blocks = {k: v for k, v in self.blocks.items() if k != number}
        if block is not None:
            blocks[number] = block
        return replace(self, blocks=dict(sorted(blocks.items())))

    @property
    def uniform(self) -> bool:
        """Whether a stock architecture can hold it: one shape for all blocks, and no module missing."""
        shapes = {block.shape for block in self.blocks.values()}
        return len(shapes) == 1 and all(shape.width and shape.kv_heads for shape in shapes)


def read_block(module: nn.Module, family: Family) -> BlockLayout:
    """Count one block's parameters, part by part."""

    def size(*paths: str) -> int:
        return sum(p.numel() for path in paths for p in module.get_submodule(path).parameters())

    shape = shape_of(module, family)
    attention = size(family.attention) if has_attention(module, family) else 0
    mlp = size(*family.mlp)
    norms = size(*family.attention_norms), size(*family.mlp_norms), size(*family.shared_norms)
    head_dim = head_dim_of(module, family) if attention else 0
    kv_group = 0
    if attention:
        rows = (shape.query_heads + 2 * shape.kv_heads) // shape.kv_heads * head_dim
        columns = shape.query_heads // shape.kv_heads * head_dim
        kv_group = rows * _row_cost(module, family.qkv[0]) + columns * _column_cost(module, family.out)
    neuron = 0
    if has_mlp(module, family):
        fused = 2 if family.fused_mlp_in else 1
        rows_cost = sum(fused * _row_cost(module, path) for path in family.mlp_in)
        neuron = rows_cost + _column_cost(module, family.mlp_out)
    rest = sum(p.numel() for p in module.parameters()) - attention - mlp - sum(norms)
    return BlockLayout(
        shape=shape,
        head_dim=head_dim,
        attention=attention,
        attention_norms=norms[0],
        mlp=mlp,
        mlp_norms=norms[1],
        neuron=neuron,
        kv_group=kv_group,
        rest=rest,
        shared_norms=norms[2],
    )


def _row_cost(module: nn.Module, path: str) -> int:
    linear: Linear = module.get_submodule(path)  # type: ignore[assignment]  # the family row says so
    return in_features(linear) + (linear.bias is not None)


def _column_cost(module: nn.Module, path: str) -> int:
    linear: Linear = module.get_submodule(path)  # type: ignore[assignment]  # the family row says so
    return out_features(linear)
