"""Transformers models whose blocks differ: mixed widths, fewer KV groups, modules that are gone.

This one file is used by the package and copied verbatim into every checkpoint that stock architectures cannot hold,
so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where secateur is not installed.
It therefore imports only torch and transformers. It holds

- THE table of model families: what a block's parts are called, and nothing else about a family; a checkpoint of a
  family of somebody else's brings its row in its configuration;
- the primitives that shrink a block, used both to prune weights and to rebuild the shapes of a saved model;
- one generic residual block, whose stream may have another width and basis at each site;
- for each family subclasses of its stock classes: the model alone, and with each kind of head. No forward is copied:
  the stock model is built and its blocks are then narrowed to the shapes that `per_layer_config` states.

What only writes such a configuration, or checks a row, is not needed to load one and stands elsewhere.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

NOT_PRE_NORM = "only blocks of the form x + attention(RMSNorm(x)), then x + mlp(RMSNorm(x)) are built"
NOT_LLAMA = "nobody has compared its blocks with Llama's"
ROW = "secateur_family"  # in the configuration of a saved model whose family is not in the table: its row
PREFIX = "secateur-"  # model_type of a saved model: never a stock one, which stock transformers would half load


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: how one model family names the parts of a block. Paths are relative to the block.

    `blocks` is relative to the `ForCausalLM` model. `qkv_layout` is "separate" for three projections, "blocks" for
    one projection with all query rows, then all key rows, then all value rows, "per_head" for one with the query, key
    and value rows of one head after another. `fused_mlp_in`: gate and up rows are stacked in one projection. `counts`
    maps attributes that the attention's forward reads to what they count; an attribute "config.X" is read from the
    configuration. `shared_norms` are read by attention and MLP alike and go with the second of them. `no_rebase` is
    None for families whose block is, in this order, x + attention(RMSNorm(x)) and x + mlp(RMSNorm(x)), so that norms
    fold and the residual stream takes another basis; else the reason why not. What is added may pass `dropouts` and be
    multiplied by the block's attribute `multiplier`; with `post_norms` it passes a norm. `parallel`: attention and MLP
    both read what enters the block; or the configuration's attribute that says so. `needs_bos`: without a
    begin-of-sequence token in front the model is out of its range; true where that was measured or is documented, not
    where a tokenizer merely puts one. `not_llama` is None where embedding, blocks and head have Llama's names and,
    without a sliding window, compute what Llama's do (biases may be more or fewer), so that engines' Llama runs them;
    else the reason why not.
    """

    model_type: str
    blocks: str = "model.layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    qkv_layout: Literal["separate", "blocks", "per_head"] = "separate"
    counts: Mapping[str, Literal["query_heads", "kv_heads", "query_rows"]] = field(default_factory=dict, hash=False)
    head_dim: str = "head_dim"  # the attention's attribute
    cache: str = "past_key_values"  # not read any more: rows of older checkpoints have it
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp: tuple[str, ...] = ("mlp",)  # the modules that together are the MLP
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    fused_mlp_in: bool = False
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    shared_norms: tuple[str, ...] = ()
    width: str = "intermediate_size"  # the configuration's names
    default_width: int | None = None  # where the configuration has None: so many times the hidden size
    query_heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    free_head_dim: bool = True  # the stock class takes a head_dim other than hidden_size / heads
    # settings without which the row does not hold
    requires: Mapping[str, bool | int | float | str | None] = field(default_factory=dict, hash=False)
    cannot: Mapping[str, str] = field(default_factory=dict, hash=False)  # edit -> why this family refuses it
    no_rebase: str | None = NOT_PRE_NORM
    final_norm: str = "model.norm"
    dropouts: tuple[str, str] | None = None
    multiplier: str | None = None
    post_norms: bool = False
    parallel: bool | str = False
    needs_bos: bool = False
    not_llama: str | None = NOT_LLAMA
    rope_theta: str = "rope_theta"  # what transformers 4 calls the parts of `rope_parameters`
    rope_share: str | None = None  # None: its code there turns whole heads only
    # kinds of scaling that transformers 4 takes, with the only keys; None: all that it has
    rope_scalings: Mapping[str, tuple[str, ...]] | None = field(default=None, hash=False)


