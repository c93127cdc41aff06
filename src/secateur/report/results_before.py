"""A compare folder as Python: what `secateur compare` or `secateur ablate` left, read and checked."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from secateur.errors import DataError
from secateur.judge.averages import Average, average_over
from secateur.report.results import ABLATE, CELL, CELLS, COMPARE, DENSE, INDEX, MISSING, SCHEMA

_AGAIN = "A cell's folder may be taken away: the command that made it makes it again."


@dataclass(frozen=True, eq=False)
class CellResult:
    """One method at one size: a row of the table.

    Attributes:
        name: the cell's folder.
        data: what its cell.json holds; nothing where there is none yet: then `status` is "missing", and no method or
            size is known.
    """

    name: str
    data: Mapping[str, Any]

    @property
    def method(self) -> str:
        return str(self.data.get("method") or "")

    @property
    def label(self) -> str:
        return str(self.data.get("label") or self.method or self.name)

    @property
    def sparsity(self) -> float | None:
        """The share that was asked for, of what `of` says; None for the dense model."""
        return self.data.get("sparsity")

    @property
    def status(self) -> str:
        return str(self.data.get("status", MISSING))

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
        return finite_or_none((self.data.get("prune") or {}).get("wall_s"))

    def section(self, name: str) -> Mapping[str, Any]:
        """`perplexity`, `tasks`, `inference` or `generation`; empty where it was not measured."""
        return (self.data.get(name) or {}) if self.done else {}


@dataclass(frozen=True)
class Results:
    """All cells that compare.json names, in the order of its table."""

    about: Mapping[str, Any]  # compare.json
    cells: tuple[CellResult, ...]
    folder: Path = field(default=Path())

    @cached_property
    def dense(self) -> CellResult | None:
        return next((cell for cell in self.cells if cell.method == DENSE and cell.done), None)

    @property
    def kind(self) -> str:
        """COMPARE or ABLATE: the command that made the folder."""
        return str(self.about.get("kind", COMPARE))

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
    def pictured(self) -> list[CellResult]:
        """The cells whose blocks are drawn beside the dense model's."""
        return [c for c in self.pruned if c.done and not c.matched_to and c.data.get("shape") and self.dense_shape]

    @cached_property
    def pruned(self) -> tuple[CellResult, ...]:
        """Those that were made, whether they failed or not."""
        return tuple(cell for cell in self.cells if cell.status != MISSING and cell.method != DENSE)

    @property
    def missing(self) -> list[CellResult]:
        """Those that are not there yet: running, or still to come."""
        return [cell for cell in self.cells if cell.status == MISSING]

    @cached_property
    def sparsities(self) -> list[float]:
        """The sizes that were asked for; a cell matched to another one's size asks for none of its own."""
        return sorted({c.sparsity for c in self.pruned if c.sparsity is not None and not c.matched_to})

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(cell.method for cell in self.pruned))

    @property
    def commands(self) -> list[list[str]]:
        """The commands that made the folder, in their order; none where it was made from Python."""
        return commands_of(self.about)

    # --- perplexity ---

    @cached_property
    def windows(self) -> dict[str, Mapping[str, Any]]:
        """By text, the result whose windows all others must have: the dense model's, else the first cell's."""
        found: dict[str, Mapping[str, Any]] = {}
        for cell in ([self.dense] if self.dense else []) + list(self.cells):
            for text, result in cell.section("perplexity").items():
                found.setdefault(text, result)
        return found

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the perplexities."""
        return tuple(self.windows)

    @cached_property
    def averaged_texts(self) -> tuple[str, ...]:
        """The texts that make the mean over texts: those cut to one length, that of most of them.

        A token of a long window is predicted from more, so what pruning costs depends on the length too.
        """
        lengths = Counter(result.get("length") for result in self.windows.values())
        length = max(lengths, key=lambda each: lengths[each], default=None)
        return tuple(text for text, result in self.windows.items() if result.get("length") == length)

    def loss(self, cell: CellResult, text: str) -> Mapping[str, Any]:
        """A cell's result on a text; empty where it has none, or one over other windows than the rest."""
        result: Mapping[str, Any] = cell.section("perplexity").get(text, {})
        return result if result and same_windows(result, self.windows[text]) else {}

    def perplexity(self, cell: CellResult, text: str) -> float | None:
        return finite_or_none(self.loss(cell, text).get("perplexity"))

    # --- tasks ---

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for cell in self.cells for task in cell.section("tasks")))

    @cached_property
    def average(self) -> Average:
        """What the mean over tasks is taken of."""
        return average_over(
            [cell.section("tasks") for cell in self.cells], self.dense.section("tasks") if self.dense else {}
        )

    # --- cells ---

    @property
    def model(self) -> Mapping[str, Any]:
        about: Mapping[str, Any] = self.about["model"]
        return about

    @property
    def name(self) -> str:
        return str(self.model.get("name") or "a model without a name")

    def cell(self, name: str) -> CellResult | None:
        return next((cell for cell in self.cells if cell.name == name), None)

    def size_of(self, cell: CellResult) -> float | None:
        """The asked size that a cell is shown under: its own, or that of the cell it is matched to."""
        partner = self.cell(cell.matched_to) if cell.matched_to else None
        return partner.sparsity if partner else cell.sparsity

    def of_size(self, sparsity: float) -> list[CellResult]:
        """The finished cells that were asked for a size."""
        return [c for c in self.pruned if c.done and c.sparsity == sparsity and not c.matched_to]

    def partner(self, cell: CellResult) -> CellResult | None:
        """The finished 2SSP at this cell's achieved size."""
        return next((c for c in self.pruned if c.matched_to == cell.name and c.done), None)


