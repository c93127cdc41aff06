"""The family of StarCoder2: LayerNorms, and an MLP of two matrices."""

from __future__ import annotations

from secateur import Family

STARCODER2 = Family(
    model_type="starcoder2",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    requires={"use_bias": True},
    no_rebase="its LayerNorm subtracts the mean, which a rotation does not commute with",
)