_POST_NORMS = "a norm after a module does not commute with a rotation of what it adds"
_NORM_AFTER = "it has a norm after each module"
_QK_NORMS = "it has norms of queries and keys"
_LAYER_NORM = "its norms subtract the mean, and its MLPs have no gate"


def _gemma(model_type: str) -> Family:
    """The row of a family with a norm before and after each module.

    It needs a begin-of-sequence token. Gemma 3: the 270m model (Q4_K_M) has a perplexity of 61.5 on WikiText-2 without
    one, and of 23.9 with one. Gemma 2: lm-eval's pull request 2049 measured 2,645 on LAMBADA without one, with the 9b.
    """
    return Family(
        model_type=model_type,
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        requires={"use_bidirectional_attention": False},
        no_rebase=_POST_NORMS,
        post_norms=True,
        needs_bos=True,
        not_llama=_NORM_AFTER,
    )


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(model_type="llama", no_rebase=None, not_llama=None),
        Family(model_type="mistral", no_rebase=None, not_llama=None),
        Family(model_type="qwen2", no_rebase=None, not_llama=None),
        Family(model_type="qwen3", no_rebase=None, not_llama=_QK_NORMS),
        Family(model_type="smollm3", no_rebase=None, not_llama="some of its blocks have no RoPE"),
        Family(
            model_type="granite",
            no_rebase=None,
            multiplier="residual_multiplier",
            not_llama="it multiplies embeddings, attention scores, what blocks add and logits",
        ),
        _gemma("gemma2"),
        _gemma("gemma3_text"),
        Family(
            model_type="olmo2",
            attention_norms=("post_attention_layernorm",),
            mlp_norms=("post_feedforward_layernorm",),
            cannot={"KeepHeads": "its norms of queries and keys span all heads, so no head can go alone"},
            no_rebase=_POST_NORMS,
            post_norms=True,
            not_llama=_NORM_AFTER,
            rope_scalings={kind: ("type", "factor") for kind in ("linear", "dynamic")},
        ),
        Family(
            model_type="phi3",
            qkv=("self_attn.qkv_proj",),
            qkv_layout="blocks",
            counts={"num_key_value_heads": "kv_heads", "config.num_attention_heads": "query_heads"},
            mlp_in=("mlp.gate_up_proj",),
            fused_mlp_in=True,
            no_rebase=None,
            dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
            not_llama="its projections are fused",
            rope_share="partial_rotary_factor",
            rope_scalings={"longrope": ("type", "short_factor", "long_factor")},
        ),
        Family(
            model_type="phi",  # attention and MLP side by side, behind one norm
            final_norm="model.final_layernorm",
            out="self_attn.dense",
            attention_norms=(),
            mlp_in=("mlp.fc1",),
            mlp_out="mlp.fc2",
            mlp_norms=(),
            shared_norms=("input_layernorm",),
            free_head_dim=False,
            parallel=True,
            not_llama=_LAYER_NORM,
            rope_share="partial_rotary_factor",
        ),
        Family(
            model_type="gpt_neox",
            blocks="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            attention="attention",
            qkv=("attention.query_key_value",),
            out="attention.dense",
            qkv_layout="per_head",
            head_dim="head_size",
            mlp_in=("mlp.dense_h_to_4h",),
            mlp_out="mlp.dense_4h_to_h",
            kv_heads=None,
            free_head_dim=False,
            parallel="use_parallel_residual",
            not_llama=_LAYER_NORM,
            rope_theta="rotary_emb_base",
            rope_share="rotary_pct",
        ),
        Family(
            model_type="gpt2",
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            attention="attn",
            qkv=("attn.c_attn",),
            out="attn.c_proj",
            qkv_layout="blocks",
            counts={"num_heads": "query_heads", "split_size": "query_rows"},
            attention_norms=("ln_1",),
            mlp_in=("mlp.c_fc",),
            mlp_out="mlp.c_proj",
            mlp_norms=("ln_2",),
            width="n_inner",
            default_width=4,
            kv_heads=None,
            free_head_dim=False,
            requires={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
            not_llama=_LAYER_NORM,
        ),
        Family(
            model_type="opt",
            blocks="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
            out="self_attn.out_proj",
            counts={"num_heads": "query_heads"},
            attention_norms=("self_attn_layer_norm",),
            mlp=("fc1", "fc2"),
            mlp_in=("fc1",),
            mlp_out="fc2",
            mlp_norms=("final_layer_norm",),
            width="ffn_dim",
            kv_heads=None,
            free_head_dim=False,
            requires={"do_layer_norm_before": True},
            no_rebase="its LayerNorm subtracts the mean, which a rotation does not commute with",
            not_llama=_LAYER_NORM,
        ),
    )
}

