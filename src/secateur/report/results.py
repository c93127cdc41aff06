"""The files of a compare folder, typed: compare.json and each cell's cell.json, as `secateur compare` or `ablate`
writes and every reader reads them. What an older file has not, has its default."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from secateur.errors import DataError
from secateur.judge.averages import Average, average_over
from secateur.judge.results import Facts, Generation, Inference, Perplexity, Scalar, TaskResult

SCHEMA = 1
COMPARE, ABLATE = "compare", "ablate"  # kinds of folders
INDEX, CELLS, CELL = "compare.json", "cells", "cell.json"
DENSE = "dense"
MISSING = "missing"
SIZE_TOLERANCE = 0.005  # of the parameters: what counts as the same size
_AGAIN = "A cell's folder may be taken away: the command that made it makes it again."


class Shape(Struct, frozen=True, kw_only=True):
    """What one block of the dense model has now; a removed one has nothing left.

    Attributes:
        width: of its FFN.
        sites: widths of the residual stream where it enters, between attention and MLP, and where it leaves; only
            where it was rebased.
    """

    block: int
    width: int
    kv_heads: int
    query_heads: int
    attention: bool
    mlp: bool
    sites: list[int] | UnsetType = UNSET


class Shares(Struct, frozen=True, kw_only=True):
    """Of parameters: the blocks', and the whole model's."""

    blocks: float | None = None
    model: float | None = None


class PruneCost(Struct, frozen=True, kw_only=True):
    """What the pruning took; forwards are of the whole model over one window of the calibration.

    Attributes:
        forwards_asked: those that the method asked for, shared ones too.
        peak_device_memory_bytes: None where no device counts; peak_memory_bytes: of the process, in older
            files and where another project pruned.
    """

    wall_s: float | None = None
    cpu_s: float | None = None
    forwards: float | None = None
    forwards_asked: float | None = None
    peak_device_memory_bytes: int | UnsetType | None = UNSET
    peak_memory_bytes: int | UnsetType | None = UNSET


class InferencePair(Struct, frozen=True, kw_only=True):
    """The cell's model and the dense one, timed in turn in one run."""

    dense: Inference = Inference()
    pruned: Inference = Inference()


class AblationTerms(Struct, frozen=True, kw_only=True):
    """Of which ablation a cell is, and of which value and seed.

    Attributes:
        of: the method.
        terms: what all cells of it have in common: the calibration, and all options but the one that varies.
    """

    what: str
    of: str
    value: str
    seed: int
    terms: dict[str, Any] = field(default_factory=dict)


class CellResult(Struct, frozen=True, kw_only=True, eq=False):
    """One method at one size, pruned and judged: cell.json, and a row of the table.

    Attributes:
        name: of the cell's folder.
        status: "done", "failed", or MISSING where there is no file yet; then no method or size is known.
        sparsity: the share that was asked for, of what `of` says; None for the dense model.
        of: "blocks" or "model": whose parameters shares are of.
        error: why it failed.
        filters: that its edits went through, by name, with their options.
        notes: what must be said of it; "reduced": its search was smaller than its paper's.
        curve: the search's loss in nats by generation.
        perplexity: by text; tasks: by task.
        matched_to: the cell at whose achieved size this 2SSP was made.
        same_as: the cell of the same identity that it was copied from.
        fingerprint: of all that decides its figures.
        seconds: by part.
    """

    name: str = ""
    method: str = ""
    label: str = ""
    sparsity: float | None = None
    of: str = "blocks"
    status: str = MISSING
    error: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, Any] | UnsetType = UNSET
    notes: dict[str, str] = field(default_factory=dict)
    calibration: Facts | None = None
    achieved: Shares | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    prune: PruneCost | None = None
    curve: list[tuple[int, float | None]] | None = None
    shape: list[Shape] | None = None
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    inference: InferencePair | None = None
    generation: Generation | None = None
    matched_to: str | None = None
    ablation: AblationTerms | None = None
    created: str = ""
    machine: str = ""
    versions: dict[str, Scalar] = field(default_factory=dict)
    fingerprint: str | None = None
    dense_shape: list[Shape] | UnsetType = UNSET
    same_as: str | UnsetType = UNSET
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def shown(self) -> str:
        """What tables call it."""
        return self.label or self.method or self.name

    @property
    def reduced(self) -> bool:
        """Whether its search was smaller than its paper's."""
        return "reduced" in self.label.casefold() or "reduced" in self.notes

    @property
    def removed(self) -> float | None:
        """The share that is really gone, of what the sparsity is a share of."""
        if self.achieved is None:
            return None
        return self.achieved.model if self.of == "model" else self.achieved.blocks

    @property
    def off_target(self) -> bool:
        """Whether another share is gone than was asked for."""
        return (
            self.sparsity is not None
            and self.removed is not None
            and abs(self.removed - self.sparsity) > SIZE_TOLERANCE
        )

    @property
    def wall_s(self) -> float | None:
        """What the pruning took."""
        return self.prune.wall_s if self.prune else None


