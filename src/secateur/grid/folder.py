"""A grid's folder: `compare.json`, a folder per cell that is there whole or not at all, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import OutputError, OutputExistsError
from secateur.folders import new_folder, resolved, write_file
from secateur.report.results import CELL, CELLS, INDEX, dumps
from secateur.report.results_before import read_object


class GridFolder:
    """The folder of a comparison or an ablation.

    Raises:
        OutputError: it cannot be one.
    """

    def __init__(self, path: Path) -> None:
        self.path = resolved(path)
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; choose another folder")

    def index(self) -> dict[str, Any] | None:
        """What `compare.json` says; None if there is none.

        Raises:
            DataError: it is damaged.
            OutputExistsError: the folder holds something else.
        """
        file = self.path / INDEX
        if file.is_file():
            return read_object(file)
        there = {each.name for each in self.path.iterdir()} if self.path.is_dir() else set()
        if any(not name.startswith(".") for name in there - {CELLS}):  # another process may have begun just now
            raise OutputExistsError(f"{self.path} holds something that is no comparison; choose another --out")
        return None

    def write_index(self, index: Mapping[str, Any]) -> None:
        self.write(INDEX, dumps(index))

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder atomically."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.path / name, text)
        except OSError as error:
            raise OutputError(f"{self.path / name} cannot be written: {error.strerror or error}") from error

    def cell_path(self, name: str) -> Path:
        return self.path / CELLS / name

    def cell(self, name: str) -> dict[str, Any] | None:
        """A cell's file; None if it has not been made."""
        file = self.cell_path(name) / CELL
        return read_object(file) if file.is_file() else None

    def cells(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of the cells that are there, in this order."""
        found = {name: self.cell(name) for name in names}
        return {name: cell for name, cell in found.items() if cell is not None}

    def write_cell(self, cell: Mapping[str, Any]) -> None:
        """Write a cell, whole or not at all. One that is there has failed, or it would not have been made again."""
        with new_folder(self.cell_path(str(cell["name"])), overwrite=True) as partial:
            (partial / CELL).write_text(dumps(cell), encoding="utf-8")
