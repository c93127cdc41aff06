"""A Llama-like model whose blocks differ, as vLLM, SGLang and mlx-lm read it: model type `nemotron-nas`.

The configuration says of each block what it has (`block_configs`); the weights have Llama's names and their true sizes,
and of what was removed there is nothing. transformers has no such class: a configuration class travels beside the
weights, `configuration_nemotron_nas.py`, which `trust_remote_code` runs; of models there is none in it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from secateur.export import configuration_nemotron_nas as travelling
from secateur.export.padded import REBASED, stream_is_plain
from secateur.export.spelling import add_old_spelling
from secateur.export.weights import Names, write_generation, write_tensors
from secateur.model.handle import Model
from secateur.model.modeling_secateur import Shape, plain_config

MULTIPLE = 256  # what the engines round FFN widths up to, so that no other is the true one
ARCHITECTURE = "DeciLMForCausalLM"
LIBRARY = "vllm"  # as the hub calls it
USAGE = """```
vllm serve DIR --trust-remote-code
```

vLLM 0.32 (CPU build) was run with this form by its engine in Python; the command is written, not run."""


def refuses(model: Model) -> str | None:
    if model.family.not_llama is not None:
        return f"computes what Llama does, and {model.family.model_type} does not: {model.family.not_llama}"
    return _refuses_settings(model) or _refuses_layout(model)


def write(model: Model, folder: Path, max_shard_size: str = "5GB") -> dict[str, str]:
    assert (reason := refuses(model)) is None, reason
    config = _config(model)
    config.save_pretrained(folder)
    write_generation(model.hf.generation_config, folder)
    source = Path(travelling.__file__)
    shutil.copyfile(source, folder / source.name)
    add_old_spelling(folder, config, model.family)
    names = Names(model.hf)

    def read(part: int | None) -> dict[str, Tensor]:
        return _state(model, part, names, config)

    states = {part: read(part) for part in (None, *model.numbers)}  # of closed parts only the shapes count
    hollow = {name: tensor.to("meta") for state in states.values() for name, tensor in state.items()}
    part_of = {name: part for part, state in states.items() for name in state}
    del states
    with model.open_ends():
        return write_tensors(hollow, part_of, model.open, read, folder, max_shard_size)


def nbytes(model: Model) -> int:
    return model.layout().parameters * model.dtype.itemsize


def loads_in(model: Model) -> str:
    first = next(block for block in model.layout().blocks.values() if block.shape.kv_heads)
    # mlx-lm takes the size of a head from the hidden size
    whole = first.shape.query_heads * first.head_dim == model.hidden_size
    return "vLLM with --trust-remote-code; by their source also in SGLang" + (" and mlx-lm" if whole else "")


def ffn_mult(width: int, hidden: int) -> float:
    """The number that engines make an FFN width of: int(2 * ffn_mult * hidden / 3), rounded up to a multiple of 256.

    It aims at half a multiple below, so that no rounding of floats leads to another one.
    """
    return 3 * (width - MULTIPLE // 2) / (2 * hidden)


def block_config(shape: Shape, hidden: int) -> dict[str, Any]:
    """What `block_configs` says of a block; exactly these keys, since mlx-lm takes no others."""
    attention: dict[str, Any] = {
        "no_op": not shape.kv_heads,
        "n_heads_in_group": shape.query_heads // shape.kv_heads if shape.kv_heads else None,
        "replace_with_linear": False, "sparsify": None, "window_length": None, "num_sink_tokens": None,
        "use_prefill_window_in_sink_attention": False, "unshifted_sink": False,
    }  # fmt: skip
    ffn: dict[str, Any] = {
        "no_op": not shape.width,
        "ffn_mult": ffn_mult(shape.width, hidden) if shape.width else None,
        "replace_with_linear": False, "sparsify": None,
    }  # fmt: skip
    return {"attention": attention, "ffn": ffn}


def _refuses_settings(model: Model) -> str | None:
    shapes = [block.shape for block in model.layout().blocks.values()]
    config: Any = plain_config(model.hf.config, model.family, shapes)
    if config.hidden_act != "silu":
        return f"has SiLU in its MLPs, and this model {config.hidden_act}"
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else window is not None
    if slides and window < config.max_position_embeddings:
        return f"has no sliding window, and this model's attention sees the last {window} tokens only"
    return None


def _refuses_layout(model: Model) -> str | None:
    if not stream_is_plain(model):
        return REBASED
    shapes = {number: block.shape for number, block in model.layout().blocks.items()}
    if not next(iter(shapes.values())).kv_heads:
        return "needs an attention in the first block, which vLLM takes its head sizes from, and there is none"
    if not any(shape.width for shape in shapes.values()):  # by their sizes a stock Llama fails on it: see `_config`
        return "needs an MLP in some block, and there is none"
    heads = {shape.query_heads for shape in shapes.values() if shape.kv_heads}
    if len(heads) > 1:
        return (
            "has one number of query heads for all attentions (KV heads may differ), and heads of some were removed "
            "with their KV groups; remove whole attentions or neurons instead"
        )
    if model.hidden_size % max(heads):
        return (
            "is a Llama configuration, which wants a hidden size that the number of query heads divides; these are "
            f"{model.hidden_size} and {max(heads)}"
        )
    if odd := [number for number, shape in shapes.items() if shape.width % MULTIPLE]:
        blocks = ", ".join(map(str, odd[:4])) + (", ..." if len(odd) > 4 else "")
        return (
            f"has FFN widths in multiples of {MULTIPLE}, and others stand in blocks {blocks}: "
            f"prune with --round-to {MULTIPLE}"
        )
    return None


def _config(model: Model) -> travelling.NemotronNasConfig:
    """The model's settings under Llama's names, numbers all of them.

    The FFN width is that of no block. Engines read each block's; but transformers' LlamaForCausalLM, which ignores the
    model type, would fill a missing attention with random weights and merely warn, where now it fails on the shapes.
    """
    blocks = list(model.layout().blocks.values())
    shapes, hidden = [block.shape for block in blocks], model.hidden_size
    stated: Any = plain_config(model.hf.config, model.family, shapes)
    common = {name: getattr(stated, name) for name in LlamaConfig().to_dict() if hasattr(stated, name)}
    for name in ("model_type", "transformers_version", "architectures"):
        common.pop(name, None)
    first = next(block for block in blocks if block.shape.kv_heads)
    common |= {
        "num_attention_heads": first.shape.query_heads,
        "num_key_value_heads": max(shape.kv_heads for shape in shapes),
        "head_dim": first.head_dim,
        "intermediate_size": max(shape.width for shape in shapes) + MULTIPLE,
        "attention_bias": _has_bias(model, model.family.qkv[0]),
        "mlp_bias": _has_bias(model, model.family.mlp_in[0]),
        "dtype": model.dtype,
    }
    config = travelling.NemotronNasConfig([block_config(shape, hidden) for shape in shapes], **common)
    config.architectures = [ARCHITECTURE]
    file = travelling.__name__.rpartition(".")[2]
    config.auto_map = {"AutoConfig": f"{file}.{travelling.NemotronNasConfig.__name__}"}
    return config


def _has_bias(model: Model, path: str) -> bool:
    """Whether a linear map has a bias where it is there."""
    return any(f"{path}.bias" in block.state_dict() for block in model.blocks)


def _state(model: Model, part: int | None, names: Names, config: LlamaConfig) -> dict[str, Tensor]:
    """The tensors of a part under Llama's names, with those that a Llama has and this model does without.

    A norm whose scale was folded gets one of ones; Qwen2's output projections, without a bias, one of zeros.
    """
    family, state = model.family, names.in_file(model.state(part))
    like = model.hf.get_input_embeddings().weight
    if part is None:
        norm = f"{family.final_norm}.weight"
        return state if norm in state else state | {norm: like.new_ones(config.hidden_size)}
    place = model.position(part)
    shape, prefix = model.layout().blocks[part].shape, f"{family.blocks}.{place}."
    like = next(iter(state.values()), like)
    for there, norms in ((shape.kv_heads, family.attention_norms), (shape.width, family.mlp_norms)):
        for norm in norms:
            if there and f"{prefix}{norm}.weight" not in state:
                state[f"{prefix}{norm}.weight"] = torch.ones(config.hidden_size, dtype=like.dtype, device=like.device)
    bias = f"{prefix}{family.out}.bias"
    if shape.kv_heads and config.attention_bias and bias not in state:
        state[bias] = like.new_zeros(config.hidden_size)
    return state
