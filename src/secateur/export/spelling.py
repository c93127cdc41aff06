"""The spelling of transformers 4, beside that of transformers 5, which writes only its own.

Since 5 all that concerns RoPE lies in `rope_parameters`; older readers look at the top of the configuration, and take
theta 10,000 and no scaling, without an error, where it says nothing. 5 reads the old keys too, to the same effect.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from secateur.model.family_plugins import IN_TABLE
from secateur.model.modeling_secateur import Family

TOKENIZER_CONFIG = "tokenizer_config.json"

_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")  # of scaling, in 4.57
_SHARE = "partial_rotary_factor"


def add_old_spelling(folder: Path, config: PreTrainedConfig, family: Family) -> None:
    """Write into a folder's config.json, which is `config` as transformers 5 spells it, what 4.57 reads too."""
    path = folder / CONFIG_NAME
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(settings | _old_settings(config, family), indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def has_old_spelling(config: PreTrainedConfig, family: Family) -> bool:
    """Whether 4.57 can be told all that a stock configuration says; where not, it fails on what is written."""
    rope = getattr(config, "rope_parameters", None) or {}
    if family.model_type not in IN_TABLE or _kind(rope.get("sliding_attention") or {}) != "default":
        return False
    old = _old_settings(config, family)
    if family.rope_share is None and old.get(_SHARE, 1) != 1:
        return False
    if not (scaling := old.get("rope_scaling")):
        return True
    if family.rope_scalings is None:
        return _kind(scaling) in _KINDS
    return scaling.keys() == set(family.rope_scalings.get(_kind(scaling), ()))


def add_old_tokenizer_class(folder: Path) -> None:
    """Name the tokenizer of a folder as 4 knows it, where 5 has given it a name of its own."""
    path = folder / TOKENIZER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if settings.get("tokenizer_class") != "TokenizersBackend":
        return
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its other name in 5
    if isinstance(settings.get("extra_special_tokens"), list):  # in 4 a mapping, beside the list of this name:
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _old_settings(config: Any, family: Family) -> dict[str, Any]:
    old: dict[str, Any] = {"torch_dtype": str(config.dtype).removeprefix("torch.")}
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return old
    if local := rope.get("sliding_attention"):  # Gemma 3: a RoPE for each kind of attention, of which 4 scales one
        old["rope_local_base_freq"] = local["rope_theta"] if _kind(local) == "default" else None  # None: it fails there
        rope = rope["full_attention"]
    old[family.rope_theta] = rope["rope_theta"]
    if (share := rope.get(_SHARE)) and (share != 1 or type(config)().rope_parameters.get(_SHARE) != 1):
        old[family.rope_share or _SHARE] = share  # where its code knows no such share, it fails there
    return old if _kind(rope) == "default" else old | _scaling(config, family, rope)


def _scaling(config: Any, family: Family, rope: dict[str, Any]) -> dict[str, Any]:
    """A `rope_scaling` that takes the place of `rope_parameters` in 5 too, and what it needs beside it in 4."""
    trained: Any = rope.get("original_max_position_embeddings")
    numbers = {name: float(value) for name, value in rope.items() if type(value) is int}  # as 4 wants all but lengths
    scaling = {name: value for name, value in (rope | numbers).items() if name not in ("rope_theta", _SHARE)}
    scaling |= {"original_max_position_embeddings": trained} if trained else {}
    beside = {}
    if family.rope_scalings:
        scaling["type"] = scaling.pop("rope_type")
        if hasattr(config, "original_max_position_embeddings"):
            del scaling["original_max_position_embeddings"]
    elif _kind(rope) == "longrope" and trained != config.max_position_embeddings:
        # 4 takes its factor from these two lengths, whatever else is said
        beside["original_max_position_embeddings"] = trained
        factor = rope.get("factor") or 0
        if factor not in (0, config.max_position_embeddings / trained) and rope.get("attention_factor") is None:
            scaling["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return {"rope_scaling": scaling, **beside}


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
