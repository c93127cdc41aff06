"""The page holds everything, escapes everything, and shows what the folder says."""

from __future__ import annotations

import base64
import gzip
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

from secateur.errors import DataError, MissingExtraError
from secateur.judge.memory import TENSORS
from secateur.report.blocks import lanes, picture
from secateur.report.figures import ALL, figures
from secateur.report.page import render, write_report
from secateur.report.plots import save_plots
from secateur.report.results_before import read_results
from secateur.report.table import columns, rows
from secateur.report.verdict import verdict

EVIL = """</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">"""


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
    results = read_results(folder)
    return render(results, verdict(results), figures(results))


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(make_compare_folder(tmp_path_factory.mktemp("compare")))


def evil_folder(folder: Path) -> Path:
    """Every name and text that a model or a user can choose."""
    sample = {"prompt": EVIL, "text": EVIL, "settings": {EVIL: EVIL}}
    change: dict[str, dict[str, Any]] = {
        "2ssp-0.25": {"label": EVIL, "generation": {"samples": [sample], "figures": {}}, "notes": {"reduced": EVIL}},
        "slimgpt-0.25": {"status": "failed", "error": EVIL},
        f"{'evil'}-0.25": {"method": EVIL, "options": {EVIL: EVIL}},
    }
    make_compare_folder(
        folder, methods=("2ssp", "slimgpt", "evil"), sparsities=(0.25,), texts=("c4", EVIL), name=EVIL, change=change
    )
    about = json.loads((folder / "compare.json").read_text())
    about |= {"machine": EVIL, "versions": {EVIL: EVIL}, "settings": {EVIL: EVIL}, "arguments": {"command": [EVIL]}}
    (folder / "compare.json").write_text(json.dumps(about))
    return folder


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    for tag, attributes in Elements(html).found:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import", style[1])


