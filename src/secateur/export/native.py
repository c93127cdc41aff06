"""Tier B: stock tensor names under a model type of our own.

It loads in transformers with `import secateur`, or with `trust_remote_code=True` through the modeling file beside it.
"""

from __future__ import annotations

from pathlib import Path

from secateur.export.weights import write_model
from secateur.model.handle import Model


def refuses(model: Model) -> str | None:
    return None


def write(model: Model, folder: Path, max_shard_size: str) -> dict[str, str]:
    return write_model(model, folder, max_shard_size)


def loads_in(model: Model) -> str:
    return "transformers 5.14 or newer"  # which brought `per_layer_config`; measured down from 5.23
