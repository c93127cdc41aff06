"""Fill the tables of the pages from what was measured and from the methods themselves (`make figures`).

A page says where a table belongs and which it is:

    <!-- table: figures 2ssp -->
    ...
    <!-- end -->

What stands between the two is replaced. `options NAME` and `facts NAME` come from the method's registration;
`figures NAME`, `overview`, `perplexities FOLDER`, `peers`, `ablations NAME`, `spread`, `refined NAME` and the tables
of engine_tables.py and slimgpt_tables.py from the JSON files under docs/results, each of which is linked. A folder
there was written by `secateur compare` or `secateur ablate`, or holds the cells of bench/slimgpt.py.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from os.path import relpath
from pathlib import Path
from typing import Any

import torch
from engine_tables import ENGINES
from slimgpt_tables import SLIMGPT
from transformers import AutoModelForCausalLM, LlamaConfig

from secateur.forecast import Forwards
from secateur.judge.statistics import mean_and_sd
from secateur.methods import Method, get_method, methods
from secateur.methods.registry import earlier
from secateur.model.handle import Model
from secateur.planning import Request, plan
from secateur.report.ablation import NAME as ABLATION_TABLE
from secateur.report.ablation import Group, ablation_table, groups, short_ablation_table
from secateur.report.ablation_figures import together
from secateur.report.looks import listed, number, percent
from secateur.report.main_table import DIFFERENCES, difference_table, differences, main_table
from secateur.report.page import on_lines
from secateur.report.results import (
    ABLATE,
    CELL,
    CELLS,
    COMPARE,
    DENSE,
    INDEX,
    MISSING,
    CellResult,
    Results,
    read_results,
)
from secateur.report.short_table import by_text_and_task, short_table
from secateur.report.table import Column, Table, markdown

DOCS = Path(__file__).parent
RESULTS, IMAGES = DOCS / "results", DOCS / "images"
PAGES = [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"]
PERPLEXITY = "perplexity-size"  # a picture
REPEATS = "repeats"  # the ablation that varies nothing: of the table of the spread
MAIN = "main-table"
MEASURED = DOCS.parent / "src" / "secateur" / "measured.json"
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


def subset(results: Results, cells: Iterable[CellResult]) -> Results:
    """Some of a folder's cells, which may be compared with each other: one model, one judgement."""
    return replace(results, cells=tuple(cells))


def of_method(results: Results, method: str) -> Results | None:
    """The dense cell, the method's or its ablations', and 2SSP's at the sizes that these really have; with those that
    are not there yet, by the names that `secateur compare` gives them. None if the method is not there."""
    own = [cell for cell in results.pruned if _whose(cell) == method and not cell.matched_to]
    names = {cell.name for cell in own}
    to_come = re.compile(rf"(2ssp-as-)?{re.escape(method)}-[\d.e-]+")
    return subset(results, (
        cell for cell in results.cells
        if cell.name in names or cell.method == DENSE or cell.matched_to in names
        or (cell.status == MISSING and to_come.fullmatch(cell.name))
    )) if own else None  # fmt: skip


def table(results: Results) -> str:
    """A table of some cells, which says what else belongs there and is not there yet."""
    if results.index.kind == COMPARE:
        return markdown(main_table(results)).strip()
    return markdown(ablation_table(results, groups(results))).strip()


def links(results: Results, page: Path) -> str:
    """To the cells, and to what tells them apart; of an ablation, which has a cell per seed, to the table: they lie
    beside it."""
    folder = results.folder
    files = {cell.name: folder / CELLS / cell.name / CELL for cell in results.cells if cell.status != MISSING}
    if (told := folder / DIFFERENCES).is_file():
        files["differences, with intervals"] = told
    if results.index.kind == ABLATE:
        files = {"table": folder / f"{ABLATION_TABLE}.json", "settings": folder / INDEX}
    return f"Files: {', '.join(f'[{name}]({relpath(file, page.parent)})' for name, file in files.items())}."


def _whose(cell: CellResult) -> str:
    """The method that a cell tells of: that of an ablation may be tried in a variant that is no method."""
    return cell.ablation.of if cell.ablation else cell.method


def folders(kind: str, results: Path | None = None) -> list[Results]:
    """All comparisons, or ablations, under a folder, by name."""
    results = results or RESULTS
    read = [read_results(file.parent) for file in sorted(results.glob(f"*/{INDEX}"))]
    return [each for each in read if each.index.kind == kind]


