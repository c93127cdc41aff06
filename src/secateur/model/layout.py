"""A model as numbers: what each block has, and what every part costs in parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from secateur.errors import InvalidEditError
from secateur.model import modeling_secateur as modeling
from secateur.model.modeling_secateur import Family, FoldedNorm, MappedEmbedding, MappedNorm, Shape

if TYPE_CHECKING:
    from secateur.model.handle import Model


BlockHalf = tuple[int, Literal[0, 1]]  # a block's number, and 0 for its attention or 1 for its MLP


def around(numbers: Iterable[int], site: int) -> tuple[BlockHalf | None, BlockHalf | None]:
    """What writes the residual stream at a site and what reads it; None for the embedding and for the head.

    Site 2n is what enters block n, site 2n + 1 lies between its attention and its MLP, and the site after the last
    block is what enters the final norm. Blocks that are gone have no sites.

    Raises:
        InvalidEditError: there is no such site.
    """
    numbers = list(numbers)
    if site == final_site(numbers):
        return (numbers[-1], 1), None
    number, half = divmod(site, 2)
    if number not in numbers:
        raise InvalidEditError(
            f"there is no site {site}: 2n and 2n + 1 for block n of {numbers}, {final_site(numbers)}"
        )
    if half:
        return (number, 0), (number, 1)
    place = numbers.index(number)
    return (numbers[place - 1], 1) if place else None, (number, 0)


def final_site(numbers: Iterable[int]) -> int:
    """The site that the final norm reads."""
    return 2 * max(numbers) + 2


@dataclass(frozen=True)
class Ends:
    """The two ends of the residual stream: what it comes from and what it goes to.

    Attributes:
        vocabulary, hidden: the shape of the stock embedding matrix.
        tied: the head shares that matrix.
        input, output: widths of the stream after the embedding and before the final norm.
        input_map, output_map: the embedding's (the head's) matrix stays as it is, as it must where they are tied, and a
            map leads to (from) the stream.
        scaled: the final norm has a scale of its own.
    """

    vocabulary: int
    hidden: int
    tied: bool
    input: int
    output: int
    input_map: bool = False
    output_map: bool = False
    scaled: bool = True

    @property
    def parameters(self) -> int:
        """Embedding, head, maps and the final norm's scale; biases are not among them."""
        widths = self.hidden if self.input_map else self.input, self.hidden if self.output_map else self.output
        matrices = widths[0] if self.tied else sum(widths)
        maps = self.input_map * self.input + self.output_map * self.output
        return self.vocabulary * matrices + self.hidden * (maps + self.scaled)


