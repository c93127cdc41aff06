"""docs/families.md says what the families really can."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_table import examples, table
from models import tiny

from secateur.surgery.edits import EDITS

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


@pytest.mark.slow
def test_the_table_of_families_is_what_trying_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "renew it by `make families`"


def test_every_kind_of_edit_is_tried() -> None:
    assert {type(edit).__name__ for edit in examples(tiny("llama"))} == set(EDITS)
