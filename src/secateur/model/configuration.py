"""What a model's configuration says of its shapes, written so that `modeling_secateur.py` reads it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from secateur.model.layout import Ends
from secateur.model.modeling_secateur import SKIPS, Family, Shape

# Entries with one value per block; an explicit list, since others may have that length by chance.
PER_BLOCK_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")


def state_shapes(config: PreTrainedConfig, family: Family, shapes: Sequence[Shape]) -> None:
    """Write shapes into a saved model's configuration, in transformers' own `per_layer_config` schema.

    The configuration's own width is set to one that NO module can have. A stock class, which would otherwise load the
    checkpoint and fill missing modules with random weights, then fails: newer versions of transformers refuse to read
    a per-layer attribute from the whole, older ones to build an MLP of that width.
    """
    config.per_layer_config = None
    setattr(config, family.width, -1)
    layers: dict[int, dict[str, object]] = {}
    for place, shape in enumerate(shapes):
        layer: dict[str, object] = {family.width: shape.width}
        if shape.kv_heads:
            layer[family.query_heads] = shape.query_heads
            if family.kv_heads:
                layer[family.kv_heads] = shape.kv_heads
        gone = {"attention": shape.kv_heads, "mlp": shape.width}
        if skip := [name for name, size in gone.items() if not size]:
            layer["skip"] = skip
        if shape.folded:  # either all blocks are or none, and the schema wants an entry in every layer
            sizes = {name: getattr(shape, name) for name in SKIPS}
            layer |= {"folded": True} | {name: size and list(size) for name, size in sizes.items()}
        layers[place] = layer
    config.per_layer_config = layers  # type: ignore[assignment]  # its keys may be whole numbers


def state_ends(config: PreTrainedConfig, ends: Ends) -> None:
    """Write the ends of the residual stream into a saved model's configuration, where they are not the stock ones.

    The vocabulary's size and whether the head is tied are said elsewhere in it, and may be changed there.
    """
    if ends != Ends(ends.vocabulary, ends.hidden, ends.tied, ends.hidden, ends.hidden):
        names = ("input", "output", "input_map", "output_map", "scaled")
        config.stream_ends = {name: getattr(ends, name) for name in names}
    else:
        config.__dict__.pop("stream_ends", None)


def shorten(config: PreTrainedConfig, position: int) -> None:
    """Shorten all that a configuration says block by block but its shapes."""
    for name in PER_BLOCK_LISTS:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [value for place, value in enumerate(values) if place != position])
    config.num_hidden_layers -= 1