@dataclass(frozen=True)
class BlockLayout:
    """One block in numbers. All but `shape` and `head_dim` count parameters; biases count with their module.

    Attributes:
        attention, mlp: the module itself, 0 where it is gone.
        attention_norms, mlp_norms: the norms that go with it.
        shared_norms: the norms that go with the second of the two.
        neuron: one FFN neuron (its gate and up rows, its down column).
        kv_group: one KV head with the query heads that read it.
        rest: whatever else the block has: the maps on its residual branch.
        mlp_rows: rows of the MLP's input maps per neuron.
        attention_bias, mlp_bias: whether their output projections have one.
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
    mlp_rows: int = 2
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def parameters(self) -> int:
        norms = self.attention_norms + self.mlp_norms + self.shared_norms
        return self.attention + self.mlp + norms + self.rest

    def without_attention(self) -> BlockLayout:
        shape = replace(self.shape, query_heads=0, kv_heads=0)
        shared = self.shared_norms if self.shape.width else 0
        return replace(
            self, shape=shape, head_dim=0, attention=0, attention_norms=0, shared_norms=shared, kv_group=0,
            attention_bias=False,
        )  # fmt: skip

    def without_mlp(self) -> BlockLayout:
        shape = replace(self.shape, width=0)
        shared = self.shared_norms if self.shape.kv_heads else 0
        return replace(self, shape=shape, mlp=0, mlp_norms=0, shared_norms=shared, neuron=0, mlp_bias=False)

    def with_width(self, width: int) -> BlockLayout:
        gone = self.shape.width - width
        return replace(self, shape=replace(self.shape, width=width), mlp=self.mlp - gone * self.neuron)

    def with_kv_heads(self, kv_heads: int) -> BlockLayout:
        group = self.shape.query_heads // self.shape.kv_heads
        shape = replace(self.shape, query_heads=kv_heads * group, kv_heads=kv_heads)
        gone = self.shape.kv_heads - kv_heads
        return replace(self, shape=shape, attention=self.attention - gone * self.kv_group)

    def folded(self) -> BlockLayout:
        return replace(self, shape=replace(self.shape, folded=True), attention_norms=0, mlp_norms=0)

    def rebased(self, place: Literal[0, 1, 2], width: int, hidden: int) -> BlockLayout:
        """With a stream of another width where it enters (0), between attention and MLP (1), or where it leaves (2).

        Args:
            hidden: the width where nothing was rebased.
        """
        old, shape = self.shape.stream(hidden), self.shape
        into, between, out = new = tuple(width if i == place else old[i] for i in range(3))
        skips = (
            (into, between) if place < 2 or shape.attention_skip else None,
            (between, out) if place > 0 or shape.mlp_skip else None,
        )
        d_into, d_between, d_out = (after - before for before, after in zip(old, new, strict=True))
        query, kv = shape.query_heads * self.head_dim, shape.kv_heads * self.head_dim
        grown = _numel(*skips) - _numel(shape.attention_skip, shape.mlp_skip)
        shape_after = replace(shape, attention_skip=skips[0], mlp_skip=skips[1])
        changed = replace(self, shape=shape_after, rest=self.rest + grown)
        if self.attention:
            added = d_into * (query + 2 * kv) + d_between * (query + self.attention_bias)
            group = (d_into * (query + 2 * kv) + d_between * query) // shape.kv_heads
            changed = replace(changed, attention=self.attention + added, kv_group=self.kv_group + group)
        if self.mlp:
            per_neuron = d_between * self.mlp_rows + d_out
            added = per_neuron * shape.width + d_out * self.mlp_bias
            changed = replace(changed, mlp=self.mlp + added, neuron=self.neuron + per_neuron)
        return changed


@dataclass(frozen=True)
class Layout:
    """A whole model in numbers.

    Attributes:
        blocks: by block number of the model as loaded; a dropped block is absent.
        other: parameters outside the blocks (embeddings, final norm, head), tied ones counted once.
        ends: where the residual stream comes from and goes to.
    """

    blocks: Mapping[int, BlockLayout]
    other: int
    ends: Ends

    @classmethod
    def of(cls, model: Model) -> Layout:
        """Read the layout off the real modules. Shapes need no weights, so no block is opened."""
        family, modules = model.family, list(model.blocks)
        blocks = {number: read_block(module, family) for number, module in zip(model.numbers, modules, strict=True)}
        inside = {id(parameter) for module in modules for parameter in module.parameters()}
        other = sum(p.numel() for p in model.hf.parameters() if id(p) not in inside)
        return cls(blocks=blocks, other=other, ends=ends_of(model.hf, family))

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

    def without_block(self, number: int) -> Layout:
        """Without a block; what writes the stream before it takes over the maps on its residual branch."""
        shape = self.blocks[number].shape
        layout = self
        if shape.attention_skip or shape.mlp_skip:
            width = shape.stream(self.ends.hidden)[2]
            layout = self._written(around(self.blocks, 2 * number)[0], width)
        return layout.with_block(number, None)

    def with_ends(self, ends: Ends) -> Layout:
        return replace(self, ends=ends, other=self.other + ends.parameters - self.ends.parameters)

    def folded(self) -> Layout:
        """Without scales in the blocks' norms."""
        return replace(self, blocks={number: block.folded() for number, block in self.blocks.items()})

    def rebased(self, site: int, width: int) -> Layout:
        """With a residual stream of another width at a site; see `around`."""
        writer, reader = around(self.blocks, site)
        layout = self._written(writer, width)
        if reader is None:
            ends = layout.ends
            return layout.with_ends(replace(ends, output=width, output_map=ends.tied or ends.output_map, scaled=False))
        number, half = reader
        return layout.with_block(number, layout.blocks[number].rebased(half, width, self.ends.hidden))

    def _written(self, writer: BlockHalf | None, width: int) -> Layout:
        """With `width` coordinates where the writer (None: the embedding) adds to the residual stream."""
        if writer is None:
            return self.with_ends(replace(self.ends, input=width, input_map=self.ends.tied or self.ends.input_map))
        number, half = writer
        place: Literal[1, 2] = 2 if half else 1
        return self.with_block(number, self.blocks[number].rebased(place, width, self.ends.hidden))

    def stream_width(self, site: int) -> int:
        """How many coordinates the residual stream has at a site; see `around`."""
        reader = around(self.blocks, site)[1]
        return self.blocks[reader[0]].shape.stream(self.ends.hidden)[reader[1]] if reader else self.ends.output

    @property
    def sites(self) -> list[int]:
        """The sites of the residual stream, in order."""
        return [site for number in self.blocks for site in (2 * number, 2 * number + 1)] + [final_site(self.blocks)]

    @property
    def is_folded(self) -> bool:
        return any(block.shape.folded for block in self.blocks.values())

    @property
    def is_rebased(self) -> bool:
        return any(block.shape.attention_skip or block.shape.mlp_skip for block in self.blocks.values())

    @property
    def uniform(self) -> bool:
        """Whether a stock architecture can hold it: one shape for all blocks, no module missing, no norm folded."""
        shapes = {block.shape for block in self.blocks.values()}
        return len(shapes) == 1 and all(shape.width and shape.kv_heads and not shape.folded for shape in shapes)