class ModelFacts(Struct, frozen=True, kw_only=True):
    """The dense model.

    Attributes:
        configuration: sha256 of what its configuration decides beside the weights; UNSET in older folders.
        hidden_size: the width of its residual stream.
    """

    name: str | None = None
    fingerprint: str = ""
    configuration: str | UnsetType = UNSET
    parameters: int | None = None
    block_parameters: int | None = None
    blocks: int | None = None
    hidden_size: int | None = None
    family: str = ""


class Index(Struct, frozen=True, kw_only=True):
    """compare.json: the model, the judging, the machine, the cells in the table's order.

    Attributes:
        kind: COMPARE or ABLATE: the command that made the folder.
        arguments: of the last command; commands: all, in their order, each once; none where it was made from Python.
        settings: the judging's, and under `grid` the grid's own.
        texts: by name, where each came from and its fingerprint.
        judged_by: sha256 of all that the cells must have in common.
        cells: names.
    """

    schema: int = SCHEMA
    kind: str = COMPARE
    model: ModelFacts
    arguments: dict[str, Any] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, Facts] = field(default_factory=dict)
    machine: str = ""
    versions: dict[str, Scalar] = field(default_factory=dict)
    created: str = ""
    judged_by: str = ""
    cells: list[str]

    @property
    def all_commands(self) -> list[list[str]]:
        """Of older folders the last one only."""
        last = self.arguments.get("command")
        return self.commands or ([last] if last else [])


# --- a folder as a whole ---


@dataclass(frozen=True, eq=False)
class Results:
    """A compare folder: its index, and all cells that it names, in the table's order; of one that is not there yet only
    the name is known."""

    index: Index
    cells: tuple[CellResult, ...]
    folder: Path = Path()

    @property
    def name(self) -> str:
        return self.index.model.name or "a model without a name"

    @property
    def whose(self) -> str:
        """Of which parameters the sizes are shares."""
        of = (self.index.settings.get("grid") or {}).get("of")
        return "all parameters" if of == "model" else "the blocks' parameters"

    @cached_property
    def dense(self) -> CellResult | None:
        return next((cell for cell in self.cells if cell.method == DENSE and cell.done), None)

    @cached_property
    def pruned(self) -> tuple[CellResult, ...]:
        """Those that were made, whether they failed or not."""
        return tuple(cell for cell in self.cells if cell.status != MISSING and cell.method != DENSE)

    @cached_property
    def done(self) -> tuple[CellResult, ...]:
        return tuple(cell for cell in self.cells if cell.done)

    @property
    def missing(self) -> list[CellResult]:
        """Those that are not there yet: running, or still to come."""
        return [cell for cell in self.cells if cell.status == MISSING]

    @property
    def pictured(self) -> list[CellResult]:
        """The cells whose blocks are drawn beside the dense model's."""
        known = self.dense is not None and self.dense.shape
        return [cell for cell in self.pruned if cell.done and not cell.matched_to and cell.shape and known]

    @cached_property
    def sparsities(self) -> list[float]:
        """The sizes that were asked for; a cell matched to another one's size asks for none of its own."""
        return sorted({c.sparsity for c in self.pruned if c.sparsity is not None and not c.matched_to})

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(cell.method for cell in self.pruned))

    @cached_property
    def windows(self) -> dict[str, Perplexity]:
        """By text, the result whose windows all others must have: the dense model's, else the first cell's."""
        return {text: result for cell in self._dense_last for text, result in cell.perplexity.items()}

    @cached_property
    def asked(self) -> dict[str, TaskResult]:
        """By task, the result that all others must be asked like."""
        return {task: result for cell in self._dense_last for task, result in cell.tasks.items()}

    @property
    def _dense_last(self) -> list[CellResult]:
        return [*reversed(self.done), *([self.dense] if self.dense else [])]

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The texts of the perplexities."""
        return tuple(dict.fromkeys(text for cell in self.done for text in cell.perplexity))

    @cached_property
    def averaged_texts(self) -> tuple[str, ...]:
        """The texts that make the mean over texts: those cut to one length, that of most of them.

        A token of a long window is predicted from more, so what pruning costs depends on the length too.
        """
        lengths = Counter(self.windows[text].length for text in self.texts)
        length = max(lengths, key=lambda length: lengths[length], default=None)
        return tuple(text for text in self.texts if self.windows[text].length == length)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for cell in self.cells for task in cell.tasks))

    @cached_property
    def average(self) -> Average:
        """What the mean over tasks is taken of."""
        return average_over([cell.tasks for cell in self.cells], self.dense.tasks if self.dense else {})

    def loss(self, cell: CellResult, text: str) -> Perplexity | None:
        """A cell's result on a text; None where it has none, or one over other windows than the rest."""
        result = cell.perplexity.get(text)
        return result if result and same_windows(result, self.windows[text]) else None

    def perplexity(self, cell: CellResult, text: str) -> float | None:
        result = self.loss(cell, text)
        return result.perplexity if result else None

    def accuracy(self, cell: CellResult) -> float | None:
        """The mean over the tasks that count; None unless the cell has them all."""
        return self.average.of(cell.tasks)

    def cell(self, name: str | None) -> CellResult | None:
        """One that is there."""
        return next((cell for cell in self.cells if cell.name == name and cell.status != MISSING), None)

    def size_of(self, cell: CellResult) -> float | None:
        """The asked size that a cell is shown under: its own, or that of the cell it is matched to."""
        partner = self.cell(cell.matched_to)
        return partner.sparsity if partner else cell.sparsity

    def of_size(self, sparsity: float) -> list[CellResult]:
        """The finished cells that were asked for a size."""
        return [c for c in self.pruned if c.done and c.sparsity == sparsity and not c.matched_to]

    def partner(self, cell: CellResult) -> CellResult | None:
        """The finished 2SSP at this cell's achieved size."""
        return next((c for c in self.pruned if c.matched_to == cell.name and c.done), None)


