"""The ridge refit against its theory: normal equations, least squares on the tokens, its two ends."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import InvalidOptionError, NumericalError
from secateur.solvers.ridge import held_out_damping, ridge

KEPT = [0, 2, 3, 6]


def problem(columns: int = 8, rows: int = 5, tokens: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs x (tokens, columns), outputs y (tokens, rows) that are no map of them, W; float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return x, x.tanh() @ weight.T + torch.randn(tokens, rows, generator=generator, dtype=torch.float64), weight


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("damping", "shrinkage"), [(0.0, 0.0), (0.01, 0.0), (3.0, 0.0), (0.0, 0.3), (0.01, 2.0)])
def test_it_is_least_squares_on_the_tokens_and_on_what_keeps_the_map(
    damping: float, shrinkage: float, share: float
) -> None:
    x, y, weight = problem()
    c, t = x.T @ x / len(x), y.T @ x / len(x)
    fitted = ridge(weight, c, KEPT, damping=damping, shrinkage=shrinkage, target=t, share=share)
    moments = c.diagonal()[KEPT]
    pull = torch.diag(shrinkage * moments + damping * (1 + shrinkage) * moments.mean()).sqrt()
    inputs = torch.cat([x[:, KEPT] / len(x) ** 0.5, pull])
    goal = share * y + (1 - share) * x @ weight.T
    wanted = torch.cat([goal / len(x) ** 0.5, pull @ weight[:, KEPT].T])
    assert torch.allclose(fitted, torch.linalg.lstsq(inputs, wanted).solution.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_goes_the_map_stays_to_the_last_bit(dtype: torch.dtype) -> None:
    x, _, weight = problem()
    weight = weight.to(dtype)
    assert torch.equal(ridge(weight, (x.T @ x).to(dtype), range(8)), weight)


def test_much_damping_leaves_the_original_and_float32_is_close_to_float64() -> None:
    x, _, weight = problem()
    c = x.T @ x / len(x)
    assert torch.allclose(ridge(weight, c, KEPT, damping=1e12), weight[:, KEPT])
    single = ridge(weight, c.float(), KEPT)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), ridge(weight, c, KEPT), atol=1e-4)


def test_a_singular_moment_gets_more_damping_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    x, _, weight = problem(tokens=3)
    with caplog.at_level(logging.WARNING):
        fitted = ridge(weight, x.T @ x, range(5), damping=0, name="block 7")
    assert torch.allclose(x[:, :5] @ fitted.T, x @ weight.T, rtol=1e-3)  # three tokens are met by five weights
    assert "block 7" in caplog.text
    assert torch.equal(ridge(weight, torch.zeros(8, 8), KEPT), weight[:, KEPT].float())


@pytest.mark.parametrize(
    ("error", "wrong"),
    [(InvalidOptionError, {"damping": -1.0}), (InvalidOptionError, {"shrinkage": -1.0}),
     (InvalidOptionError, {"share": 1.5}),
     (NumericalError, {"target": torch.full((5, 8), torch.nan)})],
)  # fmt: skip
def test_bad_input_is_refused(error: type[Exception], wrong: dict[str, Any]) -> None:
    x, _, weight = problem()
    with pytest.raises(error):
        ridge(weight, x.T @ x, KEPT, **wrong)


def test_a_moment_that_is_no_moment_is_refused() -> None:
    _, _, weight = problem()
    with pytest.raises(NumericalError, match="block 7"):
        ridge(weight, -torch.eye(8, dtype=torch.float64), KEPT, damping=0, name="block 7")


def test_the_damping_that_does_best_on_tokens_held_out_shrinks_with_their_number() -> None:
    chosen, wins = [], []
    for tokens in (16, 20_000):
        every, outputs, weight = problem(tokens=30_000)
        x, y, fresh, goal = every[:tokens], outputs[:tokens], every[-4000:], outputs[-4000:]
        halves = [(a.T @ a / len(a), b.T @ a / len(a)) for a, b in ((x[::2], y[::2]), (x[1::2], y[1::2]))]
        chosen.append(held_out_damping(weight, halves, KEPT))
        c, t = x.T @ x / len(x), y.T @ x / len(x)
        errors = [
            float((goal - fresh[:, KEPT] @ ridge(weight, c, KEPT, damping=damping, target=t).T).square().mean())
            for damping in (chosen[-1], 1e-4, 1e3)
        ]
        wins.append(errors[0] <= 1.05 * min(errors))
    assert chosen[0] > chosen[1]
    assert all(wins)
