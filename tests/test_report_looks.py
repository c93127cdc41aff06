"""Colours that everybody can tell apart, and numbers as people write them."""

from __future__ import annotations

import itertools

import pytest
import torch
from compare_folders import METHODS

from secateur.methods import methods
from secateur.report.drawing import new_figure, set_ticks, styled
from secateur.report.looks import count, listed, looks, number, percent, seconds, times

GROUNDS = ("#ffffff", "#fbfbfa", "#1b1f26", "#14171c")  # those of templates/page.css
# Machado, Oliveira and Fernandes (2009), severity 1: what a person with one of the three blindnesses sees.
SEEN_BY = {
    "anybody": [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanope": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_LMS = [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
TO_OKLAB = [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]


def linear(colour: str) -> torch.Tensor:
    c = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    return torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(colour: str, matrix: list[list[float]]) -> torch.Tensor:
    seen = (torch.tensor(matrix, dtype=torch.float64) @ linear(colour)).clamp(0, 1)
    lms = (torch.tensor(TO_LMS, dtype=torch.float64) @ seen) ** (1 / 3)
    return torch.tensor(TO_OKLAB, dtype=torch.float64) @ lms


def contrast(one: str, other: str) -> float:
    """As WCAG defines it."""
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    high, low = sorted((float(weights @ linear(each)) for each in (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("who", SEEN_BY)
def test_the_colours_of_any_two_methods_differ_for_everybody(who: str) -> None:
    colours = [look.colour for look in looks(METHODS).values()]
    for one, other in itertools.combinations(colours, 2):
        distance = float((oklab(one, SEEN_BY[who]) - oklab(other, SEEN_BY[who])).norm())
        assert distance > 0.09, (one, other)


def test_the_colours_stand_out_from_light_and_dark_grounds() -> None:
    for look in looks(METHODS).values():
        assert all(contrast(look.colour, ground) > 2.2 for ground in GROUNDS), look


def test_the_methods_tried_here_are_all_that_secateur_has() -> None:
    ours = {name for name, each in methods().items() if each.prune.__module__.startswith("secateur.methods.")}
    assert ours == set(METHODS)


def test_every_method_of_ours_has_a_look_of_its_own_everywhere() -> None:
    found = looks(METHODS)
    for key in ("name", "colour", "glyph", "marker"):
        assert len({getattr(look, key) for look in found.values()}) == len(METHODS)
    alone = {method: looks([method])[method] for method in METHODS}
    assert alone == found


def test_methods_that_we_do_not_know_get_markers_of_their_own() -> None:
    found = looks(["theirs", "2ssp", "others"])
    assert found["theirs"].name == "theirs"
    assert len({look.marker for look in found.values()}) == 3


def test_numbers_read_as_people_write_them() -> None:
    assert percent(0.375) == "37.5\u00a0%"
    assert percent(0.25) == "25\u00a0%"
    assert percent(0.3) == "30\u00a0%"
    assert percent(None) == "–"
    assert [number(value) for value in (12.34, 1.2, 0.0123, 1564.2, 3.2e7, float("inf"), 0)] == [
        "12.3", "1.20", "0.0123", "1,564", "3.20e+07", "∞", "0",
    ]  # fmt: skip
    assert times(1.371) == "1.37×"
    assert [count(value) for value in (134_515_008, 6_738_415_616, 950)] == ["135\u00a0M", "6.74\u00a0B", "950"]
    assert [seconds(value).replace("\u00a0", " ") for value in (0.81, 9.96, 59.7, 200, 3600, 7500)] == [
        "0.8 s", "10 s", "1 min", "3 min 20 s", "1 h", "2 h 5 min",
    ]  # fmt: skip
    lists = (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c"), ([], "none")
    assert all(listed(words) == told for words, told in lists)


@pytest.mark.parametrize(
    ("low", "high"), [(81.4, 134.5), (1, 128), (13, 1100), (12.3, 1564), (99, 101), (5, 5), (1, 1e9)]
)
def test_a_logarithmic_axis_has_a_few_ticks_whatever_its_range(low: float, high: float) -> None:
    pytest.importorskip("matplotlib")
    with styled():
        _, (axis,) = new_figure(1)
        axis.plot([1, 2], [low, high])
        axis.set_yscale("log")
        set_ticks(axis.yaxis, [low, high])
        bottom, top = axis.get_ylim()
        assert 1 <= sum(bottom <= tick <= top for tick in axis.get_yticks()) <= 10