def settings(method: Method, cells: Iterable[CellResult]) -> str:
    """In words, the calibration and the options of a method's cells, as far as they are not its defaults."""
    told = []
    for cell in cells:
        if cell.method != method.name or cell.matched_to or not cell.calibration:
            continue
        used = cell.calibration
        windows = f"{used['samples']:,} windows of {used['length']:,} tokens of {used['name']}"
        if (used["samples"], used["length"]) != (method.samples, method.length):
            windows += f" (by default {method.samples:,} of {method.length:,})"
        own = [
            f"`{name}={value}`"
            for name, value in (earlier(method.name) | cell.options).items()
            if name in method.options and value != method.options[name].default
        ]
        told.append(f"Calibrated on {windows}; {', '.join(own) or 'all options at their defaults'}.")
    return " ".join(dict.fromkeys(told))


def figures(name: str, page: Path) -> Iterator[str]:
    """What was measured of a method, per comparison that has it."""
    for folder in folders(COMPARE):
        if own := of_method(folder, name):
            yield f"**{_title(own)}.** {settings(get_method(name), own.cells)}"
            yield shown(short_table(own, by_text_and_task(own)[0], matched=True))
            yield folded("All columns", table(own), links(own, page))


def ablations(name: str, page: Path) -> Iterator[str]:
    """A method's ablations: pictures, a table in short, and behind a fold the whole one."""
    measured = [own for folder in folders(ABLATE) if (own := of_method(folder, name)) and _choices(own)]
    for own in measured:
        yield f"**{_title(own)}**"
        yield from images(own, page)
        yield from (shown(short_ablation_table(own, _choices(own), each)) for each in by_text_and_task(own))
        yield folded("All columns", table(own), links(own, page), *made_by(own))
    if not measured:
        yield "Not measured yet."


def overview(_: str, page: Path) -> Iterator[str]:
    """Everything that was compared: in short, the best first, and behind folds all columns of all cells."""
    for results in folders(COMPARE):
        report = results.folder / "report.html"
        yield f"**{_title(results)}**" + (f" [The report]({relpath(report, page.parent)})" if report.is_file() else "")
        yield from in_short(results, page)
        said = {name: settings(method, results.cells) for name, method in methods().items()}
        told = "\n".join(f"- {name}: {words}" for name, words in said.items() if words)
        yield folded("All cells, all columns, and how they were made", table(results), told, links(results, page),
                     *made_by(results))  # fmt: skip


def perplexities(name: str, page: Path) -> Iterator[str]:
    """A comparison in short."""
    results = next(each for each in folders(COMPARE) if each.folder.name == name)
    yield from in_short(results, page)
    yield f"[Tasks, times, all columns]({relpath(RESULTS / 'README.md', page.parent)})."


def peers(_: str, page: Path) -> Iterator[str]:
    """What bench/peers.py added to comparisons under results/peers: all cells, and the differences to ours."""
    for file in sorted(RESULTS.glob(f"peers/*/{INDEX}")):
        results = read_results(file.parent)
        base = results.index.settings["grid"]["base"]
        yield f"**Calibrated on {results.folder.name} tokens**"
        yield table(results)
        apart = shown(difference_table(differences(results, base)))
        yield folded(f"Differences to {base}, and how they were made", apart, links(results, page), *made_by(results))


def in_short(results: Results, page: Path) -> Iterator[str]:
    """The table of the first text and its picture; the other texts' tables behind a fold."""
    first, *others = by_text_and_task(results)
    yield shown(short_table(results, first))
    yield from images(results, page)
    if others:
        named = [f"{'perplexity on' if each.lower else f'{each.title} over'} {listed(each.names)}" for each in others]
        tables = [replace(short_table(results, each), notes=()) for each in others]
        yield folded(
            f"The same: {'; '.join(named)}",
            *(f"{name[0].upper()}{name[1:]}:\n\n{shown(each)}" for name, each in zip(named, tables, strict=True)),
        )


def shown(table: Table) -> str:
    return markdown(table).strip()


def folded(title: str, *parts: str) -> str:
    """Parts that a reader opens, on GitHub and on the site."""
    return "\n\n".join([f'<details markdown="1">\n<summary>{title}</summary>', *filter(None, parts), "</details>"])


def pictured(results: Results) -> dict[str, str]:
    """What a folder's pictures show, by their names: perplexity against size, if there are sizes, or a choice each."""
    if results.index.kind == COMPARE:
        of = f"Perplexity on {results.texts[0]} against the parameters that are left, by method"
        return {PERPLEXITY: of} if len(results.sparsities) > 1 else {}
    return {
        name: f"{some[0].what} of {some[0].of}: perplexity by value, with its spread over seeds"
        for name, some in together(results).items()
        if some[0].what != REPEATS and any(value.cells for group in some for value in group.values)
    }


