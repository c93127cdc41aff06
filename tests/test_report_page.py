"""The page and its pictures hold everything, escape everything, and show what the folder says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from compare_folders import BLOCKS, make_compare_folder
from test_cli import call

from secateur.errors import MissingExtraError
from secateur.judge.inference import TENSORS
from secateur.report.blocks import lanes, picture
from secateur.report.drawing import for_page, save
from secateur.report.figures import comparison_figures
from secateur.report.looks import looks, number
from secateur.report.main_table import main_table
from secateur.report.page import render, write_report
from secateur.report.results import Shape, read_results
from secateur.report.verdict import verdict

EVIL = """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">"""
ONE: dict[str, Any] = {"methods": ("2ssp",), "sparsities": (0.25,), "texts": ("c4",), "change": {}}


class Elements(HTMLParser):
    """All elements with their attributes, and the scripts' texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.ended = True
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.ended = False

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and not self.ended:
            place = len(self.found) - 1
            self.texts[place] = self.texts.get(place, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.ended = True

    def scripts(self) -> list[str]:
        return [self.texts[place] for place, (tag, _) in enumerate(self.found) if tag == "script"]


def page(folder: Path) -> str:
    """Without its pictures, which take time."""
    results = read_results(folder)
    return render(results, verdict(results), {})


def change_cell(folder: Path, cell: str, /, **values: Any) -> None:
    file = folder / "cells" / cell / "cell.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def read_cell(folder: Path, name: str) -> Any:
    return json.loads((folder / "cells" / name / "cell.json").read_text())


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A whole page, with its pictures."""
    folder = make_compare_folder(
        tmp_path_factory.mktemp("compare"), methods=("2ssp", "shortgpt"), sparsities=(0.25,), windows=5, documents=9
    )
    write_report(folder)
    return (folder / "report.html").read_text()


def evil_folder(folder: Path) -> Path:
    """Every name and text that a model or a user can choose."""
    sample = {"prompt": EVIL, "text": EVIL, "settings": {EVIL: EVIL}}
    change: dict[str, dict[str, Any]] = {
        "2ssp-0.25": {"label": EVIL, "generation": {"samples": [sample], "figures": {}}, "notes": {"reduced": EVIL}},
        "slimgpt-0.25": {"status": "failed", "error": EVIL},
        "evil-0.25": {"method": EVIL, "options": {EVIL: EVIL}},
    }
    make_compare_folder(
        folder, methods=("2ssp", "slimgpt", "evil"), sparsities=(0.25,), texts=("c4", EVIL), name=EVIL, change=change
    )
    about = json.loads((folder / "compare.json").read_text())
    about |= {"machine": EVIL, "versions": {EVIL: EVIL}, "settings": {EVIL: EVIL}, "arguments": {"command": [EVIL]}}
    (folder / "compare.json").write_text(json.dumps(about))
    return folder


# --- what it may do ---


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    for tag, attributes in Elements(html).found:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert len(style := re.findall("<style>(.*?)</style>", html, re.DOTALL)) == 1
    assert not re.search(r"url\(|@import", style[0])
    assert len(html) < 500_000


