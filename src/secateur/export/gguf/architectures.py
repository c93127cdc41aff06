"""Which of llama.cpp's architectures can hold which family, and what they want: data, and the checks that read it.

What is said of llama.cpp here was read in its sources (src/models/*.cpp of 2026-10) and tried with xllamacpp 2026.10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.model.handle import Model

ROUND = "prune with `--round-to 32`"
PADDED = "the nearest form that llama.cpp's own converter reads is `padded`"
IN_TURN = "no converter of llama.cpp's tells it which: drop blocks in whole turns, or none"

_LINEAR = frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"})
_LAYER_NORM = frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down", "attn_norm", "ffn_norm", "output_norm"})


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of llama.cpp's architectures: a row.

    Attributes:
        unequal: what is read for each block, "heads" and "widths" (of FFNs); the rest is that of the first. Where only
            heads are, matrices of an MLP may be left out: one that is missing is a norm of zeros.
        empty: how a block without attention is said: "zero" heads (but in the first block), or only by a "stub".
        interleaved: RoPE turns neighbouring numbers of a head, so rows of queries and keys are reordered; else halves.
        norms, mlp_norms, shared_norms: what the norms of a block are called, in the order of the family's row.
        norm_offset: what transformers adds to a norm's scale and llama.cpp does not.
        head_norms: there are norms of queries and keys.
        biases: the maps and norms that may have one.
        head: "tied" where it has none of its own, "own" where it wants one.
        square: queries of all heads together are as wide as the model.
        scalings: kinds of RoPE scaling that it is given.
        partial: RoPE may turn a share of a head.
        windows: sliding attention by a period; else none, and the context ends where a window would begin to matter.
        wide_at: with so many blocks it divides queries by the root of hidden size / heads, not of the head size.
        no_rope_period: every so manieth block has no RoPE.
        caps: it caps logits, by these settings of the configuration; those without get a cap that does nothing.
        activations: what its MLP computes, by the configuration's names.
        only_windows: it wants sliding attention, and all blocks get a window that is the whole text.
        constants: further keys that it wants, by the writer's methods.
    """

    name: str
    unequal: frozenset[str] = frozenset()
    empty: str = ""
    interleaved: bool = False
    fused_qkv: bool = False
    fused_mlp_in: bool = False
    norms: tuple[str, ...] = ("attn_norm",)
    mlp_norms: tuple[str, ...] = ("ffn_norm",)
    shared_norms: tuple[str, ...] = ()
    norm_offset: float = 0.0
    head_norms: bool = False
    biases: frozenset[str] = frozenset()
    head: str = ""
    square: bool = False
    scalings: tuple[str, ...] = ("default", "linear")
    partial: bool = False
    windows: bool = False
    wide_at: int = 0
    no_rope_period: int = 0
    caps: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    only_windows: bool = False
    constants: Mapping[str, int] = field(default_factory=dict)


_GEMMA: dict[str, Any] = {
    "norms": ("attn_norm", "post_attention_norm"),
    "mlp_norms": ("ffn_norm", "post_ffw_norm"),
    "norm_offset": 1.0,
    "head": "tied",
    "windows": True,
    "activations": ("gelu_pytorch_tanh",),
}
_OLD: dict[str, Any] = {"fused_qkv": True, "square": True, "biases": _LAYER_NORM, "scalings": ("default",)}
_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # llama.cpp has one for them, by a table of halves