def read_results(folder: Path) -> Results:
    """Read a compare folder: the cells that compare.json names, and no others.

    A cell without a file is not there yet: it is kept, with the status "missing", and nothing is guessed of it.

    Raises:
        DataError: no compare folder, of another version, or a file in it is damaged.
    """
    source = folder / INDEX
    if not source.is_file():
        raise DataError(f"{folder} is no compare folder: it has no {INDEX}. `secateur compare` or `ablate` makes one.")
    about = read_object(source)
    if about.get("schema") != SCHEMA:
        raise DataError(f"{source} has schema {about.get('schema')!r}; this secateur reads {SCHEMA}")
    if about.get("kind", COMPARE) not in (COMPARE, ABLATE):
        raise DataError(f"{folder} is neither a comparison nor an ablation but of the kind {about['kind']!r}")
    names = about.get("cells")
    if not isinstance(about.get("model"), dict) or not isinstance(names, list):
        raise DataError(f"{source} is damaged: it must have `model` (an object) and `cells` (a list of names)")
    return Results(about, tuple(_read_cell(folder, str(name)) for name in names), folder)


def commands_of(about: Mapping[str, Any]) -> list[list[str]]:
    """The commands that a compare.json names, in their order; an older one names the last only."""
    last = (about.get("arguments") or {}).get("command")
    found: list[list[str]] = about.get("commands") or ([last] if last else [])
    return found


def _read_cell(folder: Path, name: str) -> CellResult:
    if Path(name).name != name:
        raise DataError(f"{folder / INDEX} is damaged: {name[:100]!r} is no name of a cell")
    source = folder / CELLS / name / CELL
    if not source.is_file():
        return CellResult(name, {})
    data = read_object(source)
    if not data.get("method"):
        raise DataError(f"{source} is damaged: it must name its `method`")
    return CellResult(name, data)


def read_object(file: Path) -> dict[str, Any]:
    """A file of the folder.

    Raises:
        DataError: it is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}. {_AGAIN}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} is damaged: it must hold a JSON object. {_AGAIN}")
    return found


def same_windows(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two perplexities were taken over the same tokens, cut to windows of the same length."""
    return all(one.get(key) == other.get(key) for key in ("length", "samples", "predictions", "fingerprint"))


def finite_or_none(value: Any) -> float | None:
    """A number as it is; None for what is no finite number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
