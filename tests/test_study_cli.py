"""`secateur compare` and `secateur ablate`: what they write, what they print where, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from studies import fake_judges
from test_cli import Told, _own_world, call, world, write_ending_model  # noqa: F401  # fixtures

from secateur.cli import grids
from secateur.cli.options import SourceOptions
from secateur.errors import DataError
from secateur.judge.results import Perplexity
from secateur.model.handle import Model
from secateur.model.load import Source, load
from secateur.planning import Request, plan
from secateur.pruning import calibration_of
from secateur.report.results import CellResult

QUICK = ("--samples", 2, "--length", 24, "--eval-samples", 4, "--eval-length", 24)


@pytest.fixture
def where(world: dict[str, Path]) -> tuple[object, ...]:  # noqa: F811
    return (world["model"], "--calibration", world["plain"], "--texts", world["plain"])


def compare(where: tuple[object, ...], *words: object) -> Told:
    return call("compare", *where, *QUICK, *words)


def test_the_demo_model_needs_no_hub_for_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(model: str, source: SourceOptions) -> tuple[str, ...]:
        calibration, judging = grids.defaults(model, source)
        return calibration, *judging.texts

    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    assert texts("demo", SourceOptions()) == ("demo", "demo")
    assert texts("demo", SourceOptions(data=tmp_path)) == texts("model", SourceOptions()) == ("c4", "wikitext2")
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert texts("demo", SourceOptions()) == ("c4", "wikitext2")


def test_a_pruning_takes_the_same_text_as_a_grid(world: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """With a folder of texts that is C4's, which is not in this one, also for the demo model."""
    model = load(world["model"])
    model.source["asked"] = "demo"
    planned = plan(Request(method="2ssp", sparsity=0.4, samples=2, length=8, data=tmp_path), model)
    with pytest.raises(DataError, match="c4"):
        calibration_of(planned, model)


@pytest.mark.slow
def test_compare_writes_its_tables_and_is_done_once(where: tuple[object, ...], tmp_path: Path) -> None:
    words = ("--methods", "2ssp,shortgpt", "--sparsities", "0.25", "--option", "2ssp.attentions=2")
    words = (*words, "--out", tmp_path / "out")
    told = compare(where, *words)
    assert told.code == 0, told.err
    assert "| shortgpt | 0.25 |" in told.out
    assert "2ssp-0.25 in" in told.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.json", "cells", "main-table.md", "main-table.csv", "main-table.json", "main-table.tex",
        "differences.csv", "report.html", "plots",
    }  # fmt: skip
    index = json.loads((tmp_path / "out/compare.json").read_text())
    assert index["arguments"]["command"][:2] == ["compare", "model"]  # no private path
    assert str(tmp_path) not in (tmp_path / "out/compare.json").read_text()
    cell = json.loads((tmp_path / "out/cells/2ssp-0.25/cell.json").read_text())
    assert sum(not block["attention"] for block in cell["shape"]) == cell["options"]["attentions"] == 2
    again = compare(where, *words, "--json")
    assert again.code == 0
    assert [row["name"] for row in again.json["rows"]] == index["cells"]
    assert "2ssp-0.25 in" not in again.err  # nothing was made


