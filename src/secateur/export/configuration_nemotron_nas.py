"""The configuration of a model whose blocks differ as vLLM, SGLang and mlx-lm read it: model type `nemotron-nas`.

This one file is copied beside the weights, since transformers has no such class. It holds a Llama configuration and,
for each block, what its attention and its FFN are; it imports transformers only, and defines no model.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class NemotronNasConfig(LlamaConfig):
    """Llama's, with `block_configs`: one per block, whose parts are read as attributes.

    Sizes at the top are numbers, never None. `intermediate_size` is that of no block, so that a stock Llama does not
    take the weights for its own.

    Args:
        block_configs: {"attention": {...}, "ffn": {...}} for each block, as config.json has it.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [_object(block) for block in block_configs or ()]

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it: plain dictionaries again."""
        stated: dict[str, Any] = super().to_dict()
        return stated | {"block_configs": [_plain(block) for block in self.block_configs]}


def _object(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{name: _object(each) for name, each in value.items()})
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, SimpleNamespace):
        return {name: _plain(each) for name, each in vars(value).items()}
    return value