SKIPS = ("attention_skip", "mlp_skip")  # parameters of a block, and fields of its shape


@dataclass(frozen=True)
class Shape:
    """What one block has: FFN neurons, query heads and KV heads; 0 where the whole module is gone.

    Attributes:
        folded: its norms have no scale of their own any more, and its residual block is the generic one.
        attention_skip, mlp_skip: (from, to) widths of the maps on the residual branch; None where it is the identity.
    """

    width: int
    query_heads: int
    kv_heads: int
    folded: bool = False
    attention_skip: tuple[int, int] | None = None
    mlp_skip: tuple[int, int] | None = None

    def stream(self, hidden: int) -> tuple[int, int, int]:
        """Widths of the residual stream where it enters, between attention and MLP, and where it leaves.

        Args:
            hidden: its width where nothing was rebased.
        """
        first, second = self.attention_skip, self.mlp_skip
        between = first[1] if first else second[0] if second else hidden
        return first[0] if first else hidden, between, second[1] if second else hidden


class Removed(nn.Module):
    """Stands where a module was: its contribution to the residual stream is zero, broadcast from one element."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states.new_zeros((1,) * hidden_states.dim())


class RemovedAttention(Removed):
    """Stands where an attention was, and keeps its place in the KV cache with one number per token.

    Transformers reads the length of the cached past from one layer, the first of a kind. A layer that stored nothing
    would report an empty past and corrupt cached generation, so this one stores a single zero per token. The cache is
    told by its kind: the argument's name differs between families, and in transformers 5.24 from that in 5.23.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(  # type: ignore[override]  # an attention also returns its weights
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        for cache in (each for each in (*args, *kwargs.values()) if isinstance(each, Cache)):
            batch, length = hidden_states.shape[:2]
            mark = hidden_states.new_zeros((batch, 1, length, 1))  # (batch, heads, tokens, head_dim)
            cache.update(mark, mark, self.layer_idx)
        return super().forward(hidden_states), None


class FoldedNorm(nn.Module):
    """An RMSNorm whose scale lies in the linear maps that read it.

    It divides by the ORIGINAL width: a rotation keeps the sum of squares, and slicing leaves out the small rest of it.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        mean_square = x.pow(2).sum(-1, keepdim=True) / self.width
        return (x * torch.rsqrt(mean_square + self.eps)).to(hidden_states.dtype)


class MappedNorm(FoldedNorm):
    """The final norm of a model whose head is tied: leads back to the embedding's coordinates, with the scale."""

    def __init__(self, width: int, eps: float, weight: Tensor) -> None:
        super().__init__(width, eps)
        self.map = nn.Parameter(weight)  # (stream, hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).to(self.map.device) @ self.map


class MappedEmbedding(nn.Embedding):
    """An embedding that is tied to the head, with its own way into the stream."""

    map: nn.Parameter  # (hidden, stream)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) @ self.map