def images(results: Results, page: Path) -> Iterator[str]:
    """In one paragraph, side by side where there is room."""
    where = relpath(IMAGES / results.folder.name, page.parent)
    if told := [f"![{words}]({where}/{name}.svg)" for name, words in pictured(results).items()]:
        yield "\n".join(told)


def _choices(results: Results) -> list[Group]:
    return [group for group in groups(results) if group.what != REPEATS]


def spread(_: str, page: Path) -> Iterator[str]:
    """Of each method as it is, pruned by several draws of the calibration: what the draw alone does to perplexity."""
    rows = sorted(
        (row for results in folders(ABLATE) for row in _draws(results)), key=lambda row: list(row.values())[:4]
    )
    if not rows:
        yield "Not measured yet."
        return
    draws = sorted({key for row in rows for key in row if key.startswith("draw ")})
    columns = [
        Column("method", "method"), Column("sparsity", "asked", form=percent), Column("calibration", "calibrated on"),
        Column("dtype", "precision"), *(Column(key, key, form=number) for key in draws),
        Column("mean", "mean", form=number, sd=float), Column("factor", "highest over lowest", form=".2f"),
    ]  # fmt: skip
    yield shown(Table(columns, rows))
    factors = [f"{row['factor']:.2f} ({row['method']} at {percent(row['sparsity'])}, {row['dtype']})" for row in rows]
    yield (
        f"Perplexity on {listed(sorted({row['text'] for row in rows}))}; draw 0 is the text's first windows, as in "
        f"comparisons. The draw alone moves it by a factor of {listed(factors)}. Intervals elsewhere are over "
        "the windows that are judged, and do not hold this. So of figures that rest on one draw each, a difference "
        "smaller than this factor is no finding about the methods."
    )
    files = {row["folder"]: relpath(RESULTS / row["folder"] / INDEX, page.parent) for row in rows}
    yield f"Files: {', '.join(f'[{name}]({file})' for name, file in files.items())}."


def _draws(results: Results) -> Iterator[dict[str, Any]]:
    """A row per method and size: its default in the group that has it with most draws."""
    most: dict[tuple[str, float | None], Mapping[int, CellResult]] = {}
    for group in groups(results):
        own = group.values[0] if group.what == REPEATS else group.default
        if own and len(own.cells) > len(most.get((group.of, group.sparsity), "1")):
            most[group.of, group.sparsity] = own.cells
    for (of, sparsity), cells in most.items():
        first, text = next(iter(cells.values())), results.texts[0]
        used, windows = first.calibration or {}, results.windows[text]
        values = {f"draw {n}": value for n, cell in cells.items() if (value := results.perplexity(cell, text))}
        mean, sd = mean_and_sd(list(values.values()))
        yield {
            "method": of, "sparsity": sparsity, "dtype": results.index.versions.get("dtype"), "mean": mean,
            "calibration": f"{used['samples']} x {used['length']:,} of {used['name']}", **values, "mean:sd": sd,
            "factor": max(values.values()) / min(values.values()), "folder": results.folder.name,
            "text": f"{text} ({windows.samples} windows of {windows.length:,} tokens)",
        }  # fmt: skip


def made_by(results: Results) -> Iterator[str]:
    """The commands that made a folder; their paths are named by their last part only."""
    if commands := results.index.all_commands:
        yield "```console\n" + "\n".join(f"$ {on_lines(words)}" for words in commands) + "\n```"


def _title(results: Results) -> str:
    kinds = {COMPARE: "Comparison", ABLATE: "Ablation"}
    return f"{kinds[results.index.kind]} (`docs/results/{results.folder.name}`)"


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


def recovered_cells(folder: str) -> dict[Path, dict[str, Any]]:
    """What bench/recovery.py wrote, by file: the pruned models, and each as trained in several ways."""
    return {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted((RESULTS / folder).glob("*.json"))}


