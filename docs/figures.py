"""Fill the tables of the pages from what was measured and from the methods themselves (`make figures`).

A page says where a table belongs and which it is:

    <!-- table: figures 2ssp -->
    ...
    <!-- end -->

What stands between the two is replaced. `options NAME` and `facts NAME` come from the method's registration;
`figures NAME`, `overview`, `ablations NAME` and the tables of slimgpt_tables.py from the JSON files under docs/results,
each of which is linked. A folder there was written by `secateur compare` or `secateur ablate`, or holds the cells of
bench/slimgpt.py.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os.path import relpath
from pathlib import Path
from typing import Any

import torch
from slimgpt_tables import SLIMGPT
from transformers import AutoModelForCausalLM, LlamaConfig

from secateur.forecast import Forwards
from secateur.grid.ablation_table import NAME as ABLATION_TABLE
from secateur.grid.ablation_table import ablation_table
from secateur.grid.main_table import DIFFERENCES, main_table
from secateur.grid.raw import RawFolder
from secateur.grid.render import Column, Table, markdown
from secateur.methods import Method, get_method, methods
from secateur.model.handle import Model
from secateur.pruning import Request, plan
from secateur.report.html import on_lines
from secateur.report.results import CELL, CELLS, INDEX
from secateur.report.results_before import commands_of

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
SPARSITIES = (0.25, 0.375, 0.5)
_MARKED = re.compile(r"(<!-- table: (\w+) ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo_model() -> Model:
    """SmolLM2-135M's shapes, without weights."""
    config = LlamaConfig(
        num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        return Model(AutoModelForCausalLM.from_config(config), source={"name": "SmolLM2-135M-Instruct"})


@dataclass(frozen=True)
class Grid:
    """Cells that may be compared with each other: one model, one judgement.

    Attributes:
        kind: "compare" or "ablate".
        cells: as `secateur compare` writes them, by name.
        files: the file that each was read from.
        missing: names of the cells that the folder's index has and that are not there yet.
        commands: that made the folder, without `secateur`.
    """

    kind: str
    folder: Path
    cells: dict[str, dict[str, Any]]
    files: dict[str, Path]
    missing: list[str] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)

    def of(self, method: str) -> dict[str, dict[str, Any]]:
        """The dense cell, the method's or its ablations', and 2SSP's at the sizes that these really have; nothing if
        the method is not there."""
        names = {name for name, cell in self.cells.items() if _whose(cell) == method and not cell["matched_to"]}
        if not names:
            return {}
        return {
            name: cell
            for name, cell in self.cells.items()
            if name in names or cell["method"] == "dense" or cell["matched_to"] in names
        }

    def missing_of(self, method: str) -> list[str]:
        """The method's own, and 2SSP's at their sizes, by the names that `secateur compare` gives them."""
        return [name for name in self.missing if re.fullmatch(rf"(2ssp-as-)?{re.escape(method)}-[\d.e-]+", name)]

    def table(self, cells: Mapping[str, Mapping[str, Any]], missing: Iterable[str] = ()) -> str:
        """A table of some cells, which says what else belongs there and is not there yet."""
        if self.kind == "compare":
            return markdown(main_table(cells, {"cells": [*cells, *missing]})).strip()
        return markdown(ablation_table(cells)).strip()

    def links(self, cells: Iterable[str], page: Path) -> str:
        """To the cells, and to what tells them apart; of an ablation, which has a cell per seed, to the table: they lie
        beside it."""
        files = {name: self.files[name] for name in cells}
        if (told := self.folder / DIFFERENCES).is_file():
            files["differences, with intervals"] = told
        if self.kind == "ablate":
            files = {"table": self.folder / f"{ABLATION_TABLE}.json", "settings": self.folder / INDEX}
        return f"Files: {', '.join(f'[{name}]({relpath(file, page.parent)})' for name, file in files.items())}."


def _whose(cell: Mapping[str, Any]) -> str:
    """The method that a cell tells of: that of an ablation may be tried in a variant that is no method."""
    return str((cell.get("ablation") or {}).get("of") or cell["method"])


def grids(results: Path = RESULTS) -> list[Grid]:
    """All comparisons and ablations under a folder, by name."""
    found = []
    for file in sorted(results.glob(f"*/{INDEX}")):
        written = RawFolder(file.parent)
        index = written.index() or {}
        cells = written.cells(index["cells"])
        files = {name: file.parent / CELLS / name / CELL for name in cells}
        missing = [name for name in index["cells"] if name not in cells]
        found.append(Grid(index.get("kind", "compare"), file.parent, cells, files, missing, commands_of(index)))
    return found


def settings(method: Method, cells: Iterable[Mapping[str, Any]]) -> str:
    """In words, the calibration and the options of a method's cells, as far as they are not its defaults."""
    told = []
    for cell in cells:
        if cell["method"] != method.name or cell["matched_to"]:
            continue
        used = cell["calibration"]
        windows = f"{used['samples']:,} windows of {used['length']:,} tokens of {used['name']}"
        if (used["samples"], used["length"]) != (method.samples, method.length):
            windows += f" (by default {method.samples:,} of {method.length:,})"
        own = [
            f"`{name}={value}`"
            for name, value in cell["options"].items()
            if name in method.options and value != method.options[name].default
        ]
        told.append(f"Calibrated on {windows}; {', '.join(own) or 'all options at their defaults'}.")
    return " ".join(dict.fromkeys(told))