def test_the_policy_allows_our_two_scripts_and_no_address(html: str) -> None:
    elements = Elements(html)
    policy = next(a["content"] or "" for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    packed, script = elements.scripts()[1:]
    plotly = gzip.decompress(base64.b64decode(packed))
    allowed = re.findall("'sha256-([^']+)'", policy)
    assert allowed == [base64.b64encode(hashlib.sha256(s).digest()).decode() for s in (script.encode(), plotly)]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert b"plotly.js v" in plotly[:300]
    assert b"MIT" in plotly[:300]  # its licence's notice stays with it


def test_a_page_of_moderate_size(html: str) -> None:
    assert len(html) < 3_000_000


def test_what_models_and_users_write_stays_text(tmp_path: Path) -> None:
    html = page(evil_folder(tmp_path))
    elements = Elements(html)
    assert len(elements.scripts()) == 3
    assert not [tag for tag, attributes in elements.found if tag == "img" or "onerror" in attributes]
    assert html.count("&lt;img src=x onerror=") > 10  # it is shown
    data = json.loads(elements.scripts()[0])
    assert EVIL in data["texts"]


def test_the_table_has_every_cell_and_bold_is_level_with_the_best(tmp_path: Path) -> None:
    results = read_results(make_compare_folder(tmp_path, missing=["window-0.5"]))
    wanted = columns(results)
    table = rows(results, wanted)
    assert [row.cell.name for row in table] == results.about["cells"]
    place = next(n for n, column in enumerate(wanted) if column.text == "c4")
    for sparsity in results.sparsities:
        ours = [row.entries[place] for row in table if row.cell.sparsity == sparsity]
        known = [entry for entry in ours if entry.sort is not None]
        assert min(known, key=lambda entry: entry.sort or 0).best
        assert not any(entry.unsure for entry in known)
    assert not any(entry.best for row in table if row.cell.matched_to for entry in row.entries)
    assert next(column for column in wanted if column.heading == "winogrande").grey


@pytest.mark.slow
def test_failed_and_missing_cells_stand_in_the_table_with_the_reason(tmp_path: Path) -> None:
    html = page(make_compare_folder(tmp_path, missing=["window-0.5"]))
    assert "failed: NumericalError: block 7 gave NaN &lt;after rotation&gt;" in html
    assert html.count("not there yet: running, or still to come") == 1


def test_nothing_is_guessed_of_a_cell_that_is_not_there_yet(tmp_path: Path) -> None:
    """Its name alone would make a method of "2ssp-as-shortgpt"."""
    names = ["2ssp-as-shortgpt-0.25", "window-0.25"]
    methods = ("2ssp", "shortgpt", "window")
    folder = make_compare_folder(tmp_path, methods=methods, sparsities=(0.25,), change={}, missing=names)
    (folder / "cells" / "slicegpt-0.9").mkdir()  # a folder that compare.json does not name
    (folder / "cells" / "slicegpt-0.9" / "cell.json").write_text(json.dumps({"method": "slicegpt", "sparsity": 0.9}))
    results = read_results(folder)
    assert (results.methods, results.sparsities) == (["2ssp", "shortgpt"], [0.25])
    assert [cell.name for cell in results.missing] == names
    assert {cell["name"] for cell in figures(results)["cells"]} == {"2ssp-0.25", "shortgpt-0.25"}
    table = {row.cell.name: row for row in rows(results, columns(results))}
    assert list(table) == results.about["cells"]
    for name in names:
        assert (table[name].title, table[name].size) == (name, None)
        assert {entry.sort for entry in table[name].entries} == {None}
    html = page(folder)
    assert "slicegpt" not in html.split('id="figures"')[0].lower()
    assert re.findall(r'<button[^>]*data-method="([^"]*)"', html) == ["2ssp", "shortgpt"]
    assert not re.findall('data-method="(|window)"', html)


def test_a_file_that_names_no_method_is_damaged(tmp_path: Path) -> None:
    folder = make_compare_folder(
        tmp_path, methods=("2ssp",), sparsities=(0.25,), change={"2ssp-0.25": {"method": None}}
    )
    with pytest.raises(DataError, match="must name its `method`"):
        read_results(folder)


def test_without_an_interval_a_question_mark_stands_by_all_but_the_best_number(tmp_path: Path) -> None:
    methods = ("2ssp", "slicegpt", "window")
    folder = make_compare_folder(tmp_path, methods=methods, sparsities=(0.25,), texts=("c4", "demo"), change={})
    file = folder / "cells" / "window-0.25" / "cell.json"
    cell = json.loads(file.read_text())
    cell["perplexity"]["c4"]["window_nll"] = []
    file.write_text(json.dumps(cell))
    results = read_results(folder)
    wanted = columns(results)
    table = {row.cell.name: row.entries for row in rows(results, wanted)}
    c4, demo = (next(n for n, column in enumerate(wanted) if column.text == text) for text in ("c4", "demo"))
    marks = {
        (name, place): (table[name][place].best, table[name][place].unsure) for name in table for place in (c4, demo)
    }
    assert marks["2ssp-0.25", c4] == marks["2ssp-0.25", demo] == (True, False)
    assert marks["window-0.25", c4] == (False, True)
    assert marks["window-0.25", demo] == marks["slicegpt-0.25", c4] == marks["dense", c4] == (False, False)
    assert page(folder).count('class="unsure"') == 1


def small(html: str, section: str) -> tuple[list[str], dict[str, list[str]]]:
    """A small table's headings, and its rows by their title."""
    table = re.search(rf'<section id="{section}">.*?<table class="small figures">(.*?)</table>', html, re.DOTALL)
    assert table is not None
    rows = {
        " ".join(re.sub("<[^>]*>", "", name).split()[1:]): re.findall("<td[^>]*>(.*?)</td>", row)
        for name, row in re.findall('<th scope="row">(.*?)</th>(.*?)</tr>', table[1], re.DOTALL)
    }
    return re.findall('<th class="n"[^>]*>(.*?)</th>', table[1]), rows


def test_what_running_takes_and_what_was_generated_stand_in_small_tables(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, methods=("2ssp", "shortgpt"), sparsities=(0.25,), texts=("c4",), change={})
    file = folder / "cells" / "2ssp-0.25" / "cell.json"
    cell = json.loads(file.read_text())
    cell["inference"]["pruned"] |= {
        "kv_bytes_per_token": 19_984, "peak_memory_bytes": 123_000_000, "throughput_tokens_s_rounds": [13.0, 26, 52],
    }  # fmt: skip
    cell["inference"]["dense"]["throughput_tokens_s_rounds"] = [10.0, 20, 20]
    cell["generation"]["figures"] = {"greedy_agreement": 0.42, "distinct_2": 0.9, "common_prefix_tokens": 4.5}
    cell["weight_bytes"] = 200_000_000
    file.write_text(json.dumps(cell))
    html = page(folder)
    headings, rows = small(html, "running")
    assert headings == ["weights", "KV cache per token", "throughput, × dense", "peak memory"]
    assert rows["2SSP 25 %"] == ["200\u00a0MB", "20.0\u00a0kB", "1.30×", "123\u00a0MB"]
    assert set(rows) == {"Dense", "2SSP 25 %", "ShortGPT 25 %", "2SSP at the size of ShortGPT 25 %"}
    headings, rows = small(html, "samples")
    assert headings == ["agreement with dense", "tokens before it differs", "distinct tokens", "distinct pairs",
                        "distinct triples", "ended by itself"]  # fmt: skip
    assert rows["2SSP 25 %"] == ["42\u00a0%", "4.50", "–", "90\u00a0%", "–", "–"]


def test_a_cpus_peak_memory_is_not_on_the_page_and_unmeasured_rows_are_not_there(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, methods=("2ssp",), sparsities=(0.25, 0.5), texts=("c4",), change={})
    for file in (folder / "cells").glob("*/cell.json"):
        cell = json.loads(file.read_text())
        cell["inference"]["pruned"]["peak_memory_by"] = TENSORS
        if cell["name"] == "2ssp-0.5":
            cell |= {"status": "failed", "generation": None}
        file.write_text(json.dumps(cell))
    html = page(folder)
    for section in ("running", "samples"):
        headings, rows = small(html, section)
        assert "peak memory" not in headings
        assert set(rows) == {"Dense", "2SSP 25 %"}


@pytest.mark.slow
def test_sections_without_data_are_not_there(tmp_path: Path) -> None:
    html = page(make_compare_folder(tmp_path, only_perplexity=True))
    assert 'id="samples"' not in html
    assert 'id="running"' not in html
    assert "mean accuracy" not in html.split('id="plots"')[0]
    assert 'id="removed"' in html


def test_a_comparison_of_one_method_on_one_text_needs_no_switch_of_texts(tmp_path: Path) -> None:
    html = page(make_compare_folder(tmp_path, methods=("shortgpt",), sparsities=(0.25,), texts=("c4",), change={}))
    assert 'id="texts"' not in html


def test_a_bare_folder_makes_a_page_too(tmp_path: Path) -> None:
    about = {"schema": 1, "model": {"name": "m"}, "cells": ["dense", "2ssp-0.25"]}
    (tmp_path / "compare.json").write_text(json.dumps(about))
    html = page(tmp_path)
    assert "No verdict" in html
    assert html.count("not there yet: running, or still to come") == 2
    assert not save_plots(read_results(tmp_path), figures(read_results(tmp_path)), tmp_path)


def test_the_command_is_given_as_it_was_with_quotes_where_needed(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, **{"methods": ("2ssp",), "sparsities": (0.25,), "change": {}})
    about = json.loads((folder / "compare.json").read_text())
    about["arguments"] = {"command": ["compare", "my model", "--sparsities", "0.25,0.5", "--matched", "--out", "x y"]}
    (folder / "compare.json").write_text(json.dumps(about))
    code = re.search("<pre><code>(.*?)</code>", page(folder), re.DOTALL)
    assert code is not None
    told = code[1].replace("&#39;", "'").split(" \\\n  ")
    assert told == ["secateur compare 'my model'", "--sparsities 0.25,0.5", "--matched", "--out 'x y'"]


def test_all_commands_are_given_and_the_machine_of_a_cell_that_was_made_on_another(tmp_path: Path) -> None:
    change = {"2ssp-0.25": {"machine": "a borrowed one", "versions": {"torch": "9.9"}}}
    folder = make_compare_folder(tmp_path, methods=("2ssp",), sparsities=(0.25, 0.5), texts=("c4",), change=change)
    about = json.loads((folder / "compare.json").read_text())
    about["commands"] = [["compare", "m", "--sparsities", "0.25"], ["compare", "m", "--sparsities", "0.5"]]
    (folder / "compare.json").write_text(json.dumps(about))
    html = page(folder)
    assert [code.split()[-1] for code in re.findall("<pre><code>(.*?)</code>", html, re.DOTALL)] == ["0.25", "0.5"]
    assert html.count("<dt>machine</dt>") == 2
    assert "<dd>a borrowed one</dd>" in html
    assert "<dd>9.9</dd>" in html


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "compare.json").unlink(), "no compare folder"),
        (lambda folder: (folder / "compare.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "compare.json").write_text("[]"), "JSON object"),
        (lambda folder: (folder / "compare.json").write_text('{"schema": 2}'), "schema 2"),
        (lambda folder: (folder / "compare.json").write_text('{"schema": 1}'), "`model`"),
        (
            lambda folder: (folder / "compare.json").write_text('{"schema": 1, "model": {}, "cells": ["../x"]}'),
            "no name",
        ),
        (lambda folder: (folder / "compare.json").write_text('{"schema": 1, "kind": "x"}'), "neither a comparison nor"),
        (lambda folder: (folder / "cells" / "2ssp-0.25" / "cell.json").write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused(change: Any, told: str, tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path, methods=("2ssp",), sparsities=(0.25,), change={})
    change(folder)
    with pytest.raises(DataError, match=told):
        read_results(folder)


@pytest.mark.parametrize("package", ["jinja2", "plotly.offline", "matplotlib"])
def test_a_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_compare_folder(tmp_path, methods=("2ssp",), sparsities=(0.25,), change={})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"secateur\[report\]"):
        write_report(folder)
    assert not (folder / "report.html").exists()


# --- what is drawn ---


def test_the_plots_data_are_the_cells_own(tmp_path: Path) -> None:
    results = read_results(make_compare_folder(tmp_path))
    drawn = figures(results)
    json.dumps(drawn, allow_nan=False)
    assert {cell["name"] for cell in drawn["cells"]} == {c.name for c in results.pruned if c.done}
    for cell in drawn["cells"]:
        told = results.cell(cell["name"])
        assert told is not None
        for text in results.texts:
            value, low, high = cell["y"][text]
            assert value == results.perplexity(told, text)
            assert low < value < high
        ratio, low, high = cell["y"][ALL]
        assert low <= ratio <= high
    assert drawn["dense"]["y"][ALL] == [1, 1, 1]


def test_infinite_perplexities_are_left_out_of_plots(tmp_path: Path) -> None:
    bad = {"perplexity": None, "nll": 800.0, "nll_stderr": None, "samples": 20, "length": 2048, "predictions": 40940}
    folder = make_compare_folder(
        tmp_path,
        methods=("2ssp",),
        sparsities=(0.25,),
        texts=("c4",),
        change={"2ssp-0.25": {"perplexity": {"c4": bad}}},
    )
    assert figures(read_results(folder))["cells"][0]["y"] == {}


@pytest.mark.slow
def test_plots_are_written_as_png_and_svg_and_the_same_again(tmp_path: Path) -> None:
    results = read_results(make_compare_folder(tmp_path / "x", methods=("2ssp", "slicegpt", "evopress"), change={}))
    drawn = figures(results)
    first, second = (save_plots(results, drawn, tmp_path / name) for name in "ab")
    names = {"perplexity-size", "perplexity-time", "accuracy-size", "search-curve", "inference", "removed"}
    assert {path.name for path in first} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        if one.suffix == ".svg":
            root = ET.parse(one).getroot()
            assert root.tag.endswith("svg")
            if one.stem.startswith("perplexity"):
                colours = one.read_text().lower()
                assert all(method["colour"].lower() in colours for method in drawn["methods"])
        else:
            assert one.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
@pytest.mark.parametrize("texts", [("c4", "demo"), ("c4",)])
def test_the_files_have_each_view_of_the_page_and_the_captions_say_their_axes(
    tmp_path: Path, texts: tuple[str, ...]
) -> None:
    folder = make_compare_folder(tmp_path, methods=("2ssp", "evopress"), sparsities=(0.25,), texts=texts, change={})
    results = read_results(folder)
    save_plots(results, figures(results), tmp_path / "plots")
    for name in ("perplexity-size", "perplexity-time"):
        svg = (tmp_path / "plots" / f"{name}.svg").read_text()
        shown = re.findall(">(all texts|c4|demo|perplexity over dense|perplexity)</text>", svg)
        each = [word for text in texts for word in ("perplexity", text)]
        assert sorted(shown) == sorted(each + ["perplexity over dense", "all texts"] * (len(texts) > 1))
    curve = (tmp_path / "plots" / "search-curve.svg").read_text()
    assert re.search(">generation</text>", curve)
    assert re.search(">EvoPress, 25\u00a0%</text>", curve)
    captions = dict(re.findall(r"<figcaption>([^<]+?) <span>([^<]+)</span></figcaption><div class=.plot", page(folder)))
    assert {caption: told.split("; ")[-1] for caption, told in captions.items()} == {
        "Perplexity against size": "both axes logarithmic",
        "Perplexity against pruning time": "both axes logarithmic",
        "Mean accuracy on tasks against size": "size on a logarithmic axis, accuracy on a plain one",
        "Best of the search, by generation": "a colour per method, a dash per size",
    }
    assert "both axes plain" in captions["Best of the search, by generation"]


@pytest.mark.slow
def test_names_with_markup_do_not_break_the_plots(tmp_path: Path) -> None:
    results = read_results(evil_folder(tmp_path))
    drawn = {**figures(results), "texts": ["c4"]}
    for cell in drawn["cells"]:
        cell["label"] = "$x_{ 漢字"
    assert save_plots(results, drawn, tmp_path / "plots")


def test_the_picture_of_blocks_shows_each_blocks_share(tmp_path: Path) -> None:
    dense = [{"block": n, "kv_heads": 4, "width": 100} for n in range(3)]
    shape = [{"block": 0, "kv_heads": 1, "width": 25}, {"block": 1, "kv_heads": 0, "width": 0}]  # block 2 is gone
    attention, ffn = lanes(shape, dense)
    assert attention.kept == [0.25, 0, 0]
    assert ffn.kept == [0.25, 0, 0]
    root = ET.fromstring(picture([attention, ffn], title="<&>"))
    space = "{http://www.w3.org/2000/svg}"
    groups = root.findall(f"{space}g")
    assert len(groups) == 6
    heights = [[float(bar.get("height") or 0) for bar in group.findall(f"{space}rect")] for group in groups]
    assert heights[0][1] == pytest.approx(heights[0][0] / 4, abs=0.1)
    assert len(heights[1]) == 1  # only its outline
    assert root.get("aria-label") == "<&>"


def test_a_narrower_stream_gets_a_lane_of_its_own(tmp_path: Path) -> None:
    results = read_results(make_compare_folder(tmp_path, methods=("2ssp", "slicegpt"), change={}))
    dense, hidden = results.dense_shape, results.hidden_size
    found = {cell.method: lanes(cell.data["shape"], dense, hidden) for cell in results.pictured}
    assert [lane.name for lane in found["2ssp"]] == ["attention", "FFN"]
    stream = found["slicegpt"][-1]
    assert stream.name == "stream"
    assert len(stream.kept) == BLOCKS
    assert all(share == pytest.approx(0.5, abs=0.01) for share in stream.kept)


# --- the command ---


@pytest.mark.slow
def test_the_command_makes_the_page_and_says_the_verdict(tmp_path: Path) -> None:
    folder = make_compare_folder(tmp_path / "x", methods=("2ssp",), sparsities=(0.25,), texts=("c4",), change={})
    told = call("report", folder)
    assert told.code == 0
    assert told.out.startswith("Best by perplexity: 2SSP at 25")
    assert (folder / "report.html").is_file()
    assert (folder / "plots" / "perplexity-size.png").is_file()
    first = (folder / "report.html").read_text()
    assert call("report", folder).code == 0
    assert (folder / "report.html").read_text() == first


def test_the_command_refuses_what_is_no_compare_folder(tmp_path: Path) -> None:
    told = call("report", tmp_path)
    assert told.code == 3
    assert "no compare folder" in told.err
    assert list(tmp_path.iterdir()) == []


def test_the_readmes_picture_is_drawn_from_a_record() -> None:
    draw = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "draw_blocks.py"))["draw"]
    record = {
        "before": {"blocks": 3, "kv_heads": 6, "attentions": 3, "neurons": 300, "mlps": 3},
        "edits": [
            {"edit": "KeepNeurons", "block": 0, "index": list(range(40))},
            {"edit": "DropAttention", "block": 2},
        ],
        "sparsity": {"achieved": {"blocks": 0.25}},
        "model": {"name": "<m>"},
        "method": "2ssp",
    }
    titles = [element.text for element in ET.fromstring(draw(record)).iter() if element.tag.endswith("title")]
    assert titles[:3] == ["block 0: 2 of 2 KV heads", "block 1: 2 of 2 KV heads", "block 2: 0 of 2 KV heads"]
    assert titles[3:] == [f"block {n}: {width} of 100 FFN neurons" for n, width in enumerate((40, 100, 100))]
