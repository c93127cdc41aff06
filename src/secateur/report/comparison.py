"""A compare folder as Python: what `secateur compare` left, read and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from secateur.errors import DataError
from secateur.evaluation.chance import at_chance

SCHEMA, KIND = 1, "compare"
DENSE = "dense"
Z = 1.96  # standard errors on either side of a 95 % interval


@dataclass(frozen=True, eq=False)
class Cell:
    """One method at one size: a row of the table.

    Attributes:
        name: the cell's folder.
        data: what its cell.json holds; `status` is "missing" where there is none yet.
    """

    name: str
    data: Mapping[str, Any]

    @property
    def method(self) -> str:
        return str(self.data.get("method") or self.name)

    @property
    def label(self) -> str:
        return str(self.data.get("label") or self.method)

    @property
    def sparsity(self) -> float | None:
        """The share that was asked for, of what `of` says; None for the dense model."""
        return self.data.get("sparsity")

    @property
    def status(self) -> str:
        return str(self.data.get("status", "missing"))

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def error(self) -> str:
        """Why it failed."""
        return str(self.data.get("error") or "no reason given")

    @property
    def reduced(self) -> bool:
        """Whether its search was smaller than its paper's."""
        return "reduced" in self.label.casefold() or "reduced" in (self.data.get("notes") or {})

    @property
    def matched_to(self) -> str | None:
        """The block-wise cell at whose achieved size this 2SSP was made."""
        return self.data.get("matched_to")

    @property
    def parameters(self) -> int | None:
        return self.data.get("parameters")

    @property
    def removed(self) -> float | None:
        """The share that is really gone, of what the sparsity is a share of."""
        return (self.data.get("achieved") or {}).get(self.of)

    @property
    def of(self) -> str:
        """'blocks' or 'model': whose parameters shares are of."""
        return str(self.data.get("of") or "blocks")

    @property
    def wall_s(self) -> float | None:
        """What the pruning took."""
        return finite((self.data.get("prune") or {}).get("wall_s"))

    def section(self, name: str) -> Mapping[str, Any]:
        """`perplexity`, `tasks`, `inference` or `generation`; empty where it was not measured."""
        return (self.data.get(name) or {}) if self.done else {}

    def perplexity(self, text: str) -> float | None:
        return finite(self.section("perplexity").get(text, {}).get("perplexity"))


@dataclass(frozen=True)
class Comparison:
    """All cells of a compare folder, in the order of its table."""

    about: Mapping[str, Any]  # compare.json
    cells: tuple[Cell, ...]
    folder: Path = field(default=Path())

    @cached_property
    def dense(self) -> Cell | None:
        return next((cell for cell in self.cells if cell.method == DENSE and cell.done), None)

    @property
    def whose(self) -> str:
        """Of which parameters the sizes are shares."""
        grid = (self.about.get("settings") or {}).get("grid") or {}
        return "all parameters" if grid.get("of") == "model" else "the blocks' parameters"

    @property
    def dense_shape(self) -> list[Mapping[str, Any]]:
        """The dense model's blocks; empty where they are not told."""
        return (self.dense.data.get("shape") if self.dense else None) or []

    @property
    def hidden_size(self) -> int | None:
        """The width of the dense model's residual stream."""
        return self.model.get("hidden_size")

    @property
    def pictured(self) -> list[Cell]:
        """The cells whose blocks are drawn beside the dense model's."""
        return [c for c in self.pruned if c.done and not c.matched_to and c.data.get("shape") and self.dense_shape]

    @cached_property
    def pruned(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.method != DENSE)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The texts of the perplexities, in the order of their first appearance."""
        return tuple(dict.fromkeys(text for cell in self.cells for text in cell.section("perplexity")))

    @cached_property
    def sparsities(self) -> list[float]:
        """The sizes that were asked for; a cell matched to another one's size asks for none of its own."""
        return sorted({c.sparsity for c in self.pruned if c.sparsity is not None and not c.matched_to})

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(cell.method for cell in self.pruned))

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for cell in self.cells for task in cell.section("tasks")))

    @cached_property
    def chance_tasks(self) -> dict[str, str]:
        """Tasks left out of averages, with the reason."""
        results = self.dense.section("tasks") if self.dense else {}
        told = {task: at_chance(result) for task, result in results.items()}
        return {task: why for task, why in told.items() if why}

    @cached_property
    def counted_tasks(self) -> tuple[str, ...]:
        return tuple(task for task in self.tasks if task not in self.chance_tasks)

    @property
    def model(self) -> Mapping[str, Any]:
        about: Mapping[str, Any] = self.about["model"]
        return about

    @property
    def name(self) -> str:
        return str(self.model.get("name") or "a model without a name")

    def cell(self, name: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.name == name), None)

    def size_of(self, cell: Cell) -> float | None:
        """The asked size that a cell is shown under: its own, or that of the cell it is matched to."""
        partner = self.cell(cell.matched_to) if cell.matched_to else None
        return partner.sparsity if partner else cell.sparsity

    def of_size(self, sparsity: float) -> list[Cell]:
        """The finished cells that were asked for a size."""
        return [c for c in self.pruned if c.done and c.sparsity == sparsity and not c.matched_to]

    def partner(self, cell: Cell) -> Cell | None:
        """The finished 2SSP at this cell's achieved size."""
        return next((c for c in self.pruned if c.matched_to == cell.name and c.done), None)


def read_comparison(folder: Path) -> Comparison:
    """Read a compare folder.

    A cell without a file is one that was not run yet: it is kept, with the status "missing".

    Raises:
        DataError: no compare folder, of another version, or a file in it is damaged.
    """
    source = folder / "compare.json"
    if not source.is_file():
        raise DataError(f"{folder} is no compare folder: it has no compare.json. `secateur compare` makes one.")
    about = _read(source)
    if about.get("schema") != SCHEMA:
        raise DataError(f"{source} has schema {about.get('schema')!r}; this secateur reads {SCHEMA}")
    if about.get("kind", KIND) != KIND:
        raise DataError(f"{folder} is no comparison but of the kind {about['kind']!r}; its tables lie in it")
    names = about.get("cells")
    if not isinstance(about.get("model"), dict) or not isinstance(names, list):
        raise DataError(f"{source} is damaged: it must have `model` (an object) and `cells` (a list of names)")
    cells = [_read_cell(folder, str(name)) for name in names]
    return Comparison(about, tuple(cells), folder)


def _read_cell(folder: Path, name: str) -> Cell:
    if Path(name).name != name:
        raise DataError(f"{folder / 'compare.json'} is damaged: {name[:100]!r} is no name of a cell")
    source = folder / "cells" / name / "cell.json"
    if source.is_file():
        return Cell(name, _read(source))
    method, _, size = name.rpartition("-")
    try:
        return Cell(name, {"method": method, "sparsity": float(size)})
    except ValueError:
        return Cell(name, {"method": name})


def _read(source: Path) -> dict[str, Any]:
    try:
        data = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{source} is damaged: it must hold a JSON object")
    return data


def finite(value: Any) -> float | None:
    """A number as it is; None for what is no finite number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
