"""`secateur.json`: all that is needed to repeat a run, and to replay it where its edits carry no tensor."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import transformers

from secateur.assets.local import SUFFIXES
from secateur.engine.tokens import Tokens
from secateur.export import RECORD, tier
from secateur.folders import write_file
from secateur.model.budget import Budget, shares
from secateur.model.handle import Model
from secateur.model.layout import Layout
from secateur.model.load import read_record
from secateur.surgery.edits import to_json
from secateur.version import __version__

if TYPE_CHECKING:
    from secateur.pruning import Pruning

FORMAT = 1
_BY_TEXT = ("perplexity", "fidelity")  # parts of an evaluation with one entry per text
_PATHS = ("name", "asked", "path")  # of what was read from this machine
_PATH_OPTIONS = ("--out", "--data", "--cache-dir", "--log-file")


def identity(
    model_fingerprint: str, tokens: Tokens, method: str, options: Mapping[str, Any], budget: Budget, seed: int
) -> str:
    """sha256 of all that decides a run's outcome; on one kind of device, two runs of one identity give
    the same model."""
    parts = [
        model_fingerprint,
        tokens.fingerprint(),
        method,
        dict(options),
        asdict(budget),
        seed,
        __version__,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_record(
    model: Model,
    pruning: Pruning,
    tokens: Tokens,
    *,
    model_fingerprint: str,
    seed: int,
    cost: Mapping[str, Any],
    arguments: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe a finished pruning of `model`.

    Args:
        model_fingerprint: of the model as loaded, taken before the pruning.
        cost: seconds and forwards, spent and asked for.
        arguments: the command line or call as given.
        notes: what the method said of its run (`Run.note`).
    """
    budget = pruning.budget
    return {
        "secateur": __version__,
        "format": FORMAT,
        "fingerprint": identity(model_fingerprint, tokens, pruning.method, pruning.options, budget, seed),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": pruning.method,
        "options": pruning.options,
        "seed": seed,
        "sparsity": {
            "asked": budget.sparsity,
            "of": budget.of,
            "round_to": budget.round_to,
            "achieved": shares(pruning.before, pruning.after),
        },
        "tier": tier(model),
        "model": {**public_facts(model.source), "family": model.family.model_type, "fingerprint": model_fingerprint},
        "calibration": {**public_facts(tokens.source), "fingerprint": tokens.fingerprint()},
        "arguments": public_arguments(arguments or {}),
        "environment": environment(model),
        "cost": dict(cost),
        "before": size(pruning.before, model),
        "after": size(pruning.after, model),
        "perplexity": [],
        "evaluations": [],
        "notes": dict(notes or {}),
        "edits": [to_json(edit) for edit in pruning.edits],
        "parents": model.parents,
    }


def public_name(name: str, *, local: bool = False) -> str:
    """A hub id or name as it is; of a path its last part, since records and cards are published and paths are private.

    What a file is, its sha256 says. A relative path looks like a hub id (`owner/name`) if it has two parts: it is none
    if it is there, or ends as a text's file does.

    Args:
        local: it is known to be a path.
    """
    path = PurePath(name)
    if (
        local
        or path.is_absolute()
        or name.startswith((".", "~"))
        or len(path.parts) > 2
        or path.suffix.lower() in SUFFIXES
        or os.path.exists(name)
    ):
        return path.name or name
    return name


def public_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts on a model or text with public names. What comes from the hub or PyPI has no others."""
    if facts.get("source") in ("hub", "pypi"):
        return dict(facts)
    local = _PATHS if facts.get("source") else ()
    return {
        name: public_name(value, local=name in local) if isinstance(value, str) else value
        for name, value in facts.items()
    }


def public_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with public names; of a command line, in each word and behind each `--option=`."""

    def public(value: Any, before: Any = None) -> Any:
        if isinstance(value, (list, tuple)):
            return [public(each, previous) for previous, each in zip([None, *value], value, strict=False)]
        if not isinstance(value, str):
            return value
        option, equals, given = value.partition("=")
        if value.startswith("--") and equals:
            return option + equals + public_name(given, local=option in _PATH_OPTIONS)
        return public_name(value, local=before in _PATH_OPTIONS)

    return {name: public(value) for name, value in arguments.items()}


def remarks(record: Mapping[str, Any]) -> list[str]:
    """The notes that are meant for readers: those that are text."""
    return [note for note in record.get("notes", {}).values() if isinstance(note, str)]


def size(layout: Layout, model: Model) -> dict[str, Any]:
    """Sizes of a layout, at the model's dtype."""
    blocks = layout.blocks.values()
    return {
        "parameters": layout.parameters,
        "block_parameters": layout.block_parameters,
        "weight_bytes": layout.parameters * model.dtype.itemsize,
        "blocks": len(layout.blocks),
        "attentions": sum(block.shape.kv_heads > 0 for block in blocks),
        "mlps": sum(block.shape.width > 0 for block in blocks),
        "neurons": sum(block.shape.width for block in blocks),
        "kv_heads": sum(block.shape.kv_heads for block in blocks),
        "stream_width": min(layout.stream_width(site) for site in layout.sites),  # of the residual stream, narrowest
    }


def environment(model: Model) -> dict[str, Any]:
    """Versions, threads and device: what else may move a last digit."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.hf.config._attn_implementation,
    }


def append_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Add an evaluation to a checkpoint's record, atomically; a folder without one is left alone."""
    record = read_record(folder)
    if record is not None:
        record.setdefault("evaluations", []).append(_public_evaluation(evaluation))
        write_file(folder / RECORD, dump(record))


def _public_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The same with public names of models and texts."""

    def public(judged: dict[str, Any]) -> dict[str, Any]:
        texts = {part: [public_facts(each) for each in judged[part]] for part in _BY_TEXT if part in judged}
        name = judged.get("name")
        return {**judged, **({"name": public_name(name)} if name else {}), **texts}

    return {key: public(value) if isinstance(value, dict) else value for key, value in evaluation.items()}


def dump(record: Mapping[str, Any]) -> str:
    """JSON with one entry per line, but each edit and note, and each list of numbers in an evaluation, on one line:
    a record is read by people too."""
    lines: list[str] = []

    def mark(value: Any) -> str:
        lines.append(json.dumps(value, ensure_ascii=False))
        return f"\0{len(lines) - 1}\0"

    def numbers_aside(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers_aside(one) for key, one in value.items()}
        if isinstance(value, list):
            plain = len(value) > 0 and all(isinstance(one, (int, float)) for one in value)
            return mark(value) if plain else [numbers_aside(one) for one in value]
        return value

    def put_aside(each: Mapping[str, Any]) -> dict[str, Any]:
        marked: dict[str, Any] = {"edits": [mark(edit) for edit in each.get("edits", [])]}
        if "evaluations" in each:
            marked["evaluations"] = numbers_aside(each["evaluations"])
        if "notes" in each:
            marked["notes"] = {name: mark(note) for name, note in each["notes"].items()}
        if "parents" in each:
            marked["parents"] = [put_aside(parent) for parent in each["parents"]]
        return {**each, **marked}

    text = json.dumps(put_aside(record), indent=2, ensure_ascii=False)
    return re.sub(r'"\\u0000(\d+)\\u0000"', lambda match: lines[int(match[1])], text) + "\n"
