"""The files of compare folders, typed: all that are published load and are written back as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.errors import DataError
from secateur.report.results import CELL, CELLS, INDEX, dumps, read_cell, read_index

PUBLISHED = sorted(file.parent for file in (Path(__file__).parents[1] / "docs/results").rglob(INDEX))


def test_folders_are_published() -> None:
    assert len(PUBLISHED) >= 2


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_every_published_folder_loads_and_is_written_back_as_it_is(folder: Path) -> None:
    index = read_index(folder)
    assert json.loads(dumps(index)) == json.loads((folder / INDEX).read_text())
    for name in index.cells:
        if (cell := read_cell(folder, name)) is not None:
            assert json.loads(dumps(cell)) == json.loads((folder / CELLS / name / CELL).read_text()), name


def test_a_folder_without_its_index_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=INDEX):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"schema": 1, "model": {}, "cells": "many"}', r"\$\.cells"),
        ('{"schema": 1, "model": {}, "cells": ["../other"]}', "no name of a cell"),
        ('{"schema": 1, "cells": []}', "model"),
        ('{"schema": 2, "model": {}, "cells": []}', "schema 2"),
        ('{"schema": 1, "kind": "race", "model": {}, "cells": []}', "race"),
        ('{"schema": 1,', "damaged"),
        ("[]", "damaged"),
        ("\xff", "damaged"),
    ],
)
def test_a_damaged_index_is_refused_and_the_part_named(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=told):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"name": "one"}', "method"),
        ('{"method": "2ssp", "perplexity": {"c4": {"nll": "low"}}}', r"nll"),
        ('{"method": "2ssp", "tasks": {"piqa": {"value": 1}}}', "metric"),
        ("[]", "damaged"),
    ],
)
def test_a_damaged_cell_is_refused_and_the_part_named(content: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / CELLS / "one" / CELL
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(DataError, match=told):
        read_cell(tmp_path, "one")


def test_a_cell_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_cell(tmp_path, "one") is None


def test_numbers_that_are_none_are_written_as_null() -> None:
    assert json.loads(dumps({"a": [float("nan"), 1.5, float("inf")]})) == {"a": [None, 1.5, None]}
