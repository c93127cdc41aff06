"""Times over the dense model's: in pairs where the rounds are stored."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import convert
from oracles import PROPERTY

from secateur.judge.statistics import quartiles
from secateur.report.comparing import Timing, speed
from secateur.report.results import CellResult

SECONDS = st.floats(0.01, 1e4)


def timed(pruned: dict[str, Any], dense: dict[str, Any], kind: str = "prefill") -> Timing | None:
    cell = {"method": "2ssp", "status": "done", "inference": {"pruned": pruned, "dense": dense}}
    return speed(convert(cell, CellResult), kind)


def rounds(values: list[float]) -> dict[str, Any]:
    return {"prefill_ms": sorted(values)[len(values) // 2], "prefill_ms_iqr": 1e3, "prefill_ms_rounds": values}


@PROPERTY
@given(st.lists(SECONDS, min_size=2, max_size=9), st.floats(0.1, 3))
def test_what_slows_both_models_of_a_round_cancels(dense: list[float], share: float) -> None:
    found = timed(rounds([share * each for each in dense]), rounds(dense))
    assert found is not None
    assert (found.ratio, found.low, found.high) == pytest.approx((share, share, share))


@PROPERTY
@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=9), st.randoms())
def test_rounds_are_paired_and_their_order_does_not_matter(pairs: list[tuple[float, float]], random: Any) -> None:
    found = timed(*(rounds(list(each)) for each in zip(*pairs, strict=True)))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    ratios = [ours / theirs for ours, theirs in pairs]
    assert min(ratios) <= found.low <= found.ratio <= found.high <= max(ratios)
    random.shuffle(pairs)
    again = timed(*(rounds(list(each)) for each in zip(*pairs, strict=True)))
    assert again is not None
    assert again[:3] == found[:3]


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    found = timed(rounds([10, 30, 20]), rounds([10, 20, 30]))
    assert found is not None
    assert found.ratio == 1
    found = timed(rounds([10, 30, 20]), rounds([20, 30, 25]))  # medians: 20 of 25
    assert found is not None
    assert found.ratio == 0.8
    assert (found.low, found.high) == (0.5, 1)
    found = timed(rounds([10, 30, 20]), rounds([40, 20, 16]))  # medians: 20 of 20
    assert found is not None
    assert found.ratio == 1.25
    assert found.value == 20


@pytest.mark.parametrize("without", ["pruned", "dense", "both"])
def test_cells_without_rounds_have_a_ratio_of_medians_and_no_range(without: str) -> None:
    def old(median: float, name: str) -> dict[str, Any]:
        more = {} if without in (name, "both") else {"prefill_ms_rounds": [1.0, 2.0, 3.0]}
        return {"prefill_ms": median, "prefill_ms_iqr": 20, **more}

    assert timed(old(80, "pruned"), old(100, "dense")) == Timing(0.8, None, None, 80)


def test_of_one_round_the_ratio_is_known_and_no_range() -> None:
    assert timed(rounds([50]), rounds([100])) == Timing(0.5, None, None, 50)
    assert quartiles([1.0]) is None
    assert quartiles([1.0, 2.0]) == (1, 2)  # never beyond the values


def test_throughput_is_over_the_dense_models_too() -> None:
    key = "throughput_tokens_s"
    ours, theirs = {key: 30, f"{key}_rounds": [30, 60, 20]}, {key: 20, f"{key}_rounds": [20, 40, 10]}
    assert timed(ours, theirs, "throughput") == Timing(1.5, 1.5, 2, 30)
    assert timed({key: 30}, {key: 20}, "throughput") == Timing(1.5, None, None, 30)
    assert timed({key: 30}, {}, "throughput") is None
