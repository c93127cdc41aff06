"""Tier A: the unmodified architecture; loads everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.export.spelling import add_old_spelling, has_old_spelling
from secateur.export.weights import write_model
from secateur.model.handle import Model
from secateur.model.modeling_secateur import Family, Shape, plain_config


def refuses(model: Model) -> str | None:
    config = _stock_config(model)
    return config if isinstance(config, str) else None


def write(model: Model, folder: Path, max_shard_size: str) -> dict[str, str]:
    config = _stock_config(model)
    assert not isinstance(config, str), config  # else `refuses` said so
    with _as_stock(model, config):
        sums = write_model(model, folder, max_shard_size)
    add_old_spelling(folder, config, model.family)
    return sums


def loads_in(model: Model) -> str:
    config = _stock_config(model)
    return "transformers 5" if isinstance(config, str) else versions(config, model.family)


def versions(config: PreTrainedConfig, family: Family) -> str:
    """The versions in which a stock configuration means the same."""
    return "transformers 4.57 and 5" if has_old_spelling(config, family) else "transformers 5"


@contextmanager
def _as_stock(model: Model, stock: PreTrainedConfig) -> Iterator[None]:
    """For the time of the context the model is of its stock class, which may rename tensors as it writes them."""
    hf, config, adopted = model.hf, model.hf.config, type(model.hf)
    stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(stock)]
    hf.__class__, hf.config = stock_class, stock
    try:
        yield
    finally:
        hf.__class__, hf.config = adopted, config


def _stock_config(model: Model) -> PreTrainedConfig | str:
    """The configuration of the unmodified architecture; or why it cannot hold the layout."""
    layout = model.layout()
    if not layout.uniform:
        return "has blocks of one shape only, none without attention or MLP, and norms with a scale"
    first = next(iter(layout.blocks.values()))
    return config_of_shape(model, first.shape, first.head_dim)


def config_of_shape(model: Model, shape: Shape, head_dim: int) -> PreTrainedConfig | str:
    """A model's configuration as the unmodified architecture has it, with all blocks of one shape.

    Args:
        shape: of a block with attention and MLP.

    Returns:
        It, or why the architecture cannot have such blocks: the rest of a sentence that begins with its name.
    """
    family, config = model.family, model.hf.config
    if not family.free_head_dim and shape.query_heads * head_dim != config.hidden_size:
        return f"divides its hidden size among the heads, and {shape.query_heads} of {head_dim} do not make it up"
    stock: Any = plain_config(config, family, [shape])
    values = {family.width: shape.width, family.query_heads: shape.query_heads}
    if family.kv_heads:
        values[family.kv_heads] = shape.kv_heads
    if family.free_head_dim:
        values["head_dim"] = head_dim
    for name, value in values.items():
        setattr(stock, name, value)
    stock_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(stock)]
    stock.architectures = [stock_model.__name__]
    stock.dtype = str(model.dtype).removeprefix("torch.")
    try:
        stock.validate()  # Llama's own check wants a hidden size that the number of heads divides
    except StrictDataclassError as error:
        return f"does not take the configuration: {error}"
    return stock
