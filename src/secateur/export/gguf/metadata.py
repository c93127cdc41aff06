"""What a GGUF file says of the model beside its weights: sizes, positions, where it comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from secateur.export.beside import licence_of
from secateur.export.gguf.architectures import Architecture, context_of, period_of, ropes, sliding
from secateur.export.gguf.tensors import Stream, head_dim, sizes
from secateur.model.handle import Model

_LONG = 1 << 20  # tokens
_NO_CAP = 1e6  # tanh(x / c) * c is x to float32's precision for logits
_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # `general.file_type`


def add_sizes(writer: Any, model: Model, architecture: Architecture) -> None:
    """Add the architecture's own keys to a `gguf.GGUFWriter`."""
    config, blocks = model.hf.config, sizes(model, architecture)
    writer.add_block_count(len(blocks))
    writer.add_vocab_size(model.vocab_size)
    writer.add_embedding_length(model.hidden_size)
    if context := context_of(model, architecture):
        writer.add_context_length(context)
    for add, part, values in (
        (writer.add_head_count, "heads", [size.query_heads for size in blocks]),
        (writer.add_head_count_kv, "heads", [size.kv_heads for size in blocks]),
        (writer.add_feed_forward_length, "widths", [size.width for size in blocks]),
    ):
        add(values if part in architecture.unequal else values[0])
    writer.add_key_length(head_dim(model))
    writer.add_value_length(head_dim(model))
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)
    _add_norms(writer, config, Stream.of(model))
    _add_positions(writer, model, architecture)
    for name, constant in architecture.constants.items():
        getattr(writer, name)(constant)
    for cap in architecture.caps:
        getattr(writer, f"add_{cap}")(getattr(config, cap, None) or _NO_CAP)


def _add_norms(writer: Any, config: Any, stream: Stream) -> None:
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(
            eps / stream.embedding**2
        )  # of a stream that is divided by the embedding's factor
    for name in ("layer_norm_eps", "layer_norm_epsilon"):
        if (eps := getattr(config, name, None)) is not None:
            writer.add_layer_norm_eps(eps)


def _add_positions(writer: Any, model: Model, architecture: Architecture) -> None:
    import gguf

    kinds = ropes(model.hf.config)
    rope = kinds.get("full_attention") or kinds.get("")
    if rope is None:
        return
    writer.add_rope_dimension_count(int(head_dim(model) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        rotary: Any = model.hf.base_model.rotary_emb
        writer.add_rope_scaling_attn_factors(rotary.attention_scaling)
    if architecture.windows and (size := sliding(model)[0]):
        writer.add_sliding_window(size)
        writer.add_sliding_window_pattern(period_of(model, architecture) or 1)
        if local := kinds.get("sliding_attention"):
            writer.add_rope_freq_base_swa(local["rope_theta"])
    if architecture.only_windows:
        writer.add_sliding_window(context_of(model, architecture) or _LONG)
        writer.add_sliding_window_pattern([True] * len(sizes(model, architecture)))
        writer.add_rope_freq_base_swa(rope["rope_theta"])


def add_origin(writer: Any, model: Model, type_name: str, *, as_phi_3: bool = False) -> None:
    """Add the `general.*` keys: name, size, licence, what it was made from, and how its weights are kept.

    Args:
        as_phi_3: llama.cpp is to read the tokenizer as Phi-3's, which it does by the name; else the name is not that.
    """
    import gguf

    source = model.source
    name = Path(str(source.get("name") or source.get("repository") or model.family.model_type)).name
    name = _PHI_3.sub("Phi 3", name) if not as_phi_3 else name if _PHI_3.search(name) else f"{name}-phi-3"
    pruned = model.edits_applied or any(step.recovery is None for step in model.parents)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name + ("-pruned" if pruned else ""))
    writer.add_size_label(size_label(model.layout().parameters))
    writer.add_file_type(FILE_TYPES[type_name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tags(["text-generation", "secateur"])
    if licence := licence_of(model):
        writer.add_license(licence)
    base = source.get("base_model") or source.get("repository")
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
        organisation, _, repository = str(base).partition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, repository)
        writer.add_base_model_organization(0, organisation)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")


def size_label(parameters: int) -> str:
    """As GGUF files' names have it: 135M, 1.2B."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            number = parameters / unit
            return f"{number:.1f}{letter}" if number < 10 else f"{number:.0f}{letter}"
    return str(parameters)
