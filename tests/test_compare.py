"""Comparisons on tiny models: equal terms, cells made once, failures told, folders of other arguments refused."""

from __future__ import annotations

import csv
import functools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from msgspec import UNSET
from oracles import edit_facts, prepared, write_texts
from studies import SEARCH, Loads, comparison, fake_judges, grid, no_times

import secateur
from secateur.engine.tokens import Tokens
from secateur.errors import (
    DataError,
    Interrupted,
    InvalidOptionError,
    OutputError,
    OutputExistsError,
    SecateurError,
    UnknownNameError,
)
from secateur.folders import claimed
from secateur.grid import Calibration, Comparison, Grid, Judging, compare
from secateur.grid.asked import parse_options, read_sparsities
from secateur.grid.cells import Cell, Matrices
from secateur.grid.compare import is_block_wise
from secateur.grid.pace import Standing
from secateur.grid.presets import PRESETS
from secateur.grid.run import run_grid
from secateur.journal import Journal
from secateur.judge import generation as written
from secateur.judge import judging
from secateur.judge.generation import Decoding
from secateur.judge.perplexity import perplexity
from secateur.methods import get_method, methods
from secateur.model.handle import Model
from secateur.pruning import run_job
from secateur.report.results import CellResult, Index, dumps, read_index
from secateur.sharing import Shared, SharingRun

Cells = Mapping[str, CellResult]
THREE = ("2ssp", "shortgpt", "evopress")
WIDE = functools.partial(tiny, "llama", hidden_size=64, num_attention_heads=8, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))[0]


def three(text: Path) -> Comparison:
    return comparison(text, *THREE, matched=True, options={"evopress": SEARCH})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, Cells]:
    """A small finished comparison that no test changes."""
    folder = tmp_path_factory.mktemp("done") / "out"
    return folder, compare(three(text), grid(folder, text))


def at(cell: str, part: str, work: Callable[[], Any]) -> Callable[[Standing], None]:
    """Does something in the middle of a cell's part, once."""
    seen: list[Standing] = []

    def shown(standing: Standing) -> None:
        if (standing.cell, standing.part) == (cell, part) and standing.done > 0 and not seen:
            seen.append(standing)
            work()

    return shown


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def statuses(cells: Cells) -> list[str]:
    return [cell.status for cell in cells.values()]


def test_cells_say_all_that_the_report_needs(done: tuple[Path, Cells]) -> None:
    folder, cells = done
    index = read_index(folder)
    assert (index.schema, index.cells, index.model.blocks) == (1, list(cells), 4)
    assert index.model.parameters == tiny("llama").layout().parameters
    assert index.cells[:5] == ["dense", "2ssp-0.25", "shortgpt-0.25", "2ssp-as-shortgpt-0.25", "evopress-0.25"]
    for name, cell in cells.items():
        assert json.loads(dumps(cell)) == json.loads((folder / "cells" / name / "cell.json").read_text())
        (result,) = cell.perplexity.values()
        losses, weights = result.window_nll or [], result.window_predictions or []
        weighed = sum(loss * weight for loss, weight in zip(losses, weights, strict=True) if loss is not None)
        assert weighed / sum(weights) == pytest.approx(result.nll)
        assert [block.block for block in cell.shape or ()] == [0, 1, 2, 3]
    dense, shortgpt, evopress = cells["dense"], cells["shortgpt-0.25"], cells["evopress-0.25"]
    assert (dense.dense_shape, dense.prune) == (dense.shape, None)
    (gone,) = [block for block in shortgpt.shape or () if not block.attention and not block.mlp]
    assert gone.width == gone.kv_heads == 0
    assert shortgpt.removed == pytest.approx(0.25)
    assert "reduced" in evopress.label
    assert len(evopress.curve or ()) == 3


