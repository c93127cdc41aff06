"""The weights of a model as one of llama.cpp's architectures has them: names, order of rows, and what is folded in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.export.gguf.architectures import Architecture, ropes
from secateur.model.handle import Model
from secateur.model.layout import BlockLayout
from secateur.model.modeling_secateur import Linear, row_dim
from secateur.model.views import Block

STUB_WIDTH = 32  # of an MLP that adds nothing; the least that all quantised types take
Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class WrittenBlock:
    """What the file says of one block.

    Attributes:
        number: the block's, in the model as loaded.
        query_heads, kv_heads: 0 and 0 is no attention, n and 0 a plain matrix in its place (`deci`).
        stub: the attention is zeros, of one head of each kind.
    """

    number: int
    query_heads: int
    kv_heads: int
    width: int
    stub: bool = False


def sizes(model: Model, architecture: Architecture) -> list[WrittenBlock]:
    """What the blocks that are written have. Those without attention and MLP are the identity and left out.

    Where an MLP is missing there is one of 32 neurons whose output is zero: with a width of 0, llama.cpp's `deci` drops
    the block's attention too, and dies if it is the last. Its first block needs heads, since the size of a head is read
    there; with query heads and no KV heads it is a matrix in the attention's place, and that is zero.
    """
    layout, written = model.layout(), list[WrittenBlock]()
    heads = max((block.shape.query_heads for block in layout.blocks.values()), default=0)
    stub = STUB_WIDTH
    if "widths" not in architecture.unequal:
        stub = max((block.shape.width for block in layout.blocks.values() if block.mlp), default=STUB_WIDTH)
    for number, block in layout.blocks.items():
        if not (block.attention or block.mlp):
            continue
        shape, width = block.shape, block.shape.width or stub
        if block.attention:
            written.append(WrittenBlock(number, shape.query_heads, shape.kv_heads, width))
        elif architecture.empty == "zero":
            written.append(WrittenBlock(number, 0 if written else max(heads, 1), 0, width))
        else:
            written.append(WrittenBlock(number, 1, 1, width, stub=True))
    return written


def head_dim(model: Model) -> int:
    """The size of a head; where no attention is left, what the configuration says."""
    config: Any = model.hf.config
    dims = {block.head_dim for block in model.layout().blocks.values() if block.attention}
    if dims:
        return dims.pop()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def tensors(model: Model, architecture: Architecture) -> Named:
    """All tensors by their names in the file, in float32 and as (out, in); one block is open at a time.

    Of a hollow model: their shapes, on `meta`.
    """
    stream = Stream.of(model)
    with model.open_ends():
        yield "token_embd.weight", model.hf.get_input_embeddings().weight.detach().float()
        if (positions := getattr(model.hf.base_model, "wpe", None)) is not None:
            yield "position_embd.weight", positions.weight.detach().float()
        rope = ropes(model.hf.config).get("", {})
        if rope.get("rope_type") == "llama3":
            yield "rope_freqs.weight", llama3_factors(rope, head_dim(model))
        if rope.get("rope_type") == "longrope":
            for name in ("long", "short"):
                yield f"rope_factors_{name}.weight", torch.tensor(rope[f"{name}_factor"], dtype=torch.float32)
    for place, size in enumerate(sizes(model, architecture)):
        with model.open(size.number) as block:
            for name, tensor in _block(model, architecture, block, size, stream):
                yield f"blk.{place}.{name}", tensor
    final_norm = model.hf.get_submodule(model.family.final_norm)
    with model.open_ends():
        for name, tensor in _norm("output_norm", final_norm, architecture.norm_offset):
            yield name, tensor / stream.logits
        head = model.hf.get_output_embeddings()
        if not model.layout().ends.tied:
            yield "output.weight", head.weight.detach().float()
        if head.bias is not None:
            yield "output.bias", head.bias.detach().float()


@dataclass(frozen=True)
class Stream:
    """Factors that a plain Llama does not have, and that go into weights (Granite's).

    Attributes:
        embedding: the embedding's; the whole residual stream is divided by it instead, which norms do not see.
        logits: what logits are divided by.
    """

    embedding: float
    logits: float

    @classmethod
    def of(cls, model: Model) -> Stream:
        config: Any = model.hf.config
        return cls(getattr(config, "embedding_multiplier", 1.0), getattr(config, "logits_scaling", 1.0))


def llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """What llama.cpp divides each frequency by, (head size / 2,); equal to Llama 3.1's change of frequencies.

    Long waves are slowed down by `factor`, short ones stay, and those between move smoothly from one to the other.
    """
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] / waves  # in the text length of the first training
    low, high, factor = (float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / factor + kept)).float()


def _block(model: Model, architecture: Architecture, block: Block, size: WrittenBlock, stream: Stream) -> Named:
    multiplier = block.multiplier / stream.embedding
    layout = model.layout().blocks[size.number]
    family, norm = block.family, block.module.get_submodule
    yield from _norms(block, architecture.shared_norms, family.shared_norms, architecture)
    if block.has_attention:
        yield from _norms(block, architecture.norms, family.attention_norms, architecture)
        yield from _attention(model, architecture, block, layout)
        yield from _scaled(_linear("attn_output", block.attention_out), multiplier)
    elif size.query_heads:
        yield "attn_norm.weight", torch.ones(model.hidden_size, device=_device(block))
        yield from _stub_attention(model, architecture, block, size)
    if block.has_mlp:
        yield from _norms(block, architecture.mlp_norms, family.mlp_norms, architecture)
        yield from _mlp_in(architecture, block)
        yield from _scaled(_linear("ffn_down", norm(family.mlp_out)), multiplier)
    elif "widths" not in architecture.unequal:
        yield "ffn_norm.weight", torch.zeros(model.hidden_size, device=_device(block))
    else:
        hidden, device = model.hidden_size, _device(block)
        yield "ffn_norm.weight", torch.ones(hidden, device=device)
        yield "ffn_gate.weight", torch.zeros(STUB_WIDTH, hidden, device=device)
        yield "ffn_up.weight", torch.zeros(STUB_WIDTH, hidden, device=device)
        yield "ffn_down.weight", torch.zeros(hidden, STUB_WIDTH, device=device)


def _stub_attention(model: Model, architecture: Architecture, block: Block, size: WrittenBlock) -> Named:
    """Of `deci`, a matrix in the attention's place; of the others, an attention of one head. Both add zero."""
    hidden, dim, device = model.hidden_size, head_dim(model), _device(block)
    if size.stub:
        names = {"attn_qkv": 3 * dim} if architecture.fused_qkv else dict.fromkeys(("attn_q", "attn_k", "attn_v"), dim)
        yield from ((f"{name}.weight", torch.zeros(rows, hidden, device=device)) for name, rows in names.items())
        yield "attn_q_norm.weight", torch.ones(dim, device=device)
        yield "attn_k_norm.weight", torch.ones(dim, device=device)
    yield "attn_output.weight", torch.zeros(hidden, dim if size.stub else hidden, device=device)


def _attention(model: Model, architecture: Architecture, block: Block, layout: BlockLayout) -> Named:
    """Queries, keys and values, with the architecture's order of rows and its scale of the queries."""
    parts: dict[str, list[Tensor]] = {
        name: list(pieces) for name, pieces in zip(("attn_q", "attn_k", "attn_v"), _qkv(block, layout), strict=True)
    }
    scale, module = query_scale(model, architecture, block, layout), block.attention
    for name, heads in (("attn_q", layout.shape.query_heads), ("attn_k", layout.shape.kv_heads)):
        if architecture.interleaved:
            parts[name] = [_neighbours(each, heads) for each in parts[name]]
    if not architecture.head_norms:
        parts["attn_q"] = [scale * each for each in parts["attn_q"]]
    kinds = ("weight", "bias")
    if architecture.fused_qkv:
        for kind, three in zip(kinds, zip(*parts.values(), strict=True), strict=False):
            yield f"attn_qkv.{kind}", torch.cat(three)
    else:
        for name, pieces in parts.items():
            yield from ((f"{name}.{kind}", piece) for kind, piece in zip(kinds, pieces, strict=False))
    if architecture.head_norms:
        for name, factor in (("q_norm", scale), ("k_norm", 1.0)):
            norm: Any = getattr(module, name)
            yield f"attn_{name}.weight", factor * (norm.weight.detach().float() + architecture.norm_offset)


def query_scale(model: Model, architecture: Architecture, block: Block, layout: BlockLayout) -> float:
    """What queries are multiplied by so that llama.cpp's own scale of attention gives the model's."""
    wide = architecture.wide_at and len(model.blocks) == architecture.wide_at
    theirs = (model.hidden_size // layout.shape.query_heads if wide else layout.head_dim) ** -0.5
    return float(getattr(block.attention, "scaling", layout.head_dim**-0.5)) / theirs


def _qkv(block: Block, layout: BlockLayout) -> list[list[Tensor]]:
    """Weight (and bias, if there is one) of queries, keys and values, heads one after another."""
    family, dim = block.family, layout.head_dim
    if family.qkv_layout == "separate":
        return [_pair(block.linear(path)) for path in family.qkv]
    fused = _pair(block.linear(family.qkv[0]))
    query, kv = layout.shape.query_heads * dim, layout.shape.kv_heads * dim
    if family.qkv_layout == "blocks":
        return [list(each) for each in zip(*(piece.split([query, kv, kv]) for piece in fused), strict=True)]
    by_head = [piece.unflatten(0, (layout.shape.kv_heads, 3, dim)) for piece in fused]
    return [[piece[:, which].flatten(0, 1) for piece in by_head] for which in range(3)]


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head in another order: from pairs that lie half a head apart to pairs of neighbours."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _mlp_in(architecture: Architecture, block: Block) -> Named:
    family = block.family
    pieces = [_pair(block.linear(path)) for path in family.mlp_in]
    if family.fused_mlp_in and not architecture.fused_mlp_in:
        pieces = [list(each) for each in zip(*(piece.chunk(2) for piece in pieces[0]), strict=True)]
    names = ("ffn_gate", "ffn_up") if len(pieces) == 2 else ("ffn_up",)
    for name, pair in zip(names, pieces, strict=True):
        yield from ((f"{name}.{kind}", piece) for kind, piece in zip(("weight", "bias"), pair, strict=False))


def _norms(block: Block, names: tuple[str, ...], paths: tuple[str, ...], architecture: Architecture) -> Named:
    for name, path in zip(names, paths, strict=True):
        yield from _norm(name, block.module.get_submodule(path), architecture.norm_offset)


def _norm(name: str, norm: nn.Module, offset: float) -> Named:
    weight: Any = norm.weight
    yield f"{name}.weight", weight.detach().float() + offset
    bias: Any = getattr(norm, "bias", None)
    if bias is not None:
        yield f"{name}.bias", bias.detach().float()


def _linear(name: str, linear: Any) -> Named:
    return zip((f"{name}.weight", f"{name}.bias"), _pair(linear), strict=False)


def _pair(linear: Linear) -> list[Tensor]:
    """Weight (out, in) and, if there is one, bias, in float32."""
    weight = linear.weight.detach()
    pair = [(weight.T if row_dim(linear) else weight).float()]
    return pair if linear.bias is None else [*pair, linear.bias.detach().float()]


def _scaled(named: Named, factor: float) -> Named:
    return ((name, tensor if factor == 1 else tensor * factor) for name, tensor in named)


def _device(block: Block) -> torch.device:
    """Where stubs are made: on `meta` for a hollow model."""
    meta = any(parameter.is_meta for parameter in block.module.parameters())
    return torch.device("meta" if meta else "cpu")