_ALL = frozenset({"heads", "widths"})
_LLAMA = Architecture(name="llama", interleaved=True, biases=_LINEAR, scalings=("default", "linear", "llama3"))
_DECI = Architecture(
    name="deci", unequal=_ALL, empty="zero", interleaved=True, biases=_LINEAR,
    scalings=("default", "linear", "llama3", "longrope"),
)  # fmt: skip
# A mixture of experts that may have dense blocks only, and no gate of heads. Without a window RoPE turns half a head.
_STEP = Architecture(
    name="step35", unequal=frozenset({"heads"}), empty="stub", head_norms=True, head="own", only_windows=True,
    scalings=("default",), constants={"add_expert_feed_forward_length": 0},
)  # fmt: skip
# The architectures of a family, the most widely known first.
ROUTES: dict[str, tuple[Architecture, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "granite": (_LLAMA, _DECI),  # its four multipliers are folded into the weights
    "qwen2": (Architecture(name="qwen2", biases=frozenset({"attn_q", "attn_k", "attn_v"})), _DECI),
    "qwen3": (
        Architecture(name="qwen3", head_norms=True),
        Architecture(name="openelm", unequal=_ALL, empty="stub", fused_qkv=True, head_norms=True, head="tied"),
        _STEP,
    ),
    "phi3": (
        Architecture(
            name="phi3", fused_qkv=True, fused_mlp_in=True, square=True, partial=True,
            scalings=("default", "linear", "longrope"),
        ),
        _DECI,
    ),
    "smollm3": (Architecture(name="smollm3", interleaved=True, biases=_LINEAR, no_rope_period=4),),
    "gemma2": (
        Architecture(
            name="gemma2", wide_at=46, caps=("attn_logit_softcapping", "final_logit_softcapping"), **_GEMMA
        ),
    ),
    "gemma3_text": (Architecture(name="gemma3", head_norms=True, wide_at=62, **_GEMMA),),
    "olmo2": (
        Architecture(
            name="olmo2", norms=("post_attention_norm",), mlp_norms=("post_ffw_norm",), head_norms=True
        ),
    ),
    "phi": (
        Architecture(
            name="phi2", norms=(), mlp_norms=(), shared_norms=("attn_norm",), partial=True, activations=_GELU,
            **_OLD | {"biases": _LAYER_NORM | {"output"}},
        ),
    ),
    "gpt_neox": (Architecture(name="gptneox", partial=True, activations=_GELU, **_OLD),),
    "gpt2": (Architecture(name="gpt2", activations=_GELU, **_OLD),),
}  # fmt: skip


def has_head_norms(model: Model) -> bool:
    """Whether queries and keys pass a norm before RoPE."""
    family = model.family
    attentions = (block.get_submodule(family.attention) for block in model.blocks)
    return any(getattr(each, name, None) is not None for each in attentions for name in ("q_norm", "q_layernorm"))


def activation_of(config: Any) -> str | None:
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((value for name in names if (value := getattr(config, name, None))), None)


def ropes(config: Any) -> dict[str, dict[str, Any]]:
    """The RoPE of each kind of attention ("" where there is one for all); none where positions are learned."""
    stated = getattr(config, "rope_parameters", None) or {}
    nested = {kind: rope for kind, rope in stated.items() if isinstance(rope, dict)}
    return nested or ({"": stated} if stated else {})


def sliding(model: Model) -> tuple[int | None, list[bool]]:
    """The window of sliding attention, and which blocks have one."""
    config, blocks = model.hf.config, len(model.blocks)
    size = getattr(config, "sliding_window", None)
    if size is None or getattr(config, "use_sliding_window", True) is False:
        return None, [False] * blocks
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * blocks
    return (size if "sliding_attention" in kinds else None), [kind == "sliding_attention" for kind in kinds]


def period_of(model: Model, architecture: Architecture) -> int | None:
    """Every so manieth block has full attention, and no other: as llama.cpp says it; None if that does not hold."""
    have = sliding(model)[1]
    if not architecture.windows:
        return None
    fitting = (p for p in range(1, len(have) + 2) if have == [k % p < p - 1 for k in range(len(have))])
    return next(fitting, None)


def context_of(model: Model, architecture: Architecture) -> int | None:
    """How long a text may be, for llama.cpp to compute what transformers does."""
    window = sliding(model)[0]
    limits = [model.max_length, window if window and period_of(model, architecture) is None else None]
    return min((limit for limit in limits if limit), default=None)