def recovery(folder: str, page: Path) -> Iterator[str]:
    """Perplexities before and after training, way by way."""
    rows, cells = [], recovered_cells(folder)
    for file, cell in cells.items():
        row = {"model": cell["model"], "way": f"[{cell['way']}]({relpath(file, page.parent)})"}
        row |= {text: found["perplexity"] for text, found in cell["perplexity"].items()}
        if told := cell.get("recovery"):
            losses, unit = told["held_out_loss"], "KL" if told["teacher"] else "cross-entropy"
            since = f" from step {told['resumed_at']} on" if told["resumed_at"] else ""
            row |= {
                "lr": f"{told['settings']['lr']:g}",
                "tokens": told["tokens_seen"][-1][1],
                "cpu": f"{cell['cost']['cpu_s']:,.0f}{since}",
            }
            row["held"] = f"{unit} {losses['before']:.3f} to {losses['after']:.3f}"
        rows.append(row)
    texts = {text: found for cell in cells.values() for text, found in cell["perplexity"].items()}
    columns = [
        Column("model", "model"), Column("way", "trained"), Column("lr", "learning rate"),
        Column("tokens", "tokens seen", form=",.0f"), Column("held", "held-out loss, nats per token"),
        *(Column(text, f"perplexity, {text}", form=number) for text in texts), Column("cpu", "CPU s"),
    ]  # fmt: skip
    judged = [f"{text}: {found['samples']} windows of {found['length']} tokens" for text, found in texts.items()]
    yield f"{shown(Table(columns, rows))}\n\nJudged on {listed(judged)}." if rows else "Not measured yet."


def engine(file: str, page: Path) -> Iterator[str]:
    """What bench/llama_cpp.py wrote: models by type."""
    found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    rows = [{**row, "mb": row["bytes"] / 1e6} for row in found["rows"] if "bytes" in row]
    columns = [
        Column("model", "model"), Column("type", "type"), Column("mb", "MB", form=",.0f"),
        Column("perplexity", "perplexity in llama.cpp", form=number),
        Column("transformers", "in transformers, float32", form=number),
        Column("tokens_per_second", "tokens per second", form=".0f"),
    ]  # fmt: skip
    samples, length = found["windows"]
    yield shown(Table(columns, rows))
    yield (
        f"{found['text']}, {samples} windows of {length:,} tokens; {found['machine']}; llama.cpp on one thread "
        f"([figures]({relpath(RESULTS / file, page.parent)}))."
    )


def uniformity(folder: str, page: Path) -> Iterator[str]:
    """What bench/uniformity.py wrote: each method's perplexities by engine, text by text."""
    files = sorted((RESULTS / folder).glob("*.json"))
    cells = [json.loads(file.read_text(encoding="utf-8")) | {"file": relpath(file, page.parent)} for file in files]
    cells.sort(key=lambda cell: cell["method"] != "dense")
    judged = [cell for cell in cells if "perplexity" in cell]
    if not judged:
        yield "Not measured yet."
        return
    names = list(dict.fromkeys(cell["engine"] for cell in cells))
    texts = judged[0]["perplexity"]
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        row = {"method": method}
        for cell in cells:
            if cell["method"] == method:
                found = cell.get("perplexity", {}).values()
                told = " / ".join(number(each["perplexity"]) for each in found) or "refused"
                row[cell["engine"]] = f"[{told}]({cell['file']})"
        rows.append(row)
    yield shown(Table([Column("method", "method"), *(Column(name, f"`--for {name}`") for name in names)], rows))
    windows = listed(
        [f"{name} ({each['samples']} windows of {each['length']:,} tokens)" for name, each in texts.items()]
    )
    pruned = next(cell for cell in judged if "calibration" in cell)
    used = pruned["calibration"]
    yield (
        f"Perplexity on {windows}, in float32; {percent(pruned['sparsity']['asked'])} of the blocks' parameters asked "
        f"for; calibrated on {used['samples']} windows of {used['length']:,} tokens of {used['name']}; "
        f"{pruned['machine']}."
    )


