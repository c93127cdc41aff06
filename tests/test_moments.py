"""The running second moment: a weighted sum however the tokens come, in the precision asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from secateur.engine.moments import SecondMoment, matmul_precision

KINDS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])


@KINDS
def test_the_moment_is_a_weighted_sum_over_tokens_however_they_come(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
    at_once, in_parts = SecondMoment(dtype), SecondMoment(dtype)
    at_once.add(x, weights)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        in_parts.add(x[part], weights[part])
    expected = sum(weights[s, t].double() * torch.outer(*2 * [x[s, t].double()]) for s in range(6) for t in range(8))
    for moment in (at_once, in_parts):
        assert moment.total is not None
        assert moment.total.dtype == moment.mean.dtype == dtype
        assert torch.allclose(moment.total.double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.allclose(moment.mean.double(), expected / weights.double().sum(), rtol=tolerance, atol=tolerance)
        assert moment.weight == pytest.approx(float(weights.double().sum()))


def test_tokens_of_weight_zero_leave_no_trace() -> None:
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    moment, plain = SecondMoment(torch.float32), SecondMoment(torch.float32)
    moment.add(torch.full_like(x, 1e3), torch.zeros(2, 4))
    assert torch.equal(moment.mean, torch.zeros(3, 3))
    moment.add(x, torch.ones(2, 4))
    plain.add(x, torch.ones(2, 4))
    assert torch.equal(moment.mean, plain.mean)


def test_half_precision_inputs_are_summed_in_full() -> None:
    x = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)
    moment = SecondMoment(torch.float32)
    moment.add(x, torch.ones(1, 4096))
    assert moment.total is not None
    assert moment.total.dtype == torch.float32
    assert float(moment.total) == 4096


def test_there_is_no_mean_of_nothing() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        _ = SecondMoment().mean


def set_by_old_name() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def set_by_new_name() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def precisions() -> list[str]:
    """All that says how float32 products are rounded; what torch refuses to say after a mix of names, too."""
    asked: list[Callable[[], object]] = [
        torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cuda.matmul.fp32_precision, lambda: torch.backends.mkldnn.matmul.fp32_precision,
    ]  # fmt: skip
    said = []
    for ask in asked:
        try:
            said.append(str(ask()))
        except RuntimeError:
            said.append("refused")
    return said


@pytest.mark.parametrize(
    "set_it",
    [lambda: None, lambda: torch.set_float32_matmul_precision("medium"), set_by_old_name, set_by_new_name],
    ids=["default", "medium", "old name", "new name"],
)
def test_no_tf32_inside_and_the_callers_setting_afterwards(set_it: Callable[[], None]) -> None:
    code = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    default = [device.fp32_precision for device in code]
    try:
        set_it()
        before = precisions()
        with matmul_precision():
            assert precisions() == ["highest", "False", "ieee", "ieee"]
        SecondMoment().add(torch.ones(1, 3, 2), torch.ones(1, 3))
        assert precisions() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for device, precision in zip(code, default, strict=True):
            device.fp32_precision = precision