def ends_of(model: Any, family: Family) -> Ends:
    """Read the ends of the residual stream off the real modules."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    vocabulary, width = embedding.weight.shape
    tied = head.weight is embedding.weight
    if family.no_rebase is not None:
        return Ends(vocabulary, width, tied, width, width)
    norm: Any = model.get_submodule(family.final_norm)
    output_map = norm.map if isinstance(norm, MappedNorm) else None
    input_map = embedding.map if isinstance(embedding, MappedEmbedding) else None
    return Ends(
        vocabulary=vocabulary,
        hidden=norm.width if isinstance(norm, FoldedNorm) else norm.weight.numel(),
        tied=tied,
        input=width if input_map is None else input_map.shape[1],
        output=head.weight.shape[1] if output_map is None else output_map.shape[0],
        input_map=input_map is not None,
        output_map=output_map is not None,
        scaled=not isinstance(norm, FoldedNorm),
    )


def read_block(module: nn.Module, family: Family) -> BlockLayout:
    """Count one block's parameters, part by part."""

    def size(*paths: str) -> int:
        return sum(p.numel() for path in paths for p in module.get_submodule(path).parameters())

    shape = modeling.shape_of(module, family)
    attention = size(family.attention) if modeling.has_attention(module, family) else 0
    mlp = size(*family.mlp)
    norms = size(*family.attention_norms), size(*family.mlp_norms), size(*family.shared_norms)
    head_dim = modeling.head_dim_of(module, family) if attention else 0
    kv_group = 0
    if attention:
        rows = (shape.query_heads + 2 * shape.kv_heads) // shape.kv_heads * head_dim
        columns = shape.query_heads // shape.kv_heads * head_dim
        kv_group = rows * _row_cost(module, family.qkv[0]) + columns * _column_cost(module, family.out)
    neuron = 0
    if modeling.has_mlp(module, family):
        fused = 2 if family.fused_mlp_in else 1
        rows_cost = sum(fused * _row_cost(module, path) for path in family.mlp_in)
        neuron = rows_cost + _column_cost(module, family.mlp_out)
    rest = sum(p.numel() for p in module.parameters()) - attention - mlp - sum(norms)
    return BlockLayout(
        shape=shape, head_dim=head_dim, attention=attention, attention_norms=norms[0], mlp=mlp, mlp_norms=norms[1],
        neuron=neuron, kv_group=kv_group, rest=rest, shared_norms=norms[2],
        mlp_rows=len(family.mlp_in) * (2 if family.fused_mlp_in else 1),
        attention_bias=bool(attention) and _has_bias(module, family.out),
        mlp_bias=modeling.has_mlp(module, family) and _has_bias(module, family.mlp_out),
    )  # fmt: skip


def _numel(*sizes: tuple[int, int] | None) -> int:
    return sum(size[0] * size[1] for size in sizes if size)


def _has_bias(module: nn.Module, path: str) -> bool:
    return module.get_submodule(path).bias is not None


def _row_cost(module: nn.Module, path: str) -> int:
    linear: Any = module.get_submodule(path)
    return modeling.in_features(linear) + (linear.bias is not None)


def _column_cost(module: nn.Module, path: str) -> int:
    linear: Any = module.get_submodule(path)
    return modeling.out_features(linear)