def figures(name: str, page: Path) -> Iterator[str]:
    """What was measured of a method, a table per comparison that has it."""
    for grid in grids():
        if grid.kind == "compare" and (cells := grid.of(name)):
            yield f"**{_title(grid)}.** {settings(get_method(name), cells.values())}"
            yield grid.table(cells, grid.missing_of(name))
            yield grid.links(cells, page)


def ablations(name: str, page: Path) -> Iterator[str]:
    """A method's ablations."""
    found = [(grid, cells) for grid in grids() if grid.kind == "ablate" and (cells := grid.of(name))]
    for grid, cells in found:
        yield f"**{_title(grid)}**"
        yield grid.table(cells)
        yield grid.links(cells, page)
        yield from made_by(grid)
    if not found:
        yield "Not measured yet."


def overview(_: str, page: Path) -> Iterator[str]:
    """Everything that was compared, a table per comparison."""
    for grid in grids():
        if grid.kind == "compare":
            report = grid.folder / "report.html"
            yield f"**{_title(grid)}**" + (f" [The report]({relpath(report, page.parent)})" if report.is_file() else "")
            yield grid.table(grid.cells, grid.missing)
            said = {name: settings(method, grid.cells.values()) for name, method in methods().items()}
            yield "\n".join(f"- {name}: {words}" for name, words in said.items() if words)
            yield grid.links(grid.cells, page)
            yield from made_by(grid)


def perplexities(name: str, page: Path) -> Iterator[str]:
    """A comparison's perplexities on all texts, in short: a row per method, a column per sparsity."""
    grid = next(grid for grid in grids() if grid.folder.name == name)
    done = [cell for cell in grid.cells.values() if cell["status"] == "done" and not cell["matched_to"]]
    asked = sorted({cell["sparsity"] for cell in done if cell["sparsity"]})
    rows: dict[str, dict[str, Any]] = {}
    for cell in done:
        told = " / ".join(f"{each['perplexity']:.1f}" for each in cell["perplexity"].values())
        for sparsity in [cell["sparsity"]] if cell["sparsity"] else asked:
            rows.setdefault(cell["label"], {"method": cell["label"]})[str(sparsity)] = told
    columns = [Column("method", "method"), *(Column(str(each), f"{each:.1%}") for each in asked)]
    yield markdown(Table(columns, list(rows.values()))).strip()
    whole = relpath(RESULTS / "README.md", page.parent)
    yield f"Texts: {', '.join(done[0]['perplexity'])}. [The whole table]({whole})."


def made_by(grid: Grid) -> Iterator[str]:
    """The commands that made a folder; their paths are named by their last part only."""
    if grid.commands:
        yield "```console\n" + "\n".join(f"$ {on_lines(words)}" for words in grid.commands) + "\n```"


def _title(grid: Grid) -> str:
    kinds = {"compare": "Comparison", "ablate": "Ablation"}
    return f"{kinds[grid.kind]} (`docs/results/{grid.folder.name}`)"


def foretold(_: str, __: Path) -> Iterator[str]:
    """Full-length forwards that each method takes on the demo model with its defaults; arithmetic, nothing is run."""
    model = demo_model()
    rows = []
    for name, method in methods().items():
        row = {"method": name, "calibration": f"{method.samples:,} x {method.length:,}"}
        for sparsity in SPARSITIES:
            work = Forwards.of(plan(Request(method=name, sparsity=sparsity), model), model.head_cost)
            row[str(sparsity)] = f"{work.forwards:,.0f} ({work.forwards_asked:,.0f})"
        rows.append(row)
    columns = [Column("method", "method"), Column("calibration", "calibration by default")]
    yield markdown(Table([*columns, *(Column(str(s), f"{s:.1%}") for s in SPARSITIES)], rows)).strip()


def options(name: str, _: Path) -> Iterator[str]:
    """A method's options, as `secateur prune --help` has them."""
    rows = [
        {"flag": f"`--{each.name.replace('_', '-')}`", "default": f"`{each.default_in_words}`", "help": each.help}
        for each in get_method(name).options.values()
    ]
    columns = [Column("flag", "option"), Column("default", "default"), Column("help", "")]
    yield markdown(Table(columns, rows)).strip()


def facts(name: str, _: Path) -> Iterator[str]:
    """What a method is, in five lines."""
    method = get_method(name)
    told = {
        "removes": method.unit,
        "paper": f"<{method.paper}>",
        "calibration by default": f"{method.samples:,} window{'s' * (method.samples > 1)} of {method.length:,} tokens",
        "costs": method.needs,
        "edits": ", ".join(f"`{edit.__name__}`" for edit in method.edits),
    }
    yield "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in told.items())])


TABLES: dict[str, Callable[[str, Path], Iterator[str]]] = {
    table.__name__: table for table in (figures, overview, perplexities, ablations, foretold, options, facts, *SLIMGPT)
}


def filled(page: Path) -> str:
    """A page's text with its tables as they should be."""

    def table(found: re.Match[str]) -> str:
        start, kind, name, end = found.groups()
        return f"{start}\n" + "\n\n".join(TABLES[kind](name, page)) + f"\n\n{end}"

    return _MARKED.sub(table, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for each in sorted(DOCS.rglob("*.md")):
        each.write_text(filled(each), encoding="utf-8")