class StreamBlock:
    """Mixed into a stock block whose norms are folded: the same block, with a linear map on each residual branch.

    The parts keep their names, so all that is done to other blocks is done to these.
    """

    family: Family
    get_submodule: Callable[[str], Any]  # the stock block's
    attention_skip: nn.Parameter | None  # (stream in, stream between); None is the identity
    mlp_skip: nn.Parameter | None  # (stream between, stream out)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        part, family, h = self.get_submodule, self.family, hidden_states
        added = part(family.attention)(hidden_states=part(family.attention_norms[0])(h), **kwargs)[0]
        h = _through(h, self.attention_skip) + self._branch(added, 0)
        added = part(family.mlp[0])(part(family.mlp_norms[0])(h))
        return _through(h, self.mlp_skip) + self._branch(added, 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by the stock class, since no name leads to a class that is made on demand."""
        return _new_stream_block, (type(self).__mro__[2],), self.__dict__.copy()

    def _branch(self, added: Tensor, half: int) -> Tensor:
        if self.family.dropouts:
            added = self.get_submodule(self.family.dropouts[half])(added)
        return added * getattr(self, self.family.multiplier) if self.family.multiplier else added


def _through(hidden: Tensor, skip: Tensor | None) -> Tensor:
    return hidden if skip is None else hidden @ skip


class LayerView:
    """A configuration seen from one layer: the shared one, but for the given attributes."""

    def __init__(self, config: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _shared=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_shared" or name.startswith("__"):  # while being copied it is not there yet
            raise AttributeError(name)
        return getattr(self._shared, name)


# --- primitives: shrink one block ------------------------------------------------------------------------------------


Linear = nn.Linear | Conv1D  # Conv1D keeps its weight as (in, out), and names its sizes otherwise


def row_dim(linear: Linear) -> int:
    """The dimension of the weight that runs over the outputs."""
    return 1 if isinstance(linear, Conv1D) else 0


def out_features(linear: Linear) -> int:
    return linear.weight.shape[row_dim(linear)]


def in_features(linear: Linear) -> int:
    return linear.weight.shape[1 - row_dim(linear)]


def narrow(linear: Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep the given outputs ("rows"; bias too) and inputs ("columns") of a linear map, in place."""
    weight = linear.weight.detach()
    dim = row_dim(linear)
    if rows is not None:
        weight = weight.index_select(dim, rows.to(weight.device))
        if linear.bias is not None:
            bias = linear.bias.detach().index_select(0, rows.to(weight.device))
            linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    if columns is not None:
        weight = weight.index_select(1 - dim, columns.to(weight.device))
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    state_sizes(linear)


def state_sizes(linear: Linear) -> None:
    """Bring the attributes that name a map's sizes up to date with its weight."""
    names = ("nf", "nx") if isinstance(linear, Conv1D) else ("out_features", "in_features")
    for name, size in zip(names, (out_features(linear), in_features(linear)), strict=True):
        setattr(linear, name, size)


def keep_neurons(block: nn.Module, family: Family, index: Tensor) -> None:
    """Keep the FFN neurons `index` (kept,): rows of gate and up, columns of down."""
    width = in_features(_linear(block, family.mlp_out))
    rows = torch.cat([index, index + width]) if family.fused_mlp_in else index
    for path in family.mlp_in:
        narrow(_linear(block, path), rows=rows)
    narrow(_linear(block, family.mlp_out), columns=index)


def keep_heads(block: nn.Module, family: Family, index: Tensor, group: int | None = None) -> None:
    """Keep the KV groups `index` (kept,): each KV head with the query heads that read it.

    Args:
        group: with the first so many of them only.
    """
    before = shape_of(block, family)
    every = before.query_heads // before.kv_heads
    query = (index[:, None] * every + torch.arange(group or every)).flatten()
    head_dim = head_dim_of(block, family)
    q_rows, kv_rows = _spread(query, head_dim), _spread(index, head_dim)
    if family.qkv_layout == "separate":
        for path, rows in zip(family.qkv, (q_rows, kv_rows, kv_rows), strict=True):
            narrow(_linear(block, path), rows=rows)
    elif family.qkv_layout == "per_head":
        narrow(_linear(block, family.qkv[0]), rows=_spread(index, 3 * head_dim))
    else:
        k_start = before.query_heads * head_dim
        v_start = k_start + before.kv_heads * head_dim
        narrow(_linear(block, family.qkv[0]), rows=torch.cat([q_rows, kv_rows + k_start, kv_rows + v_start]))
    narrow(_linear(block, family.out), columns=q_rows)
    attention: Any = block.get_submodule(family.attention)
    if group not in (None, every):
        attention.num_key_value_groups = group
    sizes = {"query_heads": len(query), "kv_heads": len(index), "query_rows": len(q_rows)}
    for attribute, counted in family.counts.items():
        name = attribute.removeprefix("config.")
        if name == attribute:
            setattr(attention, name, sizes[counted])
        else:
            attention.config = LayerView(attention.config, **{name: sizes[counted]})


def drop_attention(block: nn.Module, family: Family) -> None:
    """Remove the attention and its norms."""
    layer_idx: Any = block.get_submodule(family.attention).layer_idx
    block.set_submodule(family.attention, RemovedAttention(layer_idx))
    _drop_norms(
        block, family.attention_norms if has_mlp(block, family) else family.attention_norms + family.shared_norms
    )


def drop_mlp(block: nn.Module, family: Family) -> None:
    """Remove the MLP and its norms."""
    for path in family.mlp:
        block.set_submodule(path, Removed())
    _drop_norms(block, family.mlp_norms if has_attention(block, family) else family.mlp_norms + family.shared_norms)


def _drop_norms(block: nn.Module, paths: Iterable[str]) -> None:
    for path in paths:
        block.set_submodule(path, nn.Identity())


def fold_block(block: nn.Module, family: Family) -> None:
    """Take the scales out of a block's norms (whoever calls this has them elsewhere) and make it the generic one."""
    for path in (*family.attention_norms, *family.mlp_norms):
        norm: Any = block.get_submodule(path)
        if hasattr(norm, "weight"):  # the norm of a removed module is gone
            block.set_submodule(path, FoldedNorm(norm.weight.numel(), norm.variance_epsilon))
    stock: Any = type(block)
    _become(block, _stream_class(stock))
    block.family = family  # type: ignore[assignment]  # plain data
    block.register_parameter("attention_skip", None)
    block.register_parameter("mlp_skip", None)


@functools.cache
def _stream_class(stock: Any) -> type[nn.Module]:
    # of the stock name, by which accelerate knows what must not be split between devices
    return type(stock.__name__, (StreamBlock, stock), {"__module__": __name__})


def _new_stream_block(stock: Any) -> nn.Module:
    cls: Any = _stream_class(stock)
    block: nn.Module = cls.__new__(cls)
    return block


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_old_forward" in module.__dict__:  # accelerate's hooks keep the forward that they wrap
        module.__dict__["_old_forward"] = functools.partial(cls.forward, module)


def map_embedding(embedding: nn.Module, weight: Tensor) -> None:
    """Put a map (hidden, stream) behind an embedding, or in the place of the one that is there."""
    _become(embedding, MappedEmbedding)
    embedding.map = nn.Parameter(weight)


def has_attention(block: nn.Module, family: Family) -> bool:
    return not isinstance(block.get_submodule(family.attention), Removed)


def has_mlp(block: nn.Module, family: Family) -> bool:
    return not isinstance(block.get_submodule(family.mlp[0]), Removed)


def head_dim_of(block: nn.Module, family: Family) -> int:
    return int(getattr(block.get_submodule(family.attention), family.head_dim))


def shape_of(block: nn.Module, family: Family) -> Shape:
    """Read the shape off the real modules."""
    width = in_features(_linear(block, family.mlp_out)) if has_mlp(block, family) else 0
    shape = Shape(width, 0, 0)
    if isinstance(block, StreamBlock):
        shape = Shape(width, 0, 0, True, _size(block.attention_skip), _size(block.mlp_skip))
    if not has_attention(block, family):
        return shape
    head_dim = head_dim_of(block, family)
    query = in_features(_linear(block, family.out)) // head_dim
    if family.qkv_layout == "separate":
        kv = out_features(_linear(block, family.qkv[1])) // head_dim
    else:
        kv = (out_features(_linear(block, family.qkv[0])) // head_dim - query) // 2
    return replace(shape, query_heads=query, kv_heads=kv)


def _size(skip: Tensor | None) -> tuple[int, int] | None:
    return None if skip is None else (skip.shape[0], skip.shape[1])


def fit(block: nn.Module, family: Family, shape: Shape) -> None:
    """Give a stock block the shape of a saved one (values come later, from the checkpoint)."""
    if shape.folded:
        fit_stream(block, family, shape)
    now = shape_of(block, family)
    if not shape.width:
        drop_mlp(block, family)
    elif shape.width < now.width:
        keep_neurons(block, family, torch.arange(shape.width))
    if not shape.kv_heads:
        drop_attention(block, family)
    elif (shape.query_heads, shape.kv_heads) != (now.query_heads, now.kv_heads):
        keep_heads(block, family, torch.arange(shape.kv_heads), shape.query_heads // shape.kv_heads)


def fit_stream(block: nn.Module, family: Family, shape: Shape) -> None:
    """Give a stock block the residual stream of a saved one."""
    norm: Any = block.get_submodule(family.mlp_norms[0])
    weight = norm.weight
    into, between, out = (torch.arange(width) for width in shape.stream(weight.numel()))
    fold_block(block, family)
    for path in family.qkv:
        narrow(_linear(block, path), columns=into)
    narrow(_linear(block, family.out), rows=between)
    for path in family.mlp_in:
        narrow(_linear(block, path), columns=between)
    narrow(_linear(block, family.mlp_out), rows=out)
    for name, size in zip(SKIPS, (shape.attention_skip, shape.mlp_skip), strict=True):
        if size:
            setattr(block, name, nn.Parameter(weight.new_empty(size)))


def fit_ends(model: Any, family: Family, ends: Mapping[str, Any]) -> None:
    """Give a stock model the ends of a saved one: maps, or a width of their own, behind the embedding and before the
    head.

    Args:
        ends: what the configuration's `stream_ends` states.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings() or getattr(model, "score", None)
    hidden, into, out = model.config.hidden_size, ends["input"], ends["output"]
    like = embedding.weight.detach()
    if not ends["scaled"]:
        base, path = _in_base(model, family.final_norm)
        eps = base.get_submodule(path).variance_epsilon
        norm = FoldedNorm(hidden, eps)
        if ends["output_map"]:
            norm = MappedNorm(hidden, eps, like.new_empty(out, hidden))
        base.set_submodule(path, norm)
    if ends["input_map"]:
        map_embedding(embedding, like.new_empty(hidden, into))
    elif into != hidden:
        set_width(embedding, like.new_empty(len(like), into))
    if head is not None and out != hidden and not ends["output_map"]:
        set_width(head, like.new_empty(len(head.weight), out))


def _in_base(model: Any, path: str) -> tuple[Any, str]:
    """The model without its head, and where `path`, a row's, leads in it."""
    return model.base_model, path.removeprefix(f"{model.base_model_prefix}.")


def set_width(end: Any, weight: Tensor) -> None:
    """Give an embedding or a head that is not tied a weight of another width, (rows, stream)."""
    name = "embedding_dim" if isinstance(end, nn.Embedding) else "in_features"
    setattr(end, name, weight.shape[1])
    end.weight = nn.Parameter(weight, requires_grad=end.weight.requires_grad)


def _linear(block: nn.Module, path: str) -> Linear:
    return block.get_submodule(path)  # type: ignore[return-value]  # the row says so


def _spread(heads: Tensor, head_dim: int) -> Tensor:
    """Rows of the given heads: (heads,) -> (heads * head_dim,)."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


# --- configuration <-> shapes ----------------------------------------------------------------------------------------


def family_of(config: PreTrainedConfig) -> Family | None:
    """The row of a stock or saved configuration; None where there is none. A saved one may bring its own."""
    row = getattr(config, ROW, None)
    if row is not None and config.model_type.startswith(PREFIX):
        return row_from(row)
    return FAMILIES.get(config.model_type.removeprefix(PREFIX))


def row_from(row: Mapping[str, Any]) -> Family:
    """A row from plain data, as a configuration has it: names and paths, never code."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Family(**values)


def shapes_from(config: PreTrainedConfig, family: Family) -> list[Shape]:
    """The shapes that a configuration states, one per block.

    Raises:
        ValueError: it states none for some block.
    """
    shapes = []
    for place, layer in enumerate(config.per_layer_config):
        skip = getattr(layer, "skip", ())
        if width_of(layer, family) < 0:  # the whole's, see `state_shapes`
            raise ValueError(f"per_layer_config says nothing of block {place} of {config.num_hidden_layers}")
        query = 0 if "attention" in skip else getattr(layer, family.query_heads)
        shapes.append(
            Shape(
                width=0 if "mlp" in skip else width_of(layer, family),
                query_heads=query,
                kv_heads=query and (getattr(layer, family.kv_heads) if family.kv_heads else query),
                folded=getattr(layer, "folded", False),
                **{name: tuple(getattr(layer, name)) for name in SKIPS if getattr(layer, name, None)},
            )
        )
    return shapes


def width_of(config: Any, family: Family) -> int:
    """The FFN width that a configuration states."""
    width = getattr(config, family.width)
    return config.hidden_size * family.default_width if width is None and family.default_width else width


def plain_config(config: PreTrainedConfig, family: Family, shapes: Sequence[Shape]) -> PreTrainedConfig:
    """A stock configuration without per-layer entries, of the largest shape: what the stock class is built from."""
    plain = copy.deepcopy(config)
    plain.per_layer_config = None
    plain.__class__ = CONFIG_MAPPING[family.model_type]
    for name in ("stream_ends", ROW, "auto_map", "model_type"):  # the class has its model_type
        plain.__dict__.pop(name, None)
    setattr(plain, family.width, max((shape.width for shape in shapes), default=0) or 1)
    return plain


def share_config(model: PreTrainedModel, config: PreTrainedConfig, family: Family) -> None:
    """Have a stock model and all in it read one configuration, so that no two of them go out of step.

    What differs from layer to layer cannot be read from it; an attention or MLP finds there what it was built from.
    """
    plain = model.config
    sizes = {name: getattr(plain, name) for name in (family.width, family.query_heads, family.kv_heads) if name}
    view = LayerView(config, **sizes)
    for module in model.modules():
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            module.config = config if isinstance(module, PreTrainedModel) else view  # type: ignore[assignment]  # no child


# --- classes ---------------------------------------------------------------------------------------------------------

# By Auto class: transformers' table of models. Others would look for their weights under other names, and find none.
AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}


class SecateurConfig:
    """Mixed into a stock configuration, whose own checks do not know that layers may differ."""

    def validate(self) -> None:
        plain: Any = copy.deepcopy(self)
        plain.per_layer_config = None
        super(SecateurConfig, plain).validate()  # type: ignore[misc]  # the stock configuration's

    def to_dict(self) -> dict[str, Any]:
        """The stock configuration's, with every class that this file has for it, whichever is saved.

        Sizes stand in it by their common names too: where this file may not be run, AutoTokenizer reads it as a
        configuration of no family.
        """
        stated: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # the stock one's
        names: dict[str, str] = self.attribute_map  # type: ignore[attr-defined]  # the stock one's
        found, module = classes(stated["model_type"].removeprefix(PREFIX)), __name__.rpartition(".")[2]
        stated["auto_map"] = {auto: f"{module}.{cls.__name__}" for auto, cls in found.items()}
        _tell_peft(stated["model_type"])
        return stated | {common: stated[own] for common, own in names.items() if own in stated}


def _tell_peft(model_type: str) -> None:
    """PEFT looks its default `target_modules` up by model type, just after it has asked the configuration for it here:
    what it knows of the stock type goes for ours, whose modules have the same names."""
    known = vars(sys.modules.get("peft.utils.constants", sys.modules[__name__]))
    for table in [value for name, value in known.items() if name.startswith("TRANSFORMERS_MODELS_TO_")]:
        if (stock := model_type.removeprefix(PREFIX)) in table:
            table.setdefault(model_type, table[stock])


class SecateurModel:
    """Mixed into a stock model, with a head or without: builds it, then narrows its blocks to the configuration's
    shapes."""

    # By it transformers gives tensors that it renamed as it loaded a stock checkpoint their old names back. Under a
    # model type of our own it would not rename them again, so they are saved as they are called now.
    _weight_conversions = property(lambda self: None, lambda self, value: None)

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        family = family_of(config)
        if family is None:
            raise ValueError(f"no secateur family for model_type {config.model_type!r}")
        shapes = shapes_from(config, family)
        super().__init__(plain_config(config, family, shapes), *args, **kwargs)  # type: ignore[call-arg]  # the stock model's
        model: Any = self
        config._attn_implementation = model.config._attn_implementation
        share_config(model, config, family)
        base, path = _in_base(model, family.blocks)
        for block, shape in zip(base.get_submodule(path), shapes, strict=True):
            fit(block, family, shape)
        if ends := getattr(config, "stream_ends", None):
            fit_ends(model, family, ends)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """The stock model's.

        Raises:
            ValueError: head and embedding have the residual stream in other coordinates, so that neither has the
                other's rows.
        """
        config: Any = self.config  # type: ignore[attr-defined]  # the stock model's
        ends = getattr(config, "stream_ends", None)
        if ends and config.tie_word_embeddings:
            whole = ends["input_map"] or ends["input"] == config.hidden_size
            if not (whole and (ends["output_map"] or ends["scaled"])):
                raise ValueError(
                    "the residual stream has other coordinates at the head than at the embedding, so they cannot "
                    "share a matrix; leave tie_word_embeddings False"
                )
        super().tie_weights(*args, **kwargs)  # type: ignore[misc]  # the stock model's


@functools.cache
def classes(model_type: str) -> dict[str, Any]:
    """The classes for checkpoints of a stock `model_type`, by the Auto class that gives them; AutoConfig is one."""
    stock: Any = CONFIG_MAPPING[model_type]
    # "_auto_class" makes transformers' own save_pretrained copy this file.
    own: dict[str, Any] = {"__module__": __name__, "model_type": PREFIX + model_type, "_auto_class": "AutoConfig"}
    config = type(f"Secateur{stock.__name__}", (SecateurConfig, stock), own)
    found: dict[str, Any] = {"AutoConfig": config}
    for auto, table in AUTO_CLASSES.items():
        if (cls := getattr(modeling_auto, table).get(stock, None)) is not None:
            own = {"__module__": __name__, "config_class": config, "_auto_class": auto}
            found[auto] = type(f"Secateur{cls.__name__}", (SecateurModel, cls), own)
    return found


def __getattr__(name: str) -> Any:
    """Find `SecateurLlamaForCausalLM` and its like by name, as a checkpoint's `auto_map` or a pickle asks for them."""
    stock = name.removeprefix("Secateur")
    for names in (CONFIG_MAPPING_NAMES, *(getattr(modeling_auto, f"{table}_NAMES") for table in AUTO_CLASSES.values())):
        for model_type in (each for each, cls in names.items() if cls == stock != name):
            config: Any = CONFIG_MAPPING[model_type]
            model: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)
            if model and config.model_type == model_type and model.config_class is config:  # none that is borrowed
                found = (cls for cls in classes(model_type).values() if cls.__name__ == name)
                if (cls := next(found, None)) is not None:
                    return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