def same_windows(one: Perplexity, other: Perplexity) -> bool:
    """Whether two perplexities were taken over the same tokens, cut to windows of the same length."""
    first, second = ((r.length, r.samples, r.predictions, r.fingerprint) for r in (one, other))
    return first == second


# --- reading ---

_Read = TypeVar("_Read", bound=Struct)


def read_index(folder: Path) -> Index:
    """A folder's compare.json.

    Raises:
        DataError: there is none, or it is of another version, or damaged; the part is named.
    """
    source = folder / INDEX
    if not source.is_file():
        raise DataError(f"{folder} is no compare folder: it has no {INDEX}. `secateur compare` or `ablate` makes one.")
    index = _read(source, Index)
    if index.schema != SCHEMA:
        raise DataError(f"{source} has schema {index.schema!r}; this secateur reads {SCHEMA}")
    if index.kind not in (COMPARE, ABLATE):
        raise DataError(f"{folder} is neither a comparison nor an ablation but of the kind {index.kind!r}")
    for name in index.cells:
        if Path(name).name != name:
            raise DataError(f"{source} is damaged: {name[:100]!r} is no name of a cell")
    return index


def read_cell(folder: Path, name: str) -> CellResult | None:
    """A cell's file; None if it has not been made.

    Raises:
        DataError: it is damaged; the part is named.
    """
    source = folder / CELLS / name / CELL
    if not source.is_file():
        return None
    cell = _read(source, CellResult)
    if not cell.method:
        raise DataError(f"{source} is damaged: it must name its `method`")
    return cell


def read_results(folder: Path) -> Results:
    """A compare folder: the cells that compare.json names, and no others.

    Raises:
        DataError: no compare folder, of another version, or a file in it is damaged.
    """
    index = read_index(folder)
    cells = (read_cell(folder, name) or CellResult(name=name) for name in index.cells)
    return Results(index, tuple(cells), folder)


def _read(file: Path, kind: type[_Read]) -> _Read:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}. {_AGAIN}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # a ValidationError says at which part
        raise DataError(f"{file} is damaged: {error}. {_AGAIN}") from error


# --- writing ---


def dumps(value: Struct | Mapping[str, Any]) -> str:
    """JSON of one entry per line, without NaN and Inf, which are no JSON: they become null. Short lists of numbers
    (a window's loss each) stay on one line."""
    return _dump(json.loads(msgspec.json.encode(value)), "") + "\n"


def _dump(value: object, indent: str) -> str:
    inner = indent + " "
    if isinstance(value, dict) and value:
        entries = [f"{inner}{json.dumps(key)}: {_dump(each, inner)}" for key, each in value.items()]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    return json.dumps(value, ensure_ascii=False)
