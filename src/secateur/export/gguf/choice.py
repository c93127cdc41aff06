"""Which architecture a model is written as, or why no one can hold it."""

from __future__ import annotations

from secateur.export.gguf.architectures import (
    IN_TURN,
    PADDED,
    ROUTES,
    Architecture,
    activation_of,
    has_head_norms,
    period_of,
    ropes,
)
from secateur.export.gguf.tensors import tensors
from secateur.model.handle import Model


def choose(model: Model) -> Architecture | str:
    """The first architecture that can hold the model; or why none can, as the rest of a sentence."""
    layout = model.layout()
    if layout.is_folded:
        return "has no norms without a scale and no maps on the residual branch: leave out what changes its basis"
    if not any(block.attention or block.mlp for block in layout.blocks.values()):
        return "needs a block, and of this model no attention and no MLP is left"
    routes = ROUTES.get(model.family.model_type, ())
    if not routes:
        return f"has no architecture for {model.family.model_type}"
    reasons = []
    for architecture in routes:
        if (reason := _refuses(architecture, model)) is None:
            return architecture
        reasons.append(f"as `{architecture.name}` it {reason}")
    return "; ".join(reasons) + f"; {IN_TURN if all(_out_of_turn(each, model) for each in routes) else PADDED}"


def may_differ(model: Model) -> frozenset[str]:
    """What may differ from block to block, of heads and widths, in an architecture that holds the model as it is."""
    routes = [each for each in ROUTES.get(model.family.model_type, ()) if _refuses(each, model) is None]
    return max((each.unequal for each in routes), key=len, default=frozenset())


def _refuses(architecture: Architecture, model: Model) -> str | None:
    """Why an architecture cannot hold the model; see `choose` for what none can."""
    config, layout = model.hf.config, model.layout()
    if not (layout.uniform or architecture.unequal):
        return "takes the sizes of all blocks from the first, and these differ"
    widths = {block.shape.width for block in layout.blocks.values() if block.mlp}
    if len(widths) > 1 and "widths" not in architecture.unequal:
        return "takes the FFN width of all blocks from the first, and these differ"
    if architecture.empty == "zero" and not any(block.attention for block in layout.blocks.values()):
        return "needs an attention for its KV cache, and none is left"
    if architecture.head == "tied" and not layout.ends.tied:
        return "has no head of its own beside the embedding"
    if architecture.head == "own" and layout.ends.tied:
        return "wants a head of its own beside the embedding"
    if has_head_norms(model) and not architecture.head_norms:
        return "has no norms of queries and keys"
    rows = {block.shape.query_heads * block.head_dim for block in layout.blocks.values() if block.attention}
    if architecture.square and rows != {model.hidden_size}:
        return f"wants as many query rows as the model is wide, {model.hidden_size}"
    if (activation := activation_of(config)) not in architecture.activations:
        return f"computes {' or '.join(architecture.activations)}, not {activation}"
    return _refuses_positions(architecture, model) or _refuses_biases(architecture, model)


def _out_of_turn(architecture: Architecture, model: Model) -> str | None:
    """Why the order of blocks of several kinds is none that the architecture can be told."""
    period = architecture.no_rope_period
    if period and list(model.hf.config.no_rope_layers) != [(k + 1) % period != 0 for k in range(len(model.numbers))]:
        return f"leaves RoPE out in every {period}th block, and this model in others"
    thetas = {rope.get("rope_theta") for rope in ropes(model.hf.config).values()}
    if len(thetas) > 1 and period_of(model, architecture) is None:
        return "has sliding attention in all blocks but every nth, and this model in others"
    return None


def _refuses_positions(architecture: Architecture, model: Model) -> str | None:
    for rope in ropes(model.hf.config).values():
        if (kind := rope.get("rope_type", "default")) not in architecture.scalings:
            return f"is not given the RoPE scaling '{kind}'"
        if rope.get("partial_rotary_factor", 1.0) != 1.0 and not architecture.partial:
            return "turns whole heads"
    return _out_of_turn(architecture, model)


def _refuses_biases(architecture: Architecture, model: Model) -> str | None:
    kinds = {name.removeprefix("blk.").lstrip("0123456789.") for name, _ in tensors(model.hollow(), architecture)}
    extra = {kind.removesuffix(".bias") for kind in kinds if kind.endswith(".bias")} - architecture.biases
    return f"has no bias in {', '.join(sorted(extra))}" if extra else None
