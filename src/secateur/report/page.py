"""The report: one HTML page that holds everything it needs, and asks no network for anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import OutputError
from secateur.folders import write_file
from secateur.report.ablated_page import ablation_figures, render_ablation
from secateur.report.ablated_plots import save_ablation_plots
from secateur.report.ablated_words import AblationVerdict, ablation_verdict
from secateur.report.blocks import lanes, picture
from secateur.report.figures import figures
from secateur.report.html import in_words, make_html
from secateur.report.looks import looks
from secateur.report.plots import save_plots
from secateur.report.results import ABLATE
from secateur.report.results_before import CellResult, Results, read_results
from secateur.report.table import PageColumn, PageRow, columns, generated, rows, running
from secateur.report.verdict import Verdict, verdict

PAGE, PLOTS = "report.html", "plots"


def write_report(folder: Path) -> Verdict | AblationVerdict:
    """Make report.html and plots/ in the folder of a comparison or an ablation, anew where they are there already.

    Returns:
        What the page says in words.

    Raises:
        DataError: no compare folder, or a damaged one.
        MissingExtraError: the extra `report` is not installed.
        OutputError: the folder cannot be written.
    """
    results = read_results(folder)
    said: Verdict | AblationVerdict
    if results.kind == ABLATE:
        said, drawn, save = ablation_verdict(results), ablation_figures(results), save_ablation_plots
        html = render_ablation(results, said, drawn)
    else:
        said, drawn, save = verdict(results), figures(results), save_plots
        html = render(results, said, drawn)
    try:
        save(results, drawn, folder / PLOTS)
        write_file(folder / PAGE, html)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    return said


def render(results: Results, said: Verdict, drawn: Mapping[str, Any]) -> str:
    """The HTML of a comparison's page.

    Raises:
        MissingExtraError: the extra `report` is not installed.
    """
    wanted = columns(results)
    return make_html(
        "page.html", "page.js", results, drawn, verdict=said, columns=wanted, rows=rows(results, wanted),
        running=_measured(results, running(results)), generated=_measured(results, generated(results)),
        removed=list(_removed(results)), samples=_samples(results),
    )  # fmt: skip


def _measured(results: Results, wanted: list[PageColumn]) -> tuple[list[PageColumn], list[PageRow]]:
    """A table's columns, and its rows but for those of which nothing was measured."""
    found = rows(results, wanted)
    return wanted, [row for row in found if any(entry.sort is not None for entry in row.entries)]


def _removed(results: Results) -> Iterator[tuple[CellResult, str]]:
    """A picture per cell, in its method's colour."""
    for cell in results.pictured:
        rows = lanes(cell.data["shape"], results.dense_shape, results.hidden_size)
        yield cell, picture(rows, title=cell.name, colour=looks([cell.method])[cell.method].colour, compact=True)


def _samples(results: Results) -> list[dict[str, Any]]:
    """By prompt and settings: each cell's text, dense first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in (each for each in results.cells if not each.matched_to):
        for sample in cell.section("generation").get("samples") or []:
            prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
            key = (prompt, in_words(sample.get("settings") or "greedy"))
            found.setdefault(key, []).append({"cell": cell, "text": text.removeprefix(prompt).strip()})
    return [{"prompt": p, "settings": s, "texts": texts} for (p, s), texts in found.items()]
