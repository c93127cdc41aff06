"""Tier B as vLLM's transformers backend serves it: what is gone has the smallest stub in its place, of zeros.

vLLM gives every block a KV cache and looks for an attention in it, so none may be absent. A stub adds zero to the
residual stream, exactly; it has one query head, one KV head and one neuron. All else is tier B: stock tensor names,
sizes block by block in `per_layer_config`, and the same modeling file, by which it also loads in plain transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from secateur.export.weights import write_model
from secateur.model.configuration import state_shapes
from secateur.model.handle import Model, hollow
from secateur.model.modeling_secateur import PREFIX, Family, Shape, classes, plain_config, shape_of
from secateur.model.views import Block

_HEAD = "lm_head"  # the only name of a head that vLLM's transformers backend loads
LIBRARY = "transformers"  # as the hub calls it
USAGE = """```
vllm serve DIR --trust-remote-code --model-impl transformers
```

The command was run with vLLM 0.32 (CPU build) on models of this form."""
# Run in vLLM 0.32 (bench/vllm_parity.py), and not served.
NOT_SERVED = {
    "gpt2": "finds no biases of GPT-2's attention when it loads one with this code (vLLM 0.32)",
    "phi3": "asks a Phi-3 model for one number of heads of all its blocks (vLLM 0.32)",
}


def refuses(model: Model) -> str | None:
    hf: Any = model.hf
    if (reason := NOT_SERVED.get(model.family.model_type)) is not None:
        return reason
    if model.layout().is_folded:
        return "takes norms with a scale only, which SliceGPT folds into the maps behind them"
    if not hf._supports_attention_backend or "AutoModel" not in classes(hf.config.model_type.removeprefix(PREFIX)):
        return "needs an attention that calls transformers' attention interface, which vLLM replaces"
    head: Any = hf.get_output_embeddings()
    width = int(head.weight.shape[1])
    if getattr(hf, _HEAD, None) is not head:
        return f"looks for the head under the name {_HEAD}, which this architecture calls otherwise"
    if width != model.hidden_size:
        return f"builds a head as wide as the blocks ({model.hidden_size}), and this one is {width} wide"
    return None


def write(model: Model, folder: Path, max_shard_size: str = "5GB") -> dict[str, str]:
    return write_model(_WithStubs(model), folder, max_shard_size)


def nbytes(model: Model) -> int:
    return model.layout().parameters * model.dtype.itemsize  # stubs are small


def loads_in(model: Model) -> str:
    return "vLLM 0.32 (--model-impl transformers --trust-remote-code) and transformers 5.14 or newer"


class _WithStubs(Model):
    """A model with a stub wherever a module is gone, to be written: of what is there, it has the weights block by block
    as the model has them; of what is not, zeros."""

    def __init__(self, model: Model) -> None:
        twin = hollow(_config(model), model.dtype, model.source)
        twin.hf.generation_config = model.hf.generation_config
        super().__init__(twin.hf)
        self._model = model
        self.numbers = list(model.numbers)

    @contextmanager
    def open(self, number: int, *, write: bool = False) -> Iterator[Block]:
        with self._model.open(number, write=write) as block:
            yield block

    @contextmanager
    def open_ends(self, *, write: bool = False) -> Iterator[None]:
        with self._model.open_ends(write=write):
            yield

    def state(self, number: int | None = None) -> dict[str, Tensor]:
        there, wanted = self._model.state(number), super().state(number)
        return {name: there[name] if name in there else torch.zeros_like(wanted[name], device="cpu") for name in wanted}


def _config(model: Model) -> PreTrainedConfig:
    """The configuration with stubs, which also says outright what vLLM would otherwise work out from the whole."""
    config: Any = copy.deepcopy(model.hf.config)
    family = model.family
    shapes = [shape_of(block, family) for block in model.blocks]
    plain: Any = plain_config(config, family, shapes)
    heads: int = getattr(plain, family.query_heads)
    # of the hidden size it would take as many heads as a block has
    config.head_dim = getattr(plain, "head_dim", None) or plain.hidden_size // heads
    if scaling := getattr(plain, "logits_scaling", None):  # a divisor in transformers; vLLM multiplies
        config.logit_scale = 1 / scaling
    state_shapes(config, family, [_with_stubs(shape, plain, family) for shape in shapes])
    return config


def _with_stubs(shape: Shape, plain: Any, family: Family) -> Shape:
    """One head and one neuron where there is none; of a family whose heads cannot go alone, all of them."""
    heads = (shape.query_heads, shape.kv_heads)
    if not shape.kv_heads:
        heads = (1, 1)
        if "KeepHeads" in family.cannot:
            heads = (getattr(plain, family.query_heads), getattr(plain, family.kv_heads or family.query_heads))
    return replace(shape, width=shape.width or 1, query_heads=heads[0], kv_heads=heads[1])
