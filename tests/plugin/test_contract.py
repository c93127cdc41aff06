"""What every method owes; run it where the package is installed."""

import pytest

from secateur.testing import CHECKS, Contract


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("options", [{}, {"norm": "l1", "protect": 2}], ids=str)
def test_contract(check: str, options: dict[str, object]) -> None:
    getattr(Contract(method="least-added", options=options), check)()
