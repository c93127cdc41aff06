"""A block seen by roles, not by names."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.model.modeling_secateur import SKIPS, Family, Linear, Shape, has_attention, has_mlp, row_dim, shape_of


@dataclass(frozen=True)
class Block:
    """One open block of a model.

    Attributes:
        number: its number in the model as loaded (it keeps it when other blocks go).
        module: the decoder block itself.
        family: the row that names its parts.
    """

    number: int
    module: nn.Module
    family: Family

    @property
    def has_attention(self) -> bool:
        return has_attention(self.module, self.family)

    @property
    def has_mlp(self) -> bool:
        return has_mlp(self.module, self.family)

    @property
    def shape(self) -> Shape:
        return shape_of(self.module, self.family)

    @property
    def attention(self) -> nn.Module:
        return self.module.get_submodule(self.family.attention)

    @property
    def attention_out(self) -> Linear:
        """The attention's output projection; its input is tapped by methods."""
        return self.linear(self.family.out)

    @property
    def mlp_out(self) -> Linear:
        """The MLP's output ("down") projection; its input are the FFN neurons' activations."""
        return self.linear(self.family.mlp_out)

    @property
    def mlp_norm(self) -> nn.Module:
        """What reads the residual stream between attention and MLP, in families whose stream can be rebased; the
        identity where the MLP is gone."""
        return self.module.get_submodule(self.family.mlp_norms[0])

    @property
    def multiplier(self) -> float:
        """What is added to the residual stream is multiplied by this first."""
        return float(getattr(self.module, self.family.multiplier)) if self.family.multiplier else 1.0

    def past(self, x: Tensor) -> Tensor:
        """The residual stream as it would leave the block without its attention and MLP: (..., in) -> (..., out)."""
        for name in SKIPS:
            if (skip := getattr(self.module, name, None)) is not None:
                x = x @ (torch.ones_like(skip, device=x.device) if skip.is_meta else skip.detach()).to(x)
        return x

    @property
    def roles(self) -> dict[str, str]:
        """Paths inside the block of the linear maps that are there, by role."""
        qkv = ("q", "k", "v") if self.family.qkv_layout == "separate" else ("qkv",)
        roles: dict[str, str] = {}
        if self.has_attention:
            roles |= dict(zip(qkv, self.family.qkv, strict=True)) | {"attention_out": self.family.out}
        if self.has_mlp:
            gate_up = ("gate_up",) if self.family.fused_mlp_in else ("gate", "up")
            names = gate_up if len(self.family.mlp_in) == len(gate_up) else ("up",)
            roles |= dict(zip(names, self.family.mlp_in, strict=True)) | {"mlp_out": self.family.mlp_out}
        return roles

    def linear(self, path: str) -> Linear:
        return self.module.get_submodule(path)  # type: ignore[return-value]  # the family's row says so

    def weight(self, role: str) -> Tensor:
        """The weight of a role's linear map as (out, in), whichever way the module keeps it; a view of it."""
        linear = self.linear(self.roles[role])
        return linear.weight.T if row_dim(linear) else linear.weight

    def set_weight(self, role: str, weight: Tensor) -> None:
        """Replace it by `weight` (out, in), on the old one's device and in its dtype; for `surgery.apply` only."""
        linear = self.linear(self.roles[role])
        old = linear.weight
        new = weight.T if row_dim(linear) else weight
        new = new.to(old.device, old.dtype).clone(memory_format=torch.contiguous_format)
        linear.weight = nn.Parameter(new, requires_grad=old.requires_grad)


def twin(module: nn.Module) -> nn.Module:
    """Other modules that hold the same tensors: what they are stays as it is, whatever becomes of the module."""
    other = copy.copy(module)
    other._parameters, other._buffers = dict(module._parameters), dict(module._buffers)
    other._modules = {name: child and twin(child) for name, child in module._modules.items()}
    if "_old_forward" in other.__dict__:  # accelerate's hooks are bound to the module that they were put on
        other.__dict__["_old_forward"] = functools.partial(type(other).forward, other)
        other.__dict__["forward"] = functools.partial(module.__dict__["forward"].func, other)
    return other


class Original:
    """A block as it was at some moment, to be opened whatever becomes of it since.

    Args:
        block: it holds the block's own tensors; what the block is does not change by it.
    """

    def __init__(self, block: Block) -> None:
        self.block = replace(block, module=twin(block.module))

    @contextmanager
    def open(self) -> Iterator[Block]:
        """Give it, its weights present until the context ends."""
        yield self.block
