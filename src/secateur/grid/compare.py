"""`compare`: methods at sparsities on equal terms, and 2SSP at the size that each block-wise method really achieved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from secateur.compensation import refits
from secateur.errors import InvalidOptionError
from secateur.grid.asked import Asked, read_sparsities
from secateur.grid.cells import DENSE_CELL, Cell
from secateur.grid.presets import get_preset
from secateur.grid.run import Grid, run_grid
from secateur.methods import Method, Options, get_method, methods
from secateur.model.handle import Model
from secateur.report.main_table import NAME, write_main_table
from secateur.report.results import COMPARE, CellResult
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP

MATCHING = "2ssp"  # which can have any size, and stands beside those that cannot; the first of all methods in tables


@dataclass(frozen=True, kw_only=True)
class Comparison(Asked):
    """What is compared.

    Attributes:
        methods: names, or ("all",).
        sparsities: numbers between 0 and 1, "paper" (25, 37.5 and 50 %) or "every-block".
        of, options, calibration, samples, length, count, bos, text_field: as `Asked` has them.
        round_to: FFN widths are multiples of it.
        preset: whose options of methods apply; given ones win, `samples` and `length` too.
        seed: of the calibration's draw; 0 takes the text's first windows.
        matched: whether 2SSP stands beside each block-wise method, at the size that it achieved.
        base: the method that differences are taken to; 2ssp, or else the first one, if None.
        refit: beside each method that it can be put behind, the same with `Request.refit`.
    """

    kind: ClassVar[str] = COMPARE
    table: ClassVar[str] = NAME

    methods: Sequence[str] = ("all",)
    sparsities: Sequence[str | float] = ("paper",)
    round_to: int = 1
    preset: str | None = None
    seed: int = 0
    matched: bool = True
    base: str | None = None
    refit: bool = False

    @classmethod
    def from_preset(cls, preset: str | None = None, **given: Any) -> Comparison:
        """What was given; else what a preset says, if there is one; else the defaults.

        Args:
            given: attributes by name. None and an empty list stand for what was not given.

        Raises:
            UnknownNameError: there is no such preset.
        """
        attributes: dict[str, Any] = {}
        if preset is not None:
            published = get_preset(preset)
            names = ("methods", "sparsities", "of", "calibration", "seed", "bos")
            attributes = {name: getattr(published, name) for name in names}
        attributes |= {name: value for name, value in given.items() if value is not None and value != []}
        return cls(preset=preset, **attributes)

    @property
    def settings(self) -> dict[str, object]:
        return {**super().settings, "base": self.base_method}

    @property
    def names(self) -> list[str]:
        """The methods' names.

        Raises:
            UnknownNameError: a method that does not exist.
        """
        if list(self.methods) == ["all"]:
            return sorted(methods(), key=lambda name: (name != MATCHING, name))
        return [get_method(name).name for name in self.methods]

    @property
    def base_method(self) -> str:
        """
        Raises:
            InvalidOptionError: it is not among the methods.
        """
        names = self.names
        if self.base is not None and self.base not in names:
            raise InvalidOptionError(f"--base {self.base} is none of the methods compared ({', '.join(names)})")
        return self.base or (MATCHING if MATCHING in names else names[0])

    def cells(self, model: Model) -> list[Cell]:
        """Dense; then by sparsity the methods, each with its match beside it."""
        compared = [get_method(name) for name in self.names]
        matched = {method.name for method in compared if self.matched and is_block_wise(method)}
        if unused := sorted(set(self.options) - {*self.names, *([MATCHING] if matched else [])}):
            raise InvalidOptionError(f"options for {', '.join(unused)}, which is not compared")
        refitted = {method.name for method in compared if self.refit and refits(method, model.family)}
        if self.refit and not refitted:
            raise InvalidOptionError(
                f"none of {', '.join(self.names)} has anything to refit in {model.family.model_type}"
            )
        cells = [DENSE_CELL]
        for sparsity in read_sparsities(self.sparsities, len(model.numbers)):
            for method in compared:
                cell = self._cell(model, method, sparsity)
                cells += [cell, self._match(model, cell, sparsity)] if method.name in matched else [cell]
                if method.name in refitted:
                    cells.append(replace(cell, name=f"{cell.name}-refit", label=f"{cell.label} + refit", refit=True))
        return cells

    def _cell(self, model: Model, method: Method, sparsity: float) -> Cell:
        published: Options = {}
        if self.preset is not None:
            preset = get_preset(self.preset)
            by_sparsity = preset.by_sparsity(method.name, sparsity, model.hidden_size)
            published = {**preset.options.get(method.name, {}), **by_sparsity}
        options, calibration = self.settle(model, method, text=self.calibration, seed=self.seed, below=published)
        return Cell(
            name=f"{method.name}-{sparsity:.6g}", method=method.name, label=method.name, sparsity=sparsity, of=self.of,
            round_to=self.round_to, options=options, calibration=calibration,
        )  # fmt: skip

    def _match(self, model: Model, cell: Cell, sparsity: float) -> Cell:
        return replace(
            self._cell(model, get_method(MATCHING), sparsity), name=f"{MATCHING}-as-{cell.name}", sparsity=None,
            label=f"{MATCHING} at the size of {cell.label}", matched_to=cell.name,
        )  # fmt: skip

    def write_tables(self, folder: Path) -> None:
        write_main_table(folder, self.base_method)


def is_block_wise(method: Method) -> bool:
    """Whether a method removes whole blocks or modules only, so that it can have few sizes."""
    return set(method.edits) <= {DropBlock, DropAttention, DropMLP}


def compare(comparison: Comparison, grid: Grid) -> dict[str, CellResult]:
    """Run what is missing of a comparison and write its tables after each cell: `main-table.md`, `.csv`, `.json` and
    `.tex`, and `differences.csv`, of all cells in the folder.

    Returns:
        The cells of this comparison by name, in the table's order; failed ones have `status` "failed" and an `error`.

    Raises:
        SecateurError: as `run_grid` and `Asked.cells` say.
    """
    return run_grid(grid, comparison)
