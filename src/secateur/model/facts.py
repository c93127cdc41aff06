"""What a record says of a model: its sizes, where it came from, and what it ran on."""

from __future__ import annotations

import json
import platform

import safetensors
import torch
import transformers

from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.record import Facts, Sizes, public_facts

# What a configuration says that decides no figure.
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "auto_map"}


def sizes(layout: Layout, model: Model) -> Sizes:
    """Sizes of a layout, at the model's dtype."""
    shapes = [block.shape for block in layout.blocks.values()]
    return Sizes(
        parameters=layout.parameters, block_parameters=layout.block_parameters, blocks=len(shapes),
        weight_bytes=layout.parameters * model.dtype.itemsize, attentions=sum(shape.kv_heads > 0 for shape in shapes),
        mlps=sum(shape.width > 0 for shape in shapes), neurons=sum(shape.width for shape in shapes),
        kv_heads=sum(shape.kv_heads for shape in shapes),
        stream_width=min(layout.stream_width(site) for site in layout.sites),
    )  # fmt: skip


def origin(model: Model, fingerprint: str) -> Facts:
    """Where a model came from, by public names.

    Args:
        fingerprint: of the model that is meant, which may be the one before a pruning.
    """
    return {**public_facts(model.source), "family": model.family.model_type, "fingerprint": fingerprint}


def configuration(model: Model) -> str:
    """What a model's configuration decides, beside its weights, as JSON: epsilons, RoPE, dropout."""
    stated = model.hf.config.to_dict().items()
    return json.dumps({key: value for key, value in stated if key not in _VOLATILE}, sort_keys=True, default=str)


def environment(model: Model) -> Facts:
    """Versions, threads and device: what else may move a last digit."""
    return {
        "python": platform.python_version(), "torch": str(torch.__version__),
        "transformers": transformers.__version__, "safetensors": safetensors.__version__,
        "threads": torch.get_num_threads(), "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."), "attention": model.hf.config._attn_implementation,
    }  # fmt: skip