def test_the_policy_allows_our_script_and_no_address(html: str) -> None:
    elements = Elements(html)
    policy = next(a["content"] or "" for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = elements.scripts()
    allowed = re.findall("'sha256-([^']+)'", policy)
    assert allowed == [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "unsafe-eval" not in policy


@pytest.mark.slow
def test_what_models_and_users_write_stays_text(tmp_path: Path) -> None:
    write_report(evil_folder(tmp_path))
    html = (tmp_path / "report.html").read_text()
    elements = Elements(html)
    assert len(elements.scripts()) == 1
    assert not [tag for tag, attributes in elements.found if tag == "img" or "onerror" in attributes]
    assert html.count("&lt;img src=x onerror=") > 10  # it is shown
    for svg in (tmp_path / "plots").glob("*.svg"):
        ET.parse(svg)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_compare_folder(tmp_path, **ONE)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"secateur\[report\]"):
        write_report(folder)
    assert not (folder / "report.html").exists()


# --- what it shows ---


@pytest.mark.slow
def test_the_page_prints_the_tables_numbers_and_the_same_ones_bold(tmp_path: Path) -> None:
    results = read_results(make_compare_folder(tmp_path, missing=["window-0.5"]))
    table, html = main_table(results), page(tmp_path)
    shown = html.split('<table class="main">')[1].split("<tbody>")[1].split("</tbody>")[0].split("<tr")[1:]
    assert len(shown) == len(results.cells)
    by_cell = dict(zip([cell.name for cell in results.cells], shown, strict=True))
    place = [column.key for column in table.on_page("main")].index("perplexity:c4")
    for number_, row in enumerate(table.rows):
        cell = results.cell(str(row["name"]))
        if cell is not None and cell.done:
            entry = re.findall(r'<td class="([^"]*)" data-sort="[^"]*">([^<]*)', by_cell[cell.name])[1 + place]
            assert entry[1] == f"{results.perplexity(cell, 'c4'):.2f}"
            assert ("best" in entry[0]) == (number_ in table.bold["perplexity:c4"])
    assert "failed: NumericalError: block 7 gave NaN &lt;after rotation&gt;" in by_cell["slicegpt-0.5"]
    assert "not there yet: running, or still to come" in by_cell["window-0.5"]
    assert 'title="acc; in no average' in html  # winogrande, which is grey


def test_nothing_is_guessed_of_a_cell_that_is_not_there_yet(tmp_path: Path) -> None:
    """Its name alone would make a method of "2ssp-as-shortgpt"."""
    names = ["2ssp-as-shortgpt-0.25", "window-0.25"]
    methods = ("2ssp", "shortgpt", "window")
    folder = make_compare_folder(tmp_path, methods=methods, sparsities=(0.25,), change={}, missing=names)
    (folder / "cells" / "slicegpt-0.9").mkdir()  # a folder that compare.json does not name
    (folder / "cells" / "slicegpt-0.9" / "cell.json").write_text(json.dumps({"method": "slicegpt", "sparsity": 0.9}))
    results, html = read_results(folder), page(folder)
    assert (results.methods, results.sparsities) == (["2ssp", "shortgpt"], [0.25])
    assert [cell.name for cell in results.missing] == names
    assert "slicegpt" not in html.lower()
    assert re.findall(r'<button[^>]*data-of="method" value="([^"]*)"', html) == ["2ssp", "shortgpt"]
    assert not re.findall('data-method="(|window)"', html)


def test_without_an_interval_a_question_mark_stands_by_all_but_the_best_number(tmp_path: Path) -> None:
    methods = ("2ssp", "slicegpt", "window")
    folder = make_compare_folder(tmp_path, methods=methods, sparsities=(0.25,), texts=("c4", "demo"), change={})
    found = read_cell(folder, "window-0.25")["perplexity"]
    change_cell(folder, "window-0.25", perplexity={**found, "c4": {**found["c4"], "window_nll": []}})
    table = main_table(read_results(folder))
    names = [row["name"] for row in table.rows]
    marks = {kind: {key: [names[n] for n in places] for key, places in marked.items()}
             for kind, marked in (("bold", table.bold), ("unsure", table.unsure))}  # fmt: skip
    assert marks["bold"]["perplexity:c4"] == marks["bold"]["perplexity:demo"] == ["2ssp-0.25"]
    assert (marks["unsure"]["perplexity:c4"], marks["unsure"]["perplexity:demo"]) == (["window-0.25"], [])
    assert page(folder).count('class="unsure"') == 1


def small(html: str, section: str) -> tuple[list[str], dict[str, list[str]]]:
    """A small table's headings, and its rows by their title."""
    table = re.search(rf'<section id="{section}">.*?<table class="small figures">(.*?)</table>', html, re.DOTALL)
    assert table is not None
    head, *body = table[1].split("<tr")[1:]

    def plain(words: str) -> str:
        return " ".join(re.sub(r"<[^>]+>|[^\w\s×,.%–]", "", words).replace("\u00a0", " ").split())

    titles = re.findall("<th[^>]*>(.*?)</th>", head)[1:]
    rows = [(re.findall("<th[^>]*>(.*?)</th>", row)[0], re.findall("<td[^>]*>(.*?)</td>", row)) for row in body]
    return titles, {plain(title): [plain(entry) for entry in entries] for title, entries in rows}


def test_what_running_takes_and_what_was_generated_stand_in_small_tables(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **{**ONE, "methods": ("2ssp", "shortgpt")})
    cell = read_cell(folder, "2ssp-0.25")
    cell["inference"]["pruned"] |= {
        "kv_bytes_per_token": 19_984, "peak_memory_bytes": 123_000_000, "throughput_tokens_s_rounds": [13.0, 26, 52],
    }  # fmt: skip
    cell["inference"]["dense"]["throughput_tokens_s_rounds"] = [10.0, 20, 20]
    cell["generation"]["figures"] = {"greedy_agreement": 0.42, "distinct_2": 0.9, "common_prefix_tokens": 4.5}
    change_cell(folder, "2ssp-0.25", **cell)
    headings, rows = small(page(folder), "running")
    found = dict(zip(headings, rows["2SSP 25 %"], strict=True))
    assert found == {
        "KV cache, bytes per token": "20.0 kB", "throughput, × dense": "1.30×",
        "peak memory": "123 MB",
    }  # fmt: skip
    assert set(rows) == {"Dense", "2SSP 25 %", "ShortGPT 25 %", "2SSP at the size of ShortGPT 25 %"}
    headings, rows = small(page(folder), "samples")
    assert dict(zip(headings, rows["2SSP 25 %"], strict=True)) == {
        "agreement with dense, greedy text": "42 %", "tokens before it differs, greedy text": "4.50",
        "distinct tokens, greedy text": "–", "distinct pairs, greedy text": "90 %",
        "distinct triples, greedy text": "–", "ended by itself, greedy text": "–",
    }  # fmt: skip


def test_a_cpus_peak_memory_is_not_on_the_page_and_unmeasured_rows_are_not_there(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **{**ONE, "sparsities": (0.25, 0.5)})
    for name in ("dense", "2ssp-0.25", "2ssp-0.5"):
        cell = read_cell(folder, name)
        cell["inference"]["pruned"]["peak_memory_by"] = TENSORS
        change_cell(folder, name, **cell)
    change_cell(folder, "2ssp-0.5", status="failed", generation=None)
    for section in ("running", "samples"):
        headings, rows = small(page(folder), section)
        assert "peak memory" not in headings
        assert set(rows) == {"Dense", "2SSP 25 %"}


def test_sections_without_data_are_not_there(tmp_path: Path) -> None:
    html = page(make_compare_folder(tmp_path, only_perplexity=True, **{**ONE, "methods": ("shortgpt",)}))
    assert re.findall('<section id="([^"]*)"', html) == ["verdict", "table", "plots", "reproduce"]


def test_a_bare_folder_makes_a_page_too(tmp_path: Path) -> None:
    about = {"schema": 1, "model": {"name": "m"}, "cells": ["dense", "2ssp-0.25"]}
    (tmp_path / "compare.json").write_text(json.dumps(about))
    html = page(tmp_path)
    assert "No verdict" in html
    assert html.count("not there yet: running, or still to come") == 2
    assert save(comparison_figures(read_results(tmp_path)), tmp_path / "plots") == {}


def test_all_commands_are_given_and_the_machine_of_a_cell_that_was_made_on_another(tmp_path: Path) -> None:
    change = {"2ssp-0.25": {"machine": "a borrowed one", "versions": {"torch": "9.9"}}}
    folder = make_compare_folder(tmp_path, **{**ONE, "change": change})
    about = json.loads((folder / "compare.json").read_text())
    about["commands"] = [["compare", "my model", "--sparsities", "0.25,0.5", "--out", "x y"], ["compare", "m"]]
    (folder / "compare.json").write_text(json.dumps(about))
    html = page(folder)
    one, other = (code.replace("&#39;", "'") for code in re.findall("<pre><code>(.*?)</code>", html, re.DOTALL))
    assert one.split(" \\\n  ") == ["secateur compare 'my model'", "--sparsities 0.25,0.5", "--out 'x y'"]
    assert other == "secateur compare m"
    assert html.count("<dt>machine</dt>") == 2
    assert "<dd>a borrowed one</dd>" in html
    assert "<dd>9.9</dd>" in html


# --- pictures ---


@pytest.mark.slow
def test_pictures_are_files_and_the_page_holds_them_in_its_own_colours(tmp_path: Path) -> None:
    folder = make_compare_folder(
        tmp_path, methods=("2ssp", "shortgpt", "evopress"), sparsities=(0.25, 0.5), texts=("c4", "demo"), change={}
    )
    results = read_results(folder)
    svgs = save(comparison_figures(results), tmp_path / "plots")
    names = {"perplexity-size", "perplexity-time", "accuracy-size", "search-curve", "inference", "removed"}
    assert set(svgs) == names
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{n}.{k}" for n in names for k in ("png", "svg")}
    for name, svg in svgs.items():
        assert (tmp_path / "plots" / f"{name}.svg").read_text() == svg
        assert (tmp_path / "plots" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        ET.fromstring(inlined := for_page(svg, "<a & b>"))
        assert "var(--ink)" in inlined
        assert not re.search("#30343b|<style|xml version", inlined)
    for name in ("perplexity-size", "perplexity-time"):
        for words in ("all texts", "c4", "demo", "perplexity over dense", "perplexity"):
            assert f">{words}</text>" in svgs[name], words
        assert all(look.colour.lower() in svgs[name].lower() for look in looks(results.methods).values())
    for cell in results.of_size(0.25):  # every point says its number, by method and size
        value = number(results.perplexity(cell, "c4"))
        points = re.findall(rf'data-method="{cell.method}" data-size="0.25"><title>([^<]*)', svgs["perplexity-size"])
        assert len(points) == 3 + 3 * (cell.method == "2ssp")  # its match's too
        assert any(f": {value} (95 %" in point for point in points)
    assert ">EvoPress, 25\u00a0%</text>" in svgs["search-curve"]


def test_infinite_perplexities_are_left_out_of_pictures(tmp_path: Path) -> None:
    bad = {"perplexity": None, "nll": 800.0, "nll_stderr": None, "samples": 20, "length": 2048, "predictions": 40940}
    change = {"2ssp-0.25": {"perplexity": {"c4": bad}}}
    results = read_results(make_compare_folder(tmp_path, only_perplexity=True, **{**ONE, "change": change}))
    assert [name for name, _ in comparison_figures(results)] == ["removed"]


def shape(block: int, kv_heads: int, width: int) -> Shape:
    return Shape(block=block, width=width, kv_heads=kv_heads, query_heads=0, attention=kv_heads > 0, mlp=width > 0)


def test_the_picture_of_blocks_shows_each_blocks_share() -> None:
    dense = [shape(n, 4, 100) for n in range(3)]
    attention, ffn = lanes([shape(0, 1, 25), shape(1, 0, 0)], dense)  # block 2 is gone
    assert attention.kept == [0.25, 0, 0]
    assert ffn.kept == [0.25, 0, 0]
    told = [element.text for element in ET.fromstring(picture("<&>", [attention, ffn])).iter()
            if element.tag.endswith("}title") and (element.text or "").startswith("block")]  # fmt: skip
    assert told[:2] == ["block 0: 1 of 4 KV heads", "block 1: 0 of 4 KV heads"]
    assert told[3:] == [f"block {n}: {width} of 100 FFN neurons" for n, width in enumerate((25, 0, 0))]


def test_a_narrower_stream_gets_a_lane_of_its_own(tmp_path: Path) -> None:
    results = read_results(make_compare_folder(tmp_path, methods=("2ssp", "slicegpt"), change={}))
    dense, hidden = (results.dense.shape if results.dense else None) or [], results.index.model.hidden_size
    found = {cell.method: lanes(cell.shape or [], dense, hidden) for cell in results.pictured}
    assert [lane.name for lane in found["2ssp"]] == ["attention", "FFN"]
    stream = found["slicegpt"][-1]
    assert stream.name == "stream"
    assert len(stream.kept) == BLOCKS
    assert all(share == pytest.approx(0.5, abs=0.01) for share in stream.kept)


def test_the_readmes_picture_is_drawn_from_a_record() -> None:
    draw = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "draw_blocks.py"))["draw"]
    record = {
        "before": {"blocks": 3, "kv_heads": 6, "attentions": 3, "neurons": 300, "mlps": 3},
        "edits": [{"edit": "KeepNeurons", "block": 0, "index": list(range(40))}, {"edit": "DropAttention", "block": 2}],
        "sparsity": {"achieved": {"blocks": 0.25}}, "model": {"name": "<m>"}, "method": "2ssp",
    }  # fmt: skip
    svg = draw(record)
    assert "block 2: 0 of 2 KV heads" in svg
    assert "block 0: 40 of 100 FFN neurons" in svg


# --- the command ---


@pytest.mark.slow
def test_the_command_makes_the_page_and_says_the_verdict(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path / "x", **ONE)
    told = call("report", folder)
    assert told.code == 0
    assert told.out.startswith("Best by perplexity: 2SSP at 25")
    assert (folder / "plots" / "perplexity-size.png").is_file()
    first = (folder / "report.html").read_text()
    assert call("report", folder).code == 0
    assert (folder / "report.html").read_text() == first


def test_the_command_refuses_what_is_no_compare_folder(tmp_path: Path) -> None:
    told = call("report", tmp_path)
    assert told.code == 3
    assert "no compare folder" in told.err
    assert list(tmp_path.iterdir()) == []