def test_a_cell_is_what_prune_and_perplexity_say(done: tuple[Path, Cells], text: Path) -> None:
    """The first rows of the shared matrix are the windows that the method would have taken by itself."""
    model = Loads()()
    pruned = run_job(prepared(model, "2ssp", sparsity=0.25, calibration=str(text), samples=2, length=24))
    judged = Matrices(model, [_cell("x", _rows(text, 5))], data=None, cache=None).rows(_rows(text, 5))
    cell = done[1]["2ssp-0.25"]
    assert cell.prune is not None
    assert cell.perplexity["plain.txt"].nll == pytest.approx(perplexity(model, judged).nll, abs=1e-9)
    assert cell.prune.forwards == pruned.record.cost.forwards
    assert cell.prune.peak_device_memory_bytes is None  # of a CPU nobody tells it
    assert cell.parameters == pruned.pruning.after.parameters


def _rows(text: Path, samples: int, length: int = 24) -> Calibration:
    return Calibration(text=str(text), samples=samples, length=length)


def _cell(method: str, calibration: Calibration) -> Cell:
    return Cell(name=f"{method}-{calibration.samples}", method=method, label=method, calibration=calibration)


def test_a_match_has_the_size_that_was_achieved_and_is_not_made_twice(done: tuple[Path, Cells]) -> None:
    cells = done[1]
    match, other = cells["2ssp-as-shortgpt-0.25"], cells["shortgpt-0.25"]
    assert (match.sparsity, match.matched_to, match.method) == (other.removed, "shortgpt-0.25", "2ssp")
    assert match.removed == pytest.approx(0.25, abs=0.02)
    assert match.same_as == "2ssp-0.25"
    assert match.perplexity == cells["2ssp-0.25"].perplexity


def test_a_reduced_search_is_called_so_where_it_is_not_made_again(text: Path, tmp_path: Path) -> None:
    class Twice(Comparison):
        def cells(self, model: Model) -> list[Cell]:
            dense, cell = super().cells(model)
            return [dense, cell, replace(cell, name="again", label="again")]

    once = comparison(text, "evopress", options={"evopress": SEARCH})
    again = run_grid(grid(tmp_path / "out", text), Twice(**asdict(once)))["again"]
    assert (again.same_as, again.label) == ("evopress-0.25", "again (reduced search)")


def test_all_methods_see_the_first_rows_of_one_matrix(text: Path) -> None:
    model = Loads()()
    wanted = [_rows(text, 2), _rows(text, 4), _rows(text, 3, 12)]
    matrices = Matrices(model, [_cell("x", rows) for rows in wanted], data=None, cache=None)
    two, four, short = map(matrices.rows, wanted)
    assert torch.equal(two.ids, four.ids[:2])
    assert torch.equal(short.ids, four.ids[:3, :12])
    assert (two.source["samples"], short.source["length"]) == (2, 12)
    many = [_cell("x", wanted[0]), _cell("greedy", _rows(text, 10_000))]
    with pytest.raises(DataError, match=r"are needed.*greedy 10000, x 2"):
        Matrices(model, many, data=None, cache=None)


# --- restarting ---


def whole_files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Of every finished cell's files: when they were written, and what they hold."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "cells").glob("[!.]*/*")}


