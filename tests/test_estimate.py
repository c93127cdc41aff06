"""What a grid is foretold to take: its cells' parts, and cells that are the same as others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import tiny
from oracles import write_texts
from secateur.grid.estimate import GENERATION, INFERENCE, PERPLEXITY, PRUNE, TASKS, estimates, steps
from studies import comparison

from secateur.judge.generation import REFERENCE
from secateur.judge.judging import Judging
from secateur.methods import get_method
from secateur.model.budget import Budget

MANY = Judging(
    texts=("a", "b"), length=10, tasks=("piqa",), inference=True, prompt_length=8, new_tokens=4, rounds=2, batch_size=3,
    prompts=("x", "y"), decodings=(REFERENCE,),
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))[0]


def foretold(text: Path, judging: Judging, *methods: str, **more: Any) -> dict[str, dict[str, Any]]:
    model = tiny("llama")
    cells = comparison(text, *methods, **more).cells(model)
    return estimates(cells, model, judging, windows={"a": 3, "b": None}, task_tokens=1000)


def test_parts_of_the_dense_model_are_counted(text: Path) -> None:
    parts = foretold(text, MANY)["dense"]["parts"]
    assert set(parts) == {PERPLEXITY, TASKS, INFERENCE, GENERATION}
    windows = (3 + 150) * 10  # those of a text that were not counted are guessed
    assert (parts[PERPLEXITY].block_tokens, parts[PERPLEXITY].head_tokens) == (4 * windows, windows)
    assert parts[TASKS].block_tokens == 4 * 1000
    timing = parts[INFERENCE]  # three rounds of two models of four blocks
    assert timing.block_tokens == 3 * 2 * 4 * 3 * 8
    assert (timing.steps[3].block_tokens, timing.steps[3].head_tokens) == (3 * 2 * 4 * 4, 3 * 2 * 4)
    assert {beams: work.head_tokens for beams, work in parts[GENERATION].steps.items()} == {1: 2 * 128, 5: 2 * 128}
    assert steps(MANY) == {1, 3, 5}
    assert steps(Judging(texts=("a",))) == set()


def test_a_pruned_cell_costs_what_is_left_of_its_blocks(text: Path) -> None:
    told = foretold(text, MANY, "shortgpt", sparsities=(0.5,))
    dense, parts = told["dense"]["parts"], told["shortgpt-0.5"]["parts"]
    cost = get_method("shortgpt").plan(tiny("llama"), Budget(0.5), 2, 24, {}).cost
    assert parts[PRUNE].block_tokens == cost.block_tokens
    for part in (PERPLEXITY, TASKS):
        assert parts[part].block_tokens == pytest.approx(dense[part].block_tokens / 2)
        assert parts[part].head_tokens == dense[part].head_tokens
    assert parts[INFERENCE].block_tokens == pytest.approx(dense[INFERENCE].block_tokens * 3 / 4)  # dense beside it
    assert parts[GENERATION].steps[5].block_tokens == pytest.approx(dense[GENERATION].steps[5].block_tokens / 2)


def test_what_is_not_asked_for_is_no_part(text: Path) -> None:
    model = tiny("llama")
    cells = comparison(text, "2ssp").cells(model)
    told = estimates(cells, model, Judging(texts=("a",)), windows={"a": 3}, task_tokens=0)
    assert [set(each["parts"]) for each in told.values()] == [{PERPLEXITY}, {PRUNE, PERPLEXITY}]
    told = estimates(cells, model, Judging(tasks=("piqa",)), windows={}, task_tokens=7)
    assert set(told["dense"]["parts"]) == {TASKS}


def test_a_cell_that_is_made_already_costs_nothing(text: Path) -> None:
    told = foretold(text, MANY, "2ssp", "shortgpt", "window", sparsities=(0.3, 0.5, 0.95), matched=True)
    assert told["2ssp-as-shortgpt-0.5"]["same_as"] == "2ssp-0.5"
    assert told["2ssp-as-window-0.5"]["same_as"] == "2ssp-0.5"
    assert told["2ssp-as-window-0.5"]["parts"] == {}
    assert "same_as" not in told["2ssp-as-shortgpt-0.3"]  # a quarter
    assert told["2ssp-as-window-0.3"]["same_as"] == "2ssp-as-shortgpt-0.3"
    assert "same_as" not in told["2ssp-0.5"]
    for name in ("shortgpt-0.95", "2ssp-as-shortgpt-0.95", "window-0.95"):
        assert "refused" in told[name]
        assert "same_as" not in told[name]