@pytest.mark.slow
def test_a_failed_cell_shows_in_the_exit_code(where: tuple[object, ...], tmp_path: Path) -> None:
    words = ("--methods", "2ssp,shortgpt", "--sparsities", "0.9", "--no-matched", "--out", tmp_path / "out", "--json")
    told = compare(where, *words)
    assert told.code == 4
    assert list(told.json["failed"]) == ["shortgpt-0.9"]
    assert "1 of 3 cells failed" in told.err


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("compare",), "auto"),
        (("compare", "--bos", "always"), "always"),
        (("compare", "--preset", "2ssp-paper"), "never"),
        (("compare", "--preset", "2ssp-paper", "--bos", "auto"), "auto"),
        (("ablate", "--what", "norm", "--bos", "never"), "never"),
    ],
)
def test_calibration_and_judging_are_begun_alike(
    words: tuple[str, ...], asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(grids.GridJob, "run", lambda job, grid, folder: seen.extend((grid.bos, job.judging.bos)))
    told = call(words[0], "demo", *words[1:])
    assert (told.code, seen) == (0, [asked, asked]), told.err


def test_a_dry_run_writes_nothing_and_foretells_every_cell(
    where: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_judges(monkeypatch)
    words = ("--sparsities", "0.25,0.9", "--dry-run", "--tasks", "easy", "--eval-samples", 0)
    told = compare(where, *words, "--out", tmp_path / "out", "--json")
    assert told.code == 0, told.err
    cells = {cell["name"]: cell for cell in told.json["cells"]}
    assert cells["2ssp-0.25"]["forwards"] > cells["shortgpt-0.25"]["forwards"] > 0
    assert cells["shortgpt-0.9"]["refused"] and cells["2ssp-as-shortgpt-0.9"]["refused"]  # noqa: PT018
    assert told.json["seconds"] == pytest.approx(sum(cell["seconds"] for cell in cells.values()))
    assert not (tmp_path / "out").exists()
    shown = compare(where, *words)
    assert "Guessed: the windows of texts that are wanted whole, tasks, by their first documents" in shown.out


def test_a_perplexity_that_is_no_number_is_told() -> None:
    perplexity = {"c4": Perplexity(perplexity=None), "wikitext2": Perplexity(perplexity=12.345)}
    told = grids.cell_in_words(CellResult(name="x", status="done", perplexity=perplexity))
    assert told == "x: c4 not finite, wikitext2 12.35"


@pytest.mark.slow
def test_a_preset_sets_all_and_what_is_said_wins(
    where: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_judges(monkeypatch)
    model = write_ending_model(tmp_path / "model")
    preset = ("--preset", "2ssp-paper", "--methods", "shortgpt", "--option", "shortgpt.samples=3")
    words = (*preset, "--sparsities", "0.25", "--tasks", "easy", "--limit", 20, "--out", tmp_path / "out")
    told = compare((model, *where[1:]), *words)
    assert told.code == 0, told.err
    cell = json.loads((tmp_path / "out/cells/shortgpt-0.25/cell.json").read_text())
    assert cell["options"]["positions"] == "last"  # the preset's
    assert cell["calibration"]["samples"] == 3  # given
    assert set(cell["tasks"]) == {"easy"}
    assert next(sample["prompt"] for sample in cell["generation"]["samples"]) == "Who is Albert Einstein?"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--methods", "2ssp"), "--out DIR is missing"),
        (("--methods", "2sp", "--dry-run"), "Did you mean '2ssp'"),
        (("--preset", "2ssp-papr", "--dry-run"), "Did you mean '2ssp-paper'"),
        (("--sparsities", "x", "--dry-run"), "every-block"),
        (("--option", "window.samples", "--dry-run"), "METHOD.NAME=VALUE"),
        (("--of", "all", "--dry-run"), "blocks, model"),
    ],
)
def test_bad_words_are_refused(where: tuple[object, ...], words: tuple[str, ...], match: str) -> None:
    told = compare(where, *words)
    assert told.code == 3
    assert match in told.err


@pytest.mark.slow
def test_ablate_spreads_over_seeds(where: tuple[object, ...], tmp_path: Path) -> None:
    words = ("--what", "norm,stage1-only", "--sparsities", "0.25", "--seeds", "0,1", "--out", tmp_path / "out")
    told = call("ablate", *where, *QUICK, *words)
    assert told.code == 0, told.err
    assert "| norm | l1 | 2ssp | 0.25 | 2 |" in told.out
    assert (tmp_path / "out/report.html").is_file()
    assert {path.stem for path in (tmp_path / "out/plots").iterdir()} == {
        "ablation-norm-2ssp", "ablation-stage1-only-2ssp"
    }  # fmt: skip
    again = call("ablate", *where, *QUICK, *words, "--json")
    assert len(again.json["rows"]) == 1 + 4
    told = call("ablate", *where, *QUICK, "--what", "norm", "--seeds", "-1", "--dry-run")
    assert (told.code, "--seeds" in told.err) == (3, True)
    told = call("ablate", *where, *QUICK, "--what", "rows-columns", "--dry-run", "--json")
    assert len(told.json["cells"]) == 1 + 4 * 3


def test_ctrl_c_leaves_whole_cells(where: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Source.load

    def interrupted(source: Source) -> Model:
        if (tmp_path / "out/cells/dense").is_dir():
            raise KeyboardInterrupt
        return load(source)

    monkeypatch.setattr(Source, "load", interrupted)
    told = compare(where, "--methods", "2ssp", "--sparsities", "0.25", "--out", tmp_path / "out")
    assert told.code == 130
    assert "the same command goes on" in told.err
    assert [path.name for path in (tmp_path / "out/cells").iterdir()] == ["dense"]


@pytest.mark.slow
def test_a_streamed_model_is_compared_as_one_in_memory(where: tuple[object, ...], tmp_path: Path) -> None:
    tables = []
    for flag in ("--stream", "--no-stream"):
        out = tmp_path / flag
        assert compare(where, "--methods", "2ssp", "--sparsities", "0.25", flag, "--out", out).code == 0
        tables.append([json.loads((out / f"cells/{name}/cell.json").read_text())["perplexity"] for name in
                       ("dense", "2ssp-0.25")])  # fmt: skip
        assert not (out / ".runs").exists()
    assert tables[0] == tables[1]
