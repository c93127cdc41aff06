"""The docs: every page is in the navigation, every method has one, and no figure is behind what was measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablation_folders import CHOICES, make_ablation_folder
from compare_folders import make_compare_folder
from conftest import ROOT, importing
from msgspec import structs

from secateur.grid.ablate import WHATS
from secateur.methods import methods

DOCS = ROOT / "docs"
MEASURED = {page.relative_to(DOCS).as_posix() for page in DOCS.glob("results/*/*.md")}  # tables that compare wrote
PAGES = sorted({page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - MEASURED)
OURS = sorted(name for name, method in methods().items() if method.prune.__module__.startswith("secateur."))
LONG = {"claims.md", "methods/README.md", "results/README.md"}  # for the first two, searches are played through
SECTIONS = ("How it works", "What it costs", "When to use it", "Our figures", "Published figures", "Options")


@pytest.fixture
def docs() -> Iterator[Any]:
    """Imports a module of docs/ by name."""
    with importing(DOCS) as by_name:
        yield by_name


def leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(each)


def text(page: str) -> str:
    """A page's, by its path from docs/."""
    return (DOCS / page).read_text(encoding="utf-8")


def test_the_navigation_has_every_page_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(leaves(nav)) == PAGES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("link", "code"), [("there.md#here", 0), ("nowhere.md", 1), ("there.md#not-here", 1), ("/there.md#here", 1)]
)
def test_a_broken_link_fails_the_build(link: str, code: int, tmp_path: Path) -> None:
    """With the site's own settings; its pages and plugins would only take time."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    own = {
        "nav": ["index.md", "there.md"],
        "plugins": ["search"],
        "docs_dir": "pages",
        "site_dir": "site",
        "hooks": [str(ROOT / hook) for hook in settings["hooks"]],
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**settings, **own}))
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text(f"# Start\n\n[There]({link})\n")
    (tmp_path / "pages" / "there.md").write_text("# There\n\n## Here\n")
    command = [sys.executable, "-m", "mkdocs", "build"]
    built = subprocess.run(command, cwd=tmp_path, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True)
    assert built.returncode == code, built.stderr.decode()


@pytest.mark.parametrize("name", OURS)
def test_every_method_has_a_whole_page(name: str) -> None:
    page = text(f"methods/{name}.md")
    assert [section for section in SECTIONS if f"\n## {section}\n" not in page] == []
    assert re.search(r"\n\$\$\n.+?\n\$\$\n", page, re.DOTALL), "no equation"
    assert f"../images/methods/{name}.svg" in page
    tables = re.findall(r"<!-- table: (\w+) ?(\S*) -->", page)
    assert {("facts", name), ("figures", name), ("ablations", name), ("options", name)} <= set(tables)
    assert {of for _, of in tables} <= {name, ""}, "another method's table"
    assert methods()[name].paper in page


WITH_TABLES = [page for page in [*PAGES, "../README.md"] if "<!-- table: " in text(page)]


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in LONG)) for p in WITH_TABLES])
def test_no_table_is_behind(docs: Any, page: str) -> None:
    assert docs("figures").filled(DOCS / page) == text(page), "renew it by `make figures`"


def test_lists_of_what_there_is_have_all_of_it() -> None:
    solvers = {path.stem for path in (DOCS.parent / "src/secateur/solvers").glob("*.py")} - {"__init__"}
    assert solvers == set(re.findall(r"::: secateur\.solvers\.(\w+)", text("reference/solvers.md")))
    assert set(WHATS) <= set(re.findall(r"`([\w-]+)`", text("comparing.md")))
    assert set(methods()) <= set(re.findall(r"\((\w+)\.md\)", text("methods/README.md")))


def test_the_losses_that_the_package_ships_are_those_of_the_main_table(docs: Any) -> None:
    figures = docs("figures")
    assert figures.MEASURED.read_text(encoding="utf-8") == figures.measured(), "renew it by `make figures`"


def test_a_wrong_figure_does_not_stay(docs: Any, tmp_path: Path) -> None:
    page, good = tmp_path / "x.md", docs("figures").filled(DOCS / "methods" / "2ssp.md")
    cell = json.loads((DOCS / "results/main-table/cells/2ssp-0.25/cell.json").read_text())
    measured = cell["perplexity"]["c4"]["perplexity"]
    assert f"| {measured:.2f} |" in good
    page.write_text(good.replace(f"| {measured:.2f} |", "| 12.34 |"))
    filled = docs("figures").filled(page)
    assert f"| {measured:.2f} |" in filled
    assert "12.34" not in filled


def test_every_method_has_its_own_picture_of_the_size_that_was_measured(docs: Any) -> None:
    drawn = {name: text(f"images/methods/{name}.svg") for name in OURS}
    assert len(set(drawn.values())) == len(OURS)
    for name, (_, cell) in docs("draw").newest().items():
        assert f"{cell.achieved.blocks:.1%}" in drawn[name]


@pytest.mark.slow
def test_the_pictures_are_those_of_the_cells(docs: Any) -> None:
    def words(svg: str) -> list[str]:
        return re.findall(r"<(?:title|text)[^>]*>([^<]*)", svg)

    for name, drawn in docs("draw").drawn():
        assert words(drawn) == words(text(f"images/{name}.svg")), f"{name}: renew it by `make figures`"


def test_what_is_behind_a_fold_is_read_as_markdown() -> None:
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("pymdownx")
    extensions = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["markdown_extensions"]
    named = {name: settings for each in extensions for name, settings in (
        each.items() if isinstance(each, dict) else [(each, {})])}  # fmt: skip
    page = markdown.markdown(text("results/README.md"), extensions=[*named], extension_configs=named)
    whole = page[page.index("how they were made</summary>") :].split("</details>")[0]
    assert whole.count("<tr>") > 30
    assert "<strong>" in whole
    assert "secateur" in whole[whole.index("<pre>") :]


def pages_tables(page: str) -> list[list[list[str]]]:
    """The tables of a page: rows of entries."""
    found: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("| "):
            found[-1].append([entry.strip() for entry in line.strip("| ").split(" | ")])
        elif found[-1] and not line.startswith("|"):
            found.append([])
    return [table for table in found if table]


def test_the_readers_table_comes_before_the_wall() -> None:
    tables = pages_tables(text("results/README.md"))
    first, widths = tables[0], [len(table[0]) for table in tables]
    assert first[0][0] == "method"
    assert first[1][0] == "dense"
    names = (folder.name for folder in (DOCS / "results/main-table/cells").iterdir())
    compared = {name.rpartition("-")[0] for name in names if "-as-" not in name and name != "dense"}
    assert compared == set(OURS)
    assert len(first) - 2 == len(compared)
    assert widths[0] == 4
    assert not any(row[0].startswith("2ssp at the size") for row in first)
    assert first in pages_tables(text("../README.md"))
    assert first in pages_tables(text("claims.md"))


def test_a_comparison_that_is_put_there_is_found(docs: Any, tmp_path: Path) -> None:
    make_compare_folder(tmp_path / "main", windows=2, documents=2)
    figures = docs("figures")
    (results,) = figures.folders("compare", tmp_path)
    found = figures.of_method(results, "shortgpt")
    assert {cell.method for cell in found.cells} == {"dense", "shortgpt", "2ssp"}
    assert all(cell.matched_to for cell in found.cells if cell.method == "2ssp")
    assert len(found.cells) == 1 + 3 + 3
    table = figures.table(found)
    assert all(f"{cell.perplexity['c4'].perplexity:.2f}" in table for cell in found.cells)
    linked = re.findall(r"\(([^)]*)\)", figures.links(found, tmp_path / "x.md"))
    assert linked
    assert all((tmp_path / link).is_file() for link in linked)
    assert "".join(figures.made_by(results)).startswith("```console\n$ secateur compare")


def test_tables_of_an_unfinished_comparison_say_what_is_not_there_yet(
    docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ["2ssp-0.5", "shortgpt-0.5", "2ssp-as-shortgpt-0.5"]
    folder = make_compare_folder(
        tmp_path / "main", methods=("2ssp", "shortgpt"), windows=2, documents=2, change={}, missing=missing
    )
    figures = docs("figures")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    page = folder / "x.md"

    def told(tables: Iterator[str]) -> list[str]:
        return re.findall(r"^Not there yet: (.*)\.$", "\n\n".join(tables), re.MULTILINE)

    assert told(figures.overview("", page)) == [", ".join(missing)]
    assert told(figures.figures("shortgpt", page)) == ["shortgpt-0.5, 2ssp-as-shortgpt-0.5"]
    assert told(figures.figures("2ssp", page)) == ["2ssp-0.5"]


def test_an_ablation_is_no_comparison_and_has_all_its_variants(
    docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = docs("figures")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert list(figures.ablations("2ssp", tmp_path / "x.md")) == ["Not measured yet."]
    make_ablation_folder(tmp_path / "a", choices={key: CHOICES[key] for key in list(CHOICES)[:3]}, windows=2)
    assert list(figures.figures("2ssp", tmp_path / "x.md")) == []
    (results,) = figures.folders("ablate")
    inverted = structs.replace(results.pruned[0], name="inverted", method="2ssp-inverted")
    matched = structs.replace(results.pruned[0], name="matched", matched_to="inverted")
    found = figures.of_method(figures.subset(results, (*results.cells, inverted, matched)), "2ssp")
    assert {cell.method for cell in found.cells} == {"dense", "2ssp", "2ssp-inverted"}
    assert found.cells[-1] is matched
    assert "".join(figures.ablations("slimgpt", tmp_path / "x.md")).count("calibration-size") > 8


def test_the_spread_is_of_the_method_as_it_is_by_precision(
    docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, page = docs("figures"), tmp_path / "x.md"
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert list(figures.spread("", page)) == ["Not measured yet."]
    for name, dtype, of, seeds in (
        ("a", "float32", ("norm", "2ssp"), (0, 1, 2)),
        ("b", "bfloat16", ("repeats", "2ssp"), (0, 1)),
        ("c", "float32", ("norm", "2ssp"), (0,)),  # of one draw there is no spread
    ):
        folder = make_ablation_folder(
            tmp_path / name, choices={of: CHOICES[of]}, sparsities=(0.5,), seeds=seeds, windows=2, tasks=False
        )
        about = json.loads((folder / "compare.json").read_text())
        (folder / "compare.json").write_text(json.dumps(about | {"versions": {"dtype": dtype}}))
    table, words, files = figures.spread("", page)
    rows = [[entry.strip() for entry in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[3] for row in rows] == ["bfloat16", "float32"]
    cells = [figures.read_results(tmp_path / "a").cell(f"norm-l2-0.5-seed{n}") for n in range(3)]
    values = [cell.perplexity["wikitext2"].perplexity for cell in cells]
    assert rows[1][4:7] == [figures.number(value) for value in values]
    assert rows[1][-1] == f"{max(values) / min(values):.2f}" in words
    assert rows[0][6] == ""
    assert all((tmp_path / link).is_file() for link in re.findall(r"\(([^)]*)\)", files))


@pytest.mark.slow
def test_every_picture_of_a_folder_is_drawn_and_shown(
    docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    figures, draw = docs("figures"), docs("draw")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    chosen = {key: CHOICES[key] for key in (("norm", "2ssp"), ("repeats", "2ssp"))}
    make_ablation_folder(tmp_path / "a", choices=chosen, windows=2, tasks=False, texts=("wikitext2",))
    make_compare_folder(tmp_path / "m", methods=("2ssp",), windows=2, documents=2, change={}, only_perplexity=True)
    with draw.styled():
        drawn = {name: draw.to_svg(figure) for name, figure in draw.grids()}
    assert set(drawn) == {"a/ablation-norm-2ssp", "m/perplexity-size"}
    pages = "\n".join([*figures.ablations("2ssp", DOCS / "x.md"), *figures.overview("", DOCS / "x.md")])
    assert set(re.findall(r"\(images/(\S+)\.svg\)", pages)) == set(drawn)
    assert drawn["a/ablation-norm-2ssp"].count("perplexity, wikitext2</text>") == 1  # one panel of the one text


def test_equations_become_mathml(docs: Any) -> None:
    pytest.importorskip("latex2mathml")
    draw = docs("mathml").on_page_content
    inline = draw(r'<p>a <span class="arithmatex">\(x &lt; y\)</span> b</p>')
    assert re.fullmatch(r'<p>a <span class="arithmatex"><math [^>]*display="inline">.*</math></span> b</p>', inline)
    assert "&lt;" in inline or "&#x0003C;" in inline
    block = draw('<div class="arithmatex">\\[\n\\frac{1}{2}\n\\]</div>')
    assert 'display="block"' in block
    assert "<mfrac>" in block
    assert draw("<p>2 $ and 3 $</p>") == "<p>2 $ and 3 $</p>"


@pytest.mark.parametrize("name", OURS)
def test_no_command_of_an_equation_is_left_as_it_is(docs: Any, name: str) -> None:
    pytest.importorskip("latex2mathml")
    convert = docs("mathml").convert
    page = re.sub(r"```.*?```|`[^`]*`", "", text(f"methods/{name}.md"), flags=re.DOTALL)
    equations = re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", page, re.DOTALL)
    assert equations
    for equation in equations:
        drawn = re.sub(r"<[^>]+>", "", convert("".join(equation)))
        assert "\\" not in drawn.replace("&#x0005C;", "\\"), equation