def same_tables(one: Path, other: Path) -> bool:
    tables = ("main-table.csv", "differences.csv")
    return all(no_times((one / name).read_text()) == no_times((other / name).read_text()) for name in tables)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_gives_the_same_table(done: tuple[Path, Cells], text: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", list[str]()
    stops = at("shortgpt-0.25", "perplexity", raising(KeyboardInterrupt()))
    here = grid(out, text, on_cell=lambda cell: told.append(cell.name))
    with pytest.raises(Interrupted, match="same command goes on"):
        compare(three(text), replace(here, on_standing=stops))
    first = whole_files(out)
    assert 0 < len(first) < 6
    assert not list((out / "cells").glob(".*"))  # nothing half-written, no claim
    with (out / "main-table.csv").open() as file:  # what is finished can be looked at
        assert {row["name"] for row in csv.DictReader(file)} == {path.parent.name for path in first}
    cells = compare(three(text), here)
    assert {path: whole_files(out)[path] for path in first} == first
    assert len(told) == len(set(told)) == len(cells) == len(whole_files(out))
    assert same_tables(out, done[0])
    loads = Loads()
    assert list(compare(three(text), grid(out, text, load=loads))) == list(cells)
    assert loads.count == 1  # to see that the model is the same; nothing is pruned


@pytest.mark.slow
def test_a_killed_process_goes_on(done: tuple[Path, Cells], text: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a cell that is pruned already: no clean-up is run at all."""
    out = tmp_path / "out"
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_compare import Path, at, compare, grid, three
text, kill = Path({str(text)!r}), lambda: os.kill(os.getpid(), signal.SIGKILL)
compare(three(text), grid(Path({str(out)!r}), text, on_standing=at("shortgpt-0.25", "perplexity", kill)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    made = whole_files(out)
    assert {path.parent.name for path in made} == {"dense", "2ssp-0.25"}
    assert statuses(compare(three(text), grid(out, text))) == ["done"] * len(done[1])
    assert {path: whole_files(out)[path] for path in made} == made  # neither touched nor made again
    assert same_tables(out, done[0])


def test_methods_may_be_added_and_all_commands_are_kept(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def more(method: str) -> tuple[Cells, Index]:
        here = grid(out, text, arguments={"command": ["--methods", method]})
        return compare(comparison(text, method), here), read_index(out)

    more("shortgpt"), more("window")
    cells, index = more("shortgpt")
    assert set(index.cells) == {"dense", "shortgpt-0.25", "window-0.25"}
    assert "window" in (out / "main-table.md").read_text()
    assert index.commands == [["--methods", "shortgpt"], ["--methods", "window"]]
    assert all((cell.machine, cell.versions) == (index.machine, index.versions) for cell in cells.values())
    # An older version's cells have no times of their parts, and its index the last command only.
    for file, missing in (("compare.json", "commands"), ("cells/dense/cell.json", "seconds")):
        content = json.loads((out / file).read_text())
        del content[missing]
        (out / file).write_text(json.dumps(content))
    cells, index = more("2ssp")
    assert statuses(cells) == ["done", "done"]
    assert index.commands == [["--methods", "shortgpt"], ["--methods", "2ssp"]]


@pytest.mark.parametrize(
    ("wanted", "here", "match"),
    [
        ({}, {"more": {"tasks": ("piqa",)}}, r"\(tasks differ\)"),
        ({}, {"load": Loads(seed=1)}, r"\(model differ\)"),
        ({"samples": 3}, {}, "samples"),
        ({"samples": 3, "methods": ("shortgpt",)}, {}, "samples"),  # other cells, but in the same table
        ({"options": {"2ssp": {"norm": "l1"}}}, {}, "2ssp-0.25"),
        ({"options": {"2ssp": {"alpha": 3.0}}, "methods": ("shortgpt",), "matched": True}, {}, "2ssp-as-shortgpt-0.25"),
    ],
)
def test_a_folder_of_other_arguments_is_refused(
    wanted: Any, here: Any, match: str, done: tuple[Path, Cells], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_judges(monkeypatch)
    before = {path: path.read_bytes() for path in done[0].rglob("*.*") if path.is_file()}
    with pytest.raises(OutputExistsError, match=match):
        compare(replace(comparison(text, "2ssp"), **wanted), grid(done[0], text, **here))
    assert {path: path.read_bytes() for path in done[0].rglob("*.*") if path.is_file()} == before


def test_a_folder_with_other_things_in_it_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    loads = Loads()
    for name, error in (("out", OutputExistsError), ("file", OutputError)):
        with pytest.raises(error):
            compare(comparison(text), grid(tmp_path / name, text, load=loads))
    assert loads.count == 0


# --- two processes ---


def test_a_cell_that_another_process_makes_is_left_to_it(text: Path, tmp_path: Path) -> None:
    seen: list[Standing] = []
    with claimed(tmp_path / "out/cells/2ssp-0.25"):
        cells = compare(comparison(text), grid(tmp_path / "out", text, on_standing=seen.append))
    assert list(cells) == ["dense", "shortgpt-0.25"]
    assert (seen[-1].finished, seen[-1].cells) == (2, 3)  # what is not made here is not finished
    assert seen[-1].left_s > 0
    assert "Not there yet: 2ssp-0.25" in (tmp_path / "out/main-table.md").read_text()
    assert list(compare(comparison(text), grid(tmp_path / "out", text))) == ["dense", "2ssp-0.25", "shortgpt-0.25"]


def test_a_match_waits_for_a_cell_that_another_process_makes(text: Path, tmp_path: Path) -> None:
    here, shortgpt = grid(tmp_path / "out", text), tmp_path / "out/cells/shortgpt-0.25"
    with claimed(shortgpt):
        assert list(compare(comparison(text, matched=True), here)) == ["dense", "2ssp-0.25"]
    told, more = list[str](), comparison(text, "2ssp", "shortgpt", "window", matched=True)
    with ExitStack() as stack:
        stack.enter_context(claimed(shortgpt))
        cells = compare(more, replace(here, on_cell=lambda cell: (told.append(cell.name), stack.close())[0]))
    assert told == ["window-0.25", "2ssp-as-window-0.25", "shortgpt-0.25", "2ssp-as-shortgpt-0.25"]
    assert set(statuses(cells)) == {"done"}


def test_a_match_waits_for_a_failed_cell_that_another_process_tries_again(text: Path, tmp_path: Path) -> None:
    here, failed = grid(tmp_path / "out", text), tmp_path / "out/cells/shortgpt-0.25"
    compare(comparison(text), here)
    cell = json.loads((failed / "cell.json").read_text())
    (failed / "cell.json").write_text(json.dumps({**cell, "status": "failed", "error": "for now"}))
    wanted = comparison(text, matched=True)
    with claimed(failed):
        assert "2ssp-as-shortgpt-0.25" not in compare(wanted, here)
    assert set(statuses(compare(wanted, here))) == {"done"}


def test_a_cell_like_one_that_another_process_makes_waits_to_be_copied(text: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "out", comparison(text, "shortgpt", "window", matched=True)
    (first, second), names = ("2ssp-as-shortgpt-0.25", "2ssp-as-window-0.25"), list[str]()
    compare(replace(wanted, matched=False), grid(out, text))
    identity = compare(wanted, grid(tmp_path / "other", text))[first].fingerprint
    with claimed(out / "cells" / str(identity)):  # as a process that makes the first has it
        assert list(compare(wanted, grid(out, text))) == ["dense", "shortgpt-0.25", "window-0.25"]
    cells = compare(wanted, grid(out, text, on_cell=lambda cell: names.append(cell.name)))
    assert names == [first, second]
    assert (cells[first].same_as, cells[second].same_as) == (UNSET, first)


# --- failures ---


def test_of_a_cell_that_is_done_only_what_others_take_over_stays(text: Path, tmp_path: Path) -> None:
    left = dict[str, Counter[str]]()

    def look(cell: CellResult) -> None:
        journals = [Journal(each, repair=False) for each in (tmp_path / "out" / ".runs").glob("*")]
        assert all(len(list(each.folder.glob("tensors/*"))) <= len(each.entries) for each in journals)
        left[cell.name] = Counter(key for each in journals for _, key in each.entries)

    asked = comparison(text, "2ssp", "slimgpt", sparsities=(0.25, 0.5))
    cells = compare(asked, grid(tmp_path / "out", text, on_cell=look))
    assert all(cell.done for cell in cells.values())
    shared = str(get_method("2ssp").shared)
    for name in ("2ssp-0.25", "2ssp-0.5", "slimgpt-0.25", "slimgpt-0.5"):
        assert left[name], name
        assert all(key.startswith(shared) and count == 1 for key, count in left[name].items())
    assert not (tmp_path / "out" / ".runs").exists()


def test_one_failing_cell_is_told_and_tried_again(text: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "out", list[str]()
    worm = at("2ssp-0.25", "perplexity", raising(RuntimeError("a worm in the wood")))
    cells = compare(comparison(text), grid(out, text, on_standing=worm))
    assert statuses(cells) == ["done", "failed", "done"]
    failed = cells["2ssp-0.25"]
    assert failed.error == "RuntimeError: a worm in the wood"
    assert failed.parameters
    assert failed.prune is not None  # what came before is kept
    assert "2ssp-0.25 failed: RuntimeError: a worm in the wood" in (out / "main-table.md").read_text()
    again = compare(comparison(text), grid(out, text, on_cell=lambda cell: names.append(cell.name)))
    assert statuses(again) == ["done"] * 3
    assert names == ["2ssp-0.25"]
    assert "failed" not in (out / "main-table.md").read_text()


def test_an_unreachable_sparsity_fails_its_cell_and_its_match_only(text: Path, tmp_path: Path) -> None:
    wanted = comparison(text, "2ssp", "shortgpt", sparsities=(0.95,), matched=True)
    cells = compare(wanted, grid(tmp_path / "out", text))
    assert "0.75 (3 of them) can be reached" in str(cells["shortgpt-0.95"].error)
    assert "shortgpt-0.95" in str(cells["2ssp-as-shortgpt-0.95"].error)
    assert cells["2ssp-0.95"].done


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"methods": ("2sssp",)}, UnknownNameError),
        ({"options": {"2ssp": {"alhpa": 2}}}, UnknownNameError),
        ({"options": {"window": {}}}, InvalidOptionError),  # not compared
        ({"options": {"2ssp": {}}, "methods": ("slimgpt",), "matched": True}, InvalidOptionError),  # nor matched
        ({"of": "everything"}, InvalidOptionError),
        ({"sparsities": ("half",)}, InvalidOptionError),
        ({"base": "window"}, InvalidOptionError),
        ({"length": 65}, InvalidOptionError),  # the positions end at 64
        ({"methods": ("2ssp", "2ssp")}, InvalidOptionError),
        ({"calibration": "no-such-text"}, UnknownNameError),
    ],
)
def test_what_is_wrong_with_the_whole_grid_is_refused_first(
    change: dict[str, Any], error: type[Exception], text: Path, tmp_path: Path
) -> None:
    wanted = replace(comparison(text, "2ssp"), **change)
    with pytest.raises(error):
        compare(wanted, grid(tmp_path / "out", text))
    assert not (tmp_path / "out").exists()


# --- judges ---


def test_tasks_times_and_samples_are_in_cells_and_tables(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_judges(monkeypatch)
    more = {"tasks": ("easy", "hopeless"), "limit": 200, "inference": True, "prompts": ("Who?",)}
    cells = compare(comparison(text, matched=True), grid(tmp_path / "out", text, more=more))
    dense, shortgpt = cells["dense"], cells["shortgpt-0.25"]
    assert set(shortgpt.tasks) == {"easy", "hopeless"}
    assert shortgpt.inference is not None and dense.inference is not None  # noqa: PT018  # narrows the type
    assert shortgpt.inference.pruned.token_ms < shortgpt.inference.dense.token_ms
    assert dense.inference.pruned == dense.inference.dense
    agreements = [cell.generation.figures.greedy_agreement for cell in (dense, shortgpt) if cell.generation]
    assert agreements == [None, 0.5]  # nothing is compared with itself
    content = json.loads((tmp_path / "out/main-table.json").read_text())
    assert set(content["grey"]) == {"hopeless"}
    row = next(row for row in content["rows"] if row["name"] == "2ssp-0.25")
    assert row["task_average"] == row["task:easy"] == cells["2ssp-0.25"].tasks["easy"].value
    same_size = [each for each in content["differences"] if each["kind"] == "same size"]
    assert [(each["cell"], each["against"]) for each in same_size] == [("shortgpt-0.25", "2ssp-as-shortgpt-0.25")]
    table = (tmp_path / "out/main-table.md").read_text()
    assert "Left out of the average, hopeless" in table
    assert "*25.0%*" in table


@pytest.mark.slow
def test_prompts_are_continued_as_eval_does_and_by_the_dense_model_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[tuple[int, str, str]] = []
    real = written.generate

    def counted(model: Model, prompt: str, decoding: written.Decoding, **more: Any) -> written.Continuation:
        generated.append((model.layout().parameters, prompt, decoding.name))
        return real(model, prompt, decoding, **more)

    monkeypatch.setattr(written, "generate", counted)
    more = {"prompts": ("and then", "ab"), "decodings": (replace(written.REFERENCE_DECODING, max_length=20),)}
    cells = compare(comparison(text), grid(tmp_path / "out", text, more=more))
    whole = cells["dense"].parameters
    assert sorted(generated[:4]) == sorted({each for each in generated if each[0] == whole})
    assert len(generated) == len(set(generated)) == 3 * 4  # three models, two prompts, two decodings
    dense, model = Loads()(), Loads()()
    run_job(prepared(model, "2ssp", sparsity=0.25, calibration=str(text), samples=2, length=24))
    judged = secateur.evaluate(model, grid(tmp_path, text, more=more).judging, against=dense)
    assert judged.against
    assert cells["2ssp-0.25"].generation == judged.model.generation
    assert cells["dense"].generation == judged.against.generation


def test_every_part_is_timed_and_the_end_is_foretold(text: Path, tmp_path: Path) -> None:
    """On a clock on which each perplexity takes five seconds, and nothing else anything."""
    now, seen = [0.0], list[Standing]()

    def shown(standing: Standing) -> None:
        seen.append(standing)
        if standing.part == "perplexity":
            now[0] = 5 * (standing.finished + standing.done)

    here = grid(tmp_path / "out", text, clock=lambda: now[0], on_standing=shown)
    cells = compare(comparison(text), here)
    assert [cell.seconds for cell in cells.values()] == [
        {"perplexity": 5.0}, {"prune": 0.0, "perplexity": 5.0}, {"prune": 0.0, "perplexity": 5.0}
    ]  # fmt: skip
    assert seen[-1] == Standing("", "", 0.0, 3, 3, elapsed_s=15.0, left_s=0.0, guessed=())
    after_two = next(standing for standing in seen if standing.finished == 2 and standing.part == "perplexity")
    assert after_two.left_s == pytest.approx(5, rel=0.25)  # less is left of the blocks, which this clock does not know
    told = len(seen)
    compare(comparison(text), here)
    assert len(seen) == told  # all was there: nothing is timed or probed


def test_a_judge_that_is_missing_is_said_before_any_work(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "plan_tasks", lambda *tasks, **more: raising(DataError("no tasks"))())
    loads = Loads()
    with pytest.raises(DataError, match="no tasks"):
        compare(comparison(text), grid(tmp_path / "out", text, load=loads, more={"tasks": ("piqa",)}))
    assert loads.count == 0


# --- what runs share ---


@pytest.mark.parametrize("name", [name for name, each in methods().items() if each.shared])
def test_shared_steps_hold_at_every_sparsity_and_cost_as_if_run_alone(name: str) -> None:
    tokens = Tokens.of(torch.randint(5, 97, (2, 16), generator=torch.Generator().manual_seed(0)))
    shared = Shared(get_method(name).shared)

    def run(sparsity: float, store: Shared) -> tuple[Any, Any]:
        sharing = SharingRun(0, store)
        done = run_job(prepared(tiny("llama"), name, sparsity=sparsity, calibration=tokens), run=sharing)
        return edit_facts(done.pruning.edits), sharing.meter

    run(0.25, shared)
    assert shared.spared_s == 0
    assert run(0.5, shared) == run(0.5, Shared())
    assert shared.spared_s > 0


# --- what is asked for ---


@pytest.mark.parametrize(
    ("asked", "sparsities"),
    [
        (["paper"], [0.25, 0.375, 0.5]),
        (["every-block"], [0.25, 0.5, 0.75]),
        (["0.3", "paper", 0.25], [0.25, 0.3, 0.375, 0.5]),
        *((wrong, None) for wrong in (["0"], ["1"], ["-2"], ["nan"], ["x"])),
    ],
)
def test_words_for_sparsities(asked: list[str | float], sparsities: list[float] | None) -> None:
    if sparsities is not None:
        assert read_sparsities(asked, 4) == sparsities
        return
    with pytest.raises(InvalidOptionError, match="every-block"):
        read_sparsities(asked, 4)


def test_options_of_single_methods() -> None:
    asked = ("evopress.generations=4", "2ssp.stage1-only=true", "2ssp.samples=8", "slimgpt.group=paper")
    assert parse_options(asked) == {
        "evopress": {"generations": 4}, "2ssp": {"stage1_only": True, "samples": 8}, "slimgpt": {"group": "paper"}
    }  # fmt: skip
    for wrong in ("generations=4", "evopress.generations", "evopress.generations=many", "2ssp.samples=few"):
        with pytest.raises(InvalidOptionError):
            parse_options([wrong])
    for unknown in ("evopres.generations=4", "evopress.generation=4"):
        with pytest.raises(UnknownNameError):
            parse_options([unknown])


def samples_of(wanted: Comparison, model: Model) -> dict[str, int]:
    return {cell.method: cell.calibration.samples for cell in wanted.cells(model) if cell.calibration}


def test_per_method_calibration_wins_over_the_common_one(text: Path) -> None:
    wanted = comparison(text, "2ssp", "shortgpt", options={"shortgpt": {"samples": 4}})
    assert samples_of(wanted, Loads()()) == {"2ssp": 2, "shortgpt": 4}
    alone = Comparison(methods=("2ssp", "slimgpt"), sparsities=(0.5,))
    assert samples_of(alone, Loads()()) == {"2ssp": 32, "slimgpt": 256}  # the papers'


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_feasible_settings_of_methods_that_exist(name: str) -> None:
    by_name = {cell.name: cell for cell in Comparison.from_preset(name).cells(WIDE())}
    if name == "2ssp-paper":
        assert [by_name[f"slicegpt-{share}"].options["dimension"] for share in (0.25, 0.5)] == [48, 32]
        assert by_name["shortgpt-0.5"].calibration.samples == 256  # type: ignore[union-attr]
        assert by_name["blockpruner-0.5"].options["alternate"] is True
    else:
        assert by_name["slimgpt-0.2"].options == {"damping": 0.0, "first_ratio": 0.0625, "last_ratio": 0.25}
        assert by_name["slimgpt-0.25"].options == {"damping": 0.0}
        assert PRESETS[name].judging.length == 128


def test_what_is_given_wins_over_a_preset_and_a_preset_over_the_paper() -> None:
    def samples(**given: Any) -> dict[str, int]:
        wanted = Comparison.from_preset("2ssp-paper", sparsities=["0.5"], matched=False, **given)
        return samples_of(wanted, WIDE())

    published = {"2ssp": 32, "shortgpt": 256, "window": 256, "blockpruner": 1, "evopress": 64, "slicegpt": 256}
    assert samples() == published
    given = samples(samples=8, options={"window": {"samples": 3}})
    assert given == {**dict.fromkeys(published, 8), "window": 3}
    wanted = Comparison.from_preset("2ssp-paper", methods=["shortgpt"], sparsities=["0.5"], length=64)
    cell, match = wanted.cells(WIDE())[1:]
    assert (match.name, match.calibration.length) == ("2ssp-as-shortgpt-0.5", 64)  # type: ignore[union-attr]
    assert cell.options["positions"] == "last"  # still the preset's, whose other methods were deselected
    assert (cell.calibration.samples, cell.calibration.length) == (256, 64)  # type: ignore[union-attr]
    assert Comparison.from_preset(methods=[], sparsities=None, of=None) == Comparison()
    published = Comparison.from_preset("slimgpt-paper", seed=0)
    assert (published.methods, published.of, published.seed) == (("slimgpt",), "model", 0)


def test_block_wise_methods_have_2ssp_beside_them_unless_it_is_not_wanted() -> None:
    blockwise = {"shortgpt", "window", "blockpruner", "evopress"}
    assert {name for name, each in methods().items() if is_block_wise(each)} == blockwise
    for more, expected in (({}, ["2ssp-as-shortgpt-0.25"]), ({"matched": False}, [])):
        wanted = Comparison(methods=("shortgpt", "slimgpt"), sparsities=(0.25,), length=24, **more)
        assert [cell.name for cell in wanted.cells(tiny("llama")) if cell.matched_to] == expected


def test_a_grid_without_a_judge_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="judge"):
        Grid(load=Loads(), folder=Path("out"), judging=Judging(inference=True))


def test_each_text_has_a_name_of_its_own() -> None:
    with pytest.raises(InvalidOptionError, match=r"val\.txt"):
        Grid(load=Loads(), folder=Path("out"), judging=Judging(texts=("a/val.txt", "b/val.txt")))
    with pytest.raises(InvalidOptionError, match="c4"):
        Judging(texts=("c4", Path("c4")))


@pytest.mark.parametrize(
    ("more", "load", "match"),
    [
        ({"inference": True, "new_tokens": 9000}, Loads(), "9000 new tokens; the model's positions end"),
        ({"prompts": ("",)}, Loads(), "prompt is empty"),
        ({"prompts": ("a b c",), "decodings": (Decoding(name="short", max_length=2),)}, Loads(), "'short' ends at 2"),
        ({"texts": (), "tasks": ("easy",)}, lambda: tiny("llama"), "no tokenizer, so it cannot be given tasks"),
    ],
)
def test_what_the_model_cannot_be_put_through_is_refused_before_the_first_cell(
    tmp_path: Path, text: Path, more: dict[str, Any], load: Callable[[], Model], match: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake_judges(monkeypatch)
    with pytest.raises(SecateurError, match=match):
        compare(comparison(text), grid(tmp_path / "out", text, load=load, more=more))
    assert not (tmp_path / "out").exists()


def test_a_refit_is_a_row_of_its_own_whose_work_is_counted(text: Path, tmp_path: Path) -> None:
    methods = ("2ssp", "shortgpt", "slicegpt")
    cells = compare(comparison(text, *methods, refit=True), grid(tmp_path / "out", text))
    assert [name for name in cells if name.endswith("-refit")] == ["2ssp-0.25-refit", "shortgpt-0.25-refit"]
    for method, filters in (("2ssp", {"refit", "fold"}), ("shortgpt", {"fold"})):
        plain, refitted = cells[f"{method}-0.25"], cells[f"{method}-0.25-refit"]
        assert (refitted.status, refitted.label, refitted.method) == ("done", f"{method} + refit", f"{method} + refit")
        assert refitted.filters is not UNSET
        assert set(refitted.filters) == filters
        assert plain.filters is UNSET
        assert refitted.fingerprint != plain.fingerprint
        assert refitted.parameters == plain.parameters
        assert refitted.perplexity != plain.perplexity
        assert refitted.prune is not None
        assert plain.prune is not None
        assert (refitted.prune.forwards or 0) > (plain.prune.forwards or 0)
    with (tmp_path / "out" / "differences.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["cell"] for row in rows if row["against"] == "2ssp-0.25"} == set(cells) - {"dense", "2ssp-0.25"}
    again = grid(tmp_path / "out", text)
    compare(comparison(text, *methods), again)  # the plain ones are the same cells
    assert again.load.count == 1  # type: ignore[attr-defined]  # to look at
    with pytest.raises(InvalidOptionError, match="slicegpt"):
        compare(comparison(text, "slicegpt", refit=True), grid(tmp_path / "other", text))


def test_a_model_of_another_configuration_is_another_model(text: Path, tmp_path: Path) -> None:
    """Its weights are the same; a folder that was made before this was looked at may be gone on with."""
    here = grid(tmp_path / "out", text)

    def load() -> Model:
        model = here.load()
        model.hf.config.rms_norm_eps *= 10
        return model

    other = replace(here, load=load)
    compare(comparison(text, "shortgpt"), here)
    with pytest.raises(OutputExistsError, match="configuration"):
        compare(comparison(text, "shortgpt"), other)
    index = json.loads((tmp_path / "out/compare.json").read_text())
    del index["model"]["configuration"]
    (tmp_path / "out/compare.json").write_text(json.dumps(index))
    compare(comparison(text, "shortgpt"), other)


@pytest.mark.parametrize("name", ["2ssp-0.25", "blockpruner-0.25", "slimgpt-0.5"])
def test_a_published_cell_is_the_same_cell_though_its_method_has_more_options_now(name: str) -> None:
    folder = Path(__file__).parent.parent / "docs" / "results" / "main-table"
    index, made = (json.loads((folder / file).read_text()) for file in ("compare.json", f"cells/{name}/cell.json"))
    used = made["calibration"]
    calibration = Calibration(text=used["name"], samples=used["samples"], length=used["length"], seed=used["seed"])
    cell = Cell(
        name=name, method=made["method"], label=name, sparsity=made["sparsity"], options=made["options"],
        calibration=calibration,
    )  # fmt: skip
    assert cell.identity(index["judged_by"], used["fingerprint"]) == made["fingerprint"]
    if made["method"] == "2ssp":
        other = replace(cell, options={**made["options"], "score": "ranges"})
        assert other.identity(index["judged_by"], used["fingerprint"]) != made["fingerprint"]
