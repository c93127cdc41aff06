"""LoRA adapters on a model's linear maps, by peft: put on, merged, taken off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.errors import MissingExtraError, UnsupportedModelError
from secateur.heal.settings import Settings
from secateur.model.handle import Model
from secateur.model.modeling_secateur import Conv1D


def require_extra(settings: Settings) -> None:
    """Raise MissingExtraError unless what trains is there: accelerate, and for LoRA peft."""
    for package in ("peft", "accelerate") if settings.train == "lora" else ("accelerate",):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError.of(package, "recover", "recovering a model") from error


def targets(model: Model) -> list[str]:
    """The paths of all linear maps that the blocks still have: q, k, v, attention_out, gate, up, mlp_out, or the fused
    ones of a family.

    Raises:
        UnsupportedModelError: there is none.
    """
    paths = []
    for number in model.numbers:
        with model.open(number) as block:
            place = f"{model.family.blocks}.{model.position(number)}"
            paths += [f"{place}.{path}" for path in block.roles.values()]
    if not paths:
        raise UnsupportedModelError("the model's blocks have no linear map left, so there is nothing to train")
    return paths


@contextmanager
def adapters(model: Model, settings: Settings) -> Iterator[Any]:
    """The model with adapters on, as peft's; at the end they are merged, or thrown away if there was an error."""
    adapted, merge = attach(model, settings), False
    try:
        yield adapted
        merge = True
    finally:
        detach(model, adapted, merge=merge)


def attach(model: Model, settings: Settings) -> Any:
    """Put adapters on, in float32 whatever the model's dtype; all else is frozen.

    Their first values are drawn from torch's shared generator (see `hf.own_randomness`); at first they change nothing.

    Returns:
        peft's model around `model.hf`, whose linear maps now carry the adapters.
    """
    from peft import LoraConfig, get_peft_model

    paths = targets(model)
    kinds = {isinstance(model.hf.get_submodule(path), Conv1D) for path in paths}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float is fine
        lora_dropout=settings.dropout,
        target_modules=paths,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=kinds == {True},  # Conv1D keeps its weight as (in, out)
    )
    with warnings.catch_warnings():  # peft asks by a name that transformers has given up
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model.hf, config, autocast_adapter_dtype=True)


def detach(model: Model, adapted: Any, *, merge: bool) -> None:
    """Take the adapters off, their product added to the weights or not; the model is as it was before otherwise.

    The sum is taken in float32 and rounded once to the weights' dtype.
    """
    bare: nn.Module = adapted.merge_and_unload(progressbar=False) if merge else adapted.unload()
    if bare is not model.hf:
        raise RuntimeError("peft gave another model back than it was given")
    for parameter in bare.parameters():
        parameter.requires_grad_(True)
    model.hf.eval()
