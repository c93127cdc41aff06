"""The folder as the tables read it until they read `report.results`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import OutputError
from secateur.folders import write_file
from secateur.report.results import CELL, CELLS, INDEX
from secateur.report.results_before import read_object


class RawFolder:
    """A grid's folder, untyped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def index(self) -> dict[str, Any] | None:
        file = self.path / INDEX
        return read_object(file) if file.is_file() else None

    def cells(self, names: Sequence[str]) -> Mapping[str, dict[str, Any]]:
        files = {name: self.path / CELLS / name / CELL for name in names}
        return {name: read_object(file) for name, file in files.items() if file.is_file()}

    def write(self, name: str, text: str) -> None:
        try:
            write_file(self.path / name, text)
        except OSError as error:
            raise OutputError(f"{self.path / name} cannot be written: {error.strerror or error}") from error
