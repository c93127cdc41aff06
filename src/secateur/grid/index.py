"""What `compare.json` says of a grid: the model, the judging, the machine, the cells in the table's order."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from secateur.engine.tokens import Tokens
from secateur.grid.cells import Cell
from secateur.judge.judging import Judging
from secateur.model.facts import environment
from secateur.model.handle import Model
from secateur.record import public_arguments, public_facts, public_name
from secateur.report.results import SCHEMA
from secateur.report.results_before import commands_of
from secateur.version import __version__

_CPU = Path("/proc/cpuinfo")


def judged_by(model_fingerprint: str, judging: Judging, texts: Mapping[str, Tokens]) -> str:
    """sha256 of all that the cells of one folder must have in common."""
    prints = {public_name(name): tokens.fingerprint() for name, tokens in texts.items()}
    return digest(model_fingerprint, _public(judging), prints, __version__)


def make_index(
    kind: str,
    dense: Model,
    model_fingerprint: str,
    judging: Judging,
    texts: Mapping[str, Tokens],
    cells: Sequence[Cell],
    *,
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of a new `compare.json`.

    Args:
        settings: of the grid; they stand beside the judging's under `grid`.
    """
    layout, given = dense.layout(), public_arguments(arguments)
    return {
        "schema": SCHEMA,
        "kind": kind,
        "model": {
            "name": public_facts(dense.source).get("name"),
            "fingerprint": model_fingerprint,
            "parameters": layout.parameters,
            "block_parameters": layout.block_parameters,
            "blocks": len(layout.blocks),
            "hidden_size": layout.ends.hidden,
            "family": dense.family.model_type,
        },
        "arguments": given,
        "commands": commands_of({"arguments": given}),
        "settings": {**_public(judging), "grid": dict(settings)},
        "texts": {
            public_name(name): {**public_facts(tokens.source), "fingerprint": tokens.fingerprint()}
            for name, tokens in texts.items()
        },
        "machine": machine(),
        "versions": {"secateur": __version__, **environment(dense)},
        "created": now(),
        "judged_by": judged_by(model_fingerprint, judging, texts),
        "cells": [cell.name for cell in cells],
    }


_TERMS = ("of", "round_to", "calibration", "seed", "count", "samples", "length")


def differing(old: Mapping[str, Any], new: Mapping[str, Any], judging: Judging) -> list[str]:
    """What two indices of one folder may not differ in, and do; [] where they fit."""
    had: Mapping[str, Any] = old.get("settings", {})
    terms = _unequal_terms(had.get("grid", {}), new["settings"]["grid"]) if new["kind"] == "compare" else []
    if old.get("kind") == new["kind"] and old.get("judged_by") == new["judged_by"]:
        return terms
    names = terms + [name for name in ("kind", "model") if old.get(name) != new[name]]
    names += [name for name in _public(judging) if json.dumps(had.get(name)) != json.dumps(new["settings"][name])]
    return names or ["the texts' content, or secateur's version"]


def _unequal_terms(had: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What all cells of a comparison must share: calibrated otherwise, they would seem to be on equal terms."""
    return [name for name in _TERMS if name in had and json.dumps(had[name]) != json.dumps(wanted[name])]


def unequal_terms(earlier: Iterable[Mapping[str, Any]], cells: Iterable[Cell]) -> list[str]:
    """In what cells of one ablation of one method differ beside its value, sparsity and seed. Rows of such cells would
    pass for a spread over seeds, or for the value's doing.

    Args:
        earlier: what the files of cells say.
    """
    terms = {(told["what"], told["of"]): told["terms"] for cell in cells if (told := cell.ablation)}
    names: dict[str, None] = {}
    for told in (cell.get("ablation") or {} for cell in earlier if cell["status"] == "done"):
        had, wanted = told.get("terms", {}), terms.get((told.get("what"), told.get("of")))
        if wanted is not None:
            names |= {name: None for name in had if json.dumps(had[name]) != json.dumps(wanted.get(name))}
    return list(names)


def continued(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new index of a folder that has one: with the cells of earlier runs, or of another process, after the new
    ones, and all commands, each once."""
    commands = commands_of(old)
    return {
        **new,
        "created": old["created"],
        "commands": [*commands, *(command for command in commands_of(new) if command not in commands)],
        "cells": united(old["cells"], new["cells"]),
    }


def united(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """The new names in their order; after them those that only the old list has."""
    return [*new, *(name for name in old if name not in set(new))]


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> str:
    """Processor, cores and threads, in one line."""
    name = platform.processor() or platform.machine()
    if _CPU.is_file():
        lines = _CPU.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    told = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    return f"{told}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else told


def _public(judging: Judging) -> dict[str, Any]:
    """As JSON has it, without private paths."""
    told: dict[str, Any] = json.loads(json.dumps(asdict(judging)))
    return {**told, "texts": [public_name(text) for text in judging.texts]}
