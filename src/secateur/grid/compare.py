"""`compare`: methods at sparsities on equal terms, and 2SSP at the size that each block-wise method really achieved."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from secateur.engine.tokens import Count
from secateur.errors import InvalidOptionError
from secateur.grid.cells import Cell, dense_cell
from secateur.grid.presets import get_preset
from secateur.grid.run import Grid, run_grid
from secateur.grid.words import calibration_of, method_names, sparsities, split, windows
from secateur.methods import Method, get_method
from secateur.model.budget import Convention
from secateur.model.handle import Model
from secateur.record import public_name
from secateur.report.main_table import write_main_table
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP

REFERENCE = "2ssp"  # which can have any size, and stands beside those that cannot


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Attributes:
        methods: names, or ("all",).
        sparsities: numbers between 0 and 1, "paper" (25, 37.5 and 50 %) or "every-block".
        of: whose parameters a sparsity is a share of.
        round_to: FFN widths are multiples of it.
        options: by method; `samples` and `length` there are those of its calibration.
        preset: whose options of methods apply; given ones win, `samples` and `length` too.
        calibration: a text's name or file; samples, length: the preset's or the paper's of each method if None.
        seed: of the calibration's draw; 0 takes the text's first windows.
        count: "all" tokens of the calibration, or of chat data "responses" only.
        matched: whether 2SSP stands beside each block-wise method, at the size that it achieved.
        base: the method that differences are taken to; 2ssp, or else the first one, if None.
    """

    methods: Sequence[str] = ("all",)
    sparsities: Sequence[str | float] = ("paper",)
    of: Convention = "blocks"
    round_to: int = 1
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    preset: str | None = None
    calibration: str = "c4"
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    count: Count = "all"
    matched: bool = True
    base: str | None = None

    @classmethod
    def from_preset(cls, preset: str | None = None, **given: Any) -> Comparison:
        """What was given; else what a preset says, if there is one; else the defaults.

        Args:
            given: attributes by name. None and an empty list stand for what was not given.

        Raises:
            UnknownNameError: there is no such preset.
        """
        told: dict[str, Any] = {}
        if preset is not None:
            published = get_preset(preset)
            told = {name: getattr(published, name) for name in ("methods", "sparsities", "of", "calibration", "seed")}
        told |= {name: value for name, value in given.items() if value is not None and value != []}
        return cls(preset=preset, **told)

    @property
    def base_method(self) -> str:
        """
        Raises:
            InvalidOptionError: it is not among the methods.
        """
        names = method_names(self.methods)
        if self.base is not None and self.base not in names:
            raise InvalidOptionError(f"--base {self.base} is none of the methods compared ({', '.join(names)})")
        return self.base or (REFERENCE if REFERENCE in names else names[0])

    def cells(self, model: Model) -> list[Cell]:
        """The cells in the table's order: dense; then by sparsity the methods, each with its match beside it.

        Args:
            model: the dense one; it may be a hollow one.

        Raises:
            UnknownNameError, InvalidOptionError: a method, option, sparsity or calibration that cannot be.
        """
        self._check_options()
        made = [dense_cell()]
        for sparsity in sparsities(self.sparsities, len(model.numbers)):
            for name in method_names(self.methods):
                cell = self._cell(model, get_method(name), sparsity)
                made.append(cell)
                if self.matched and is_block_wise(get_method(name)):
                    made.append(self._match(model, cell))
        return made

    def _check_options(self) -> None:
        names = method_names(self.methods)
        matched = self.matched and any(is_block_wise(get_method(name)) for name in names)
        if unused := sorted(set(self.options) - {*names, *([REFERENCE] if matched else [])}):
            raise InvalidOptionError(f"options for {', '.join(unused)}, which is not compared")

    def _cell(self, model: Model, method: Method, sparsity: float) -> Cell:
        options, shape = self._options(model, method, sparsity)
        return Cell(
            name=f"{method.name}-{sparsity:.6g}", method=method.name, label=method.name, sparsity=sparsity, of=self.of,
            round_to=self.round_to, options=options,
            calibration=calibration_of(
                method, self.calibration, shape, seed=self.seed, count=self.count, max_length=model.max_length
            ),
        )  # fmt: skip

    def _match(self, model: Model, cell: Cell) -> Cell:
        assert cell.sparsity is not None  # narrows the type
        like = self._cell(model, get_method(REFERENCE), cell.sparsity)
        return Cell(
            name=f"{REFERENCE}-as-{cell.name}", method=REFERENCE, label=f"{REFERENCE} at the size of {cell.label}",
            of=self.of, round_to=self.round_to, options=like.options, calibration=like.calibration,
            matched_to=cell.name,
        )  # fmt: skip

    def _options(self, model: Model, method: Method, sparsity: float) -> tuple[dict[str, Any], dict[str, int]]:
        """The method's own, and its calibration's shape: given for the method, given for all, the preset's."""
        published: Mapping[str, Any] = {}
        if self.preset is not None:
            preset = get_preset(self.preset)
            by_sparsity = preset.by_sparsity(method.name, sparsity, model.hidden_size)
            published = {**preset.options.get(method.name, {}), **by_sparsity}
        for_all = windows(self.samples, self.length)
        return split(method, {**published, **for_all, **self.options.get(method.name, {})})


def is_block_wise(method: Method) -> bool:
    """Whether a method removes whole blocks or modules only, so that it can have few sizes."""
    return set(method.edits) <= {DropBlock, DropAttention, DropMLP}


def compare(comparison: Comparison, grid: Grid) -> dict[str, dict[str, Any]]:
    """Run what is missing of a comparison and write its tables after each cell: `main-table.md`, `.csv`, `.json` and
    `.tex`, and `differences.csv`, of all cells in the folder.

    Returns:
        The cells of this comparison by name, in the table's order; failed ones have `status` "failed" and an `error`.

    Raises:
        SecateurError: as `run_grid` and `Comparison.cells` say.
    """
    base = comparison.base_method
    settings = {**asdict(comparison), "calibration": public_name(comparison.calibration), "base": base}
    write_tables = functools.partial(write_main_table, grid.folder, base)
    return run_grid(replace(grid, kind="compare", settings=settings), comparison.cells, write_tables)