def refined(method: str, page: Path) -> Iterator[str]:
    """What `secateur eval` added to checkpoints' records (which lie there without their edits), beside the recipe's
    closed form of the same size."""
    plain = {cell.sparsity: cell for cell in read_results(RESULTS / "recipe").pruned if cell.method == method}
    rows, judged, used = [], [], {}
    for file in sorted((RESULTS / "refined").glob(f"{method}-*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        asked, options, used = record["sparsity"]["asked"], record["filters"]["refine"], record["calibration"]
        row = {"size": f"[{percent(asked)}]({relpath(file, page.parent)})", "passes": options["passes"]}
        judged = record["evaluations"][-1]["model"]["perplexity"]
        for each in judged:
            closed = plain[asked].perplexity[each["text"]]
            row[each["text"]] = f"{number(closed.perplexity)} → {number(each['perplexity'])}"
        rows.append(row)
    texts = [Column(each["text"], each["text"].partition(".")[0]) for each in judged]
    yield shown(Table([Column("size", "gone"), Column("passes", "passes", form="g"), *texts], rows))
    yield (
        f"Perplexity without refinement and with it, {judged[0]['samples']} windows of "
        f"{judged[0]['length']:,} tokens; calibrated on {used['samples']} windows of {used['length']:,} tokens of "
        f"{used['name']}, float32."
    )


def screened(_: str, page: Path) -> Iterator[str]:
    """Searches with and without a screen, by their checkpoints' records."""
    rows, judged = [], []
    for file in sorted((RESULTS / "screened").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        judged = record["evaluations"][-1]["model"]["perplexity"]
        screen, achieved = record["options"]["screen"], record["sparsity"]["achieved"]
        rows.append({
            "search": f"[{f'`--screen {screen}`' if screen else 'exact'}]({relpath(file, page.parent)})",
            "forwards": record["cost"]["forwards"], "gone": f"{achieved['blocks']:.2%}",
            **{each["text"]: each["perplexity"] for each in judged},
        })  # fmt: skip
    texts = [Column(each["text"], f"perplexity, {each['text']}", form=number) for each in judged]
    head = [Column("search", "search"), Column("forwards", "forwards", form=".1f"), Column("gone", "of the blocks")]
    yield shown(Table([*head, *texts], rows))
    yield f"{judged[0]['samples']} windows of {judged[0]['length']:,} tokens; float32."


def torture(name: str, _: Path) -> Iterator[str]:
    """What became of runs that were killed, as `make torture` writes it."""
    facts = json.loads((RESULTS / name / "torture.json").read_text(encoding="utf-8"))
    head = ["run", "kills", "reading", "between entries", "writing", "entries kept", "identical", "computed again"]
    rows = [
        [job, each["kills"], *each["phases"].values(), each["kept"], each["identical"], each["recomputed"]]
        for job, each in facts["jobs"].items()
    ]
    sums = [sum(row[column] for row in rows) for column in range(1, len(head))]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows, ["**all**", *sums]]
    yield "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    watcher = facts["watcher"]
    yield (
        f"{facts['between_entries']:.0%} of the kills came between the first entry and the last. What looked like a "
        f"finished folder was loaded {watcher['whole']} times meanwhile; {len(watcher['broken'])} were not whole. "
        f"`{facts['command']}`, {facts['seconds']:.0f} s."
    )


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
    table.__name__: table
    for table in (
        figures,
        overview,
        perplexities,
        peers,
        ablations,
        spread,
        foretold,
        recovery,
        engine,
        uniformity,
        refined,
        screened,
        torture,
        options,
        facts,
        *ENGINES,
        *SLIMGPT,
    )
}


def filled(page: Path) -> str:
    """A page's text with its tables as they should be."""

    def table(found: re.Match[str]) -> str:
        start, kind, name, end = found.groups()
        return f"{start}\n" + "\n\n".join(TABLES[kind](name, page)) + f"\n\n{end}"

    return _MARKED.sub(table, page.read_text(encoding="utf-8"))


def measured() -> str:
    """What `secateur plan` knows of losses, as JSON: the demo model's in the main table."""
    results = read_results(RESULTS / MAIN)
    own = [cell for cell in results.pruned if cell.done and not cell.matched_to]
    cells = sorted(own, key=lambda cell: cell.removed or 0)
    losses = dict[str, list[tuple[float, dict[str, float]]]]()
    for cell in cells:
        nll = {text: _nll(results, cell, text) - _nll(results, results.dense, text) for text in results.texts}
        excess = {text: round(nats, 4) for text, nats in nll.items()}
        losses.setdefault(cell.method, []).append((round(cell.removed or 0, 4), excess))
    settings, reduced = results.index.settings, sorted({cell.method for cell in cells if "reduced" in cell.label})
    grid = settings["grid"]
    source = (
        f"{results.name}, docs/results/{MAIN}: {settings['samples']} windows of {settings['length']} tokens of each "
        f"text; calibrated on {grid['samples']} windows of {grid['calibration']}; searches of {listed(reduced)} reduced"
    )
    return json.dumps({"source": source, "losses": losses}, indent=1) + "\n"


def _nll(results: Results, cell: CellResult | None, text: str) -> float:
    found = results.loss(cell, text) if cell is not None else None
    assert found is not None, f"{text} is missing"
    return float(found.nll)


if __name__ == "__main__":
    MEASURED.write_text(measured(), encoding="utf-8")
    for each in PAGES:
        each.write_text(filled(each), encoding="utf-8")
