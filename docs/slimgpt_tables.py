"""Tables of what bench/slimgpt.py and bench/slimgpt_inside.py measured, for figures.py."""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from os.path import relpath
from pathlib import Path
from typing import Any

from secateur.report.table import Column, Table, markdown

CELLS = Path(__file__).parent / "results" / "slimgpt"
ORDER = (
    "dense", "log", "linear", "uniform", "log-decrease", "linear-decrease", "no-compensation", "group-paper",
    "group-128", "head-ordinary", "head-exact",
)  # fmt: skip
WIDTH = 576  # rows of the demo model's down projection: drift.json has means over them, the solves have sums


def slimgpt(_: str, page: Path) -> Iterator[str]:
    """The cells: schedules, ablations, calibration."""
    columns = [
        Column("variant", "variant"), Column("sparsity", "asked", form=".3g"), Column("calibration", "calibrated on"),
        Column("2048", "perplexity at 2,048", form=".2f"), Column("128", "perplexity at 128", form=".2f"),
        Column("cpu_s", "pruning, CPU s", form=",.0f"),
    ]  # fmt: skip
    rows = []
    for file in CELLS.glob("*-*-*x*.json"):
        cell = json.loads(file.read_text())
        used = cell.get("calibration", {"samples": 0, "length": 0})
        row = {
            "variant": f"[{cell['name']}]({relpath(file, page.parent)})",
            "sparsity": cell["sparsity"] or None,
            "calibration": f"{used['samples']} x {used['length']:,}" if used["samples"] else None,
            **{length: found["perplexity"] for length, found in cell["perplexity"].items()},
            "cpu_s": cell.get("cpu_s"),
        }
        place = (cell["sparsity"], -used["samples"] * used["length"], used["samples"], ORDER.index(cell["name"]))
        rows.append((place, row))
    yield markdown(Table(columns, [row for _, row in sorted(rows, key=itemgetter(0))])).strip()


def relative_losses(name: str) -> list[float] | None:
    """By block, what the FFN's solve lost, in units of the dense FFN's mean squared output; None if not measured."""
    file = CELLS / f"{name}-0.5-32x2048.json"
    if not file.exists():
        return None
    errors = json.loads(file.read_text())["errors"]
    drift = drift_by_share()["0.5"]
    power = [WIDTH * error / share for error, share in zip(drift["error"], drift["relative"], strict=True)]
    return [errors[f"{number}/neurons"] / whole for number, whole in enumerate(power)]


def losses(_: str, __: Path) -> Iterator[str]:
    """Where each schedule saves and where it pays: relative losses of the FFN solves, summed over ten blocks."""
    rows = []
    for name in ("log", "linear", "uniform", "no-compensation"):
        lost = relative_losses(name)
        if lost is not None:
            thirds = {f"{start}": sum(lost[start : start + 10]) for start in (0, 10, 20)}
            rows.append({"variant": name, **thirds, "all": sum(lost)})
    columns = [Column(f"{start}", f"blocks {start} to {start + 9}", form=".2f") for start in (0, 10, 20)]
    yield markdown(Table([Column("variant", "variant"), *columns, Column("all", "all", form=".2f")], rows)).strip()


def heads(_: str, page: Path) -> Iterator[str]:
    """What each error's choice of heads costs in relation to the exact one's, the geometric mean over the blocks."""
    file = CELLS / "heads.json"
    kind = itemgetter("unit", "gone", "of")
    rows = []
    for (unit, gone, of), some in groupby(sorted(json.loads(file.read_text())["rows"], key=kind), key=kind):
        blocks = list(some)
        row: dict[str, Any] = {"unit": unit, "gone": f"{gone} of {of}"}
        for error in ("grouped", "ordinary"):
            more = [block[error]["loss"] / block["exact"]["loss"] for block in blocks]
            row[error] = f"{math.exp(sum(map(math.log, more)) / len(more)) - 1:+.1%}"
            same = sum(block[error]["stay"] == block["exact"]["stay"] for block in blocks)
            row[f"same {error}"] = f"{same} of {len(blocks)} blocks"
        rows.append(row)
    columns = [
        Column("unit", "unit"), Column("gone", "gone"), Column("grouped", "loss by grouped"),
        Column("same grouped", "same choice"), Column("ordinary", "loss by ordinary"),
        Column("same ordinary", "same choice"),
    ]  # fmt: skip
    yield markdown(Table(columns, rows)).strip()
    yield f"File: [heads]({relpath(file, page.parent)})."


def recovered(_: str, page: Path) -> Iterator[str]:
    """Before and after `secateur recover`."""
    before = json.loads((CELLS / "log-0.5-32x2048.json").read_text())
    rows = [{"model": "pruned", **_perplexities(before)}]
    for file in sorted(CELLS.glob("recovered-*.json"), reverse=True):
        found = json.loads(file.read_text())
        told, name = found["recovery"], file.stem.removeprefix("recovered-")
        losses = told["held_out_loss"]
        unit = "KL to dense" if told["objective"] == "distillation" else "cross-entropy"
        rows.append(
            {
                "model": f"[{name}]({relpath(file, page.parent)})",
                "held": f"{unit} {losses['before']:.3f} to {losses['after']:.3f}",
                **_perplexities(found),
            }
        )
    columns = [
        Column("model", "model"), Column("held", "held-out loss, nats per token"),
        Column("2048", "perplexity at 2,048", form=".2f"), Column("128", "perplexity at 128", form=".2f"),
    ]  # fmt: skip
    yield markdown(Table(columns, rows)).strip()


def _perplexities(cell: Mapping[str, Any]) -> dict[str, float]:
    return {length: found["perplexity"] for length, found in cell["perplexity"].items()}


def growth(_: str, page: Path) -> Iterator[str]:
    """Memory and time by width."""
    file = CELLS / "growth.json"
    columns = [
        Column("hidden", "hidden size", form=",.0f"), Column("width", "FFN neurons", form=",.0f"),
        Column("peak_mb", "peak MB above the weights", form=".1f"), Column("foretold_mb", "foretold", form=".1f"),
        Column("cpu_s_per_block", "CPU s per block", form=".2f"),
    ]  # fmt: skip
    yield markdown(Table(columns, json.loads(file.read_text())["rows"])).strip()
    yield f"File: [growth]({relpath(file, page.parent)})."


def drift(_: str, page: Path) -> Iterator[str]:
    """How far an error of the first block travels."""
    places = [0, 1, 5, 10, 15, 20, 25, 29]
    columns = [Column("share", "taken from block 0"), Column("error", "squared error of the FFN's output")]
    columns += [Column(str(n), f"block {n}") for n in places]
    rows = [
        {"share": f"{float(share):.0%}", "error": words} | {str(n): format(errors[kind][n], form) for n in places}
        for share, errors in drift_by_share().items()
        for kind, words, form in (("error", "as it is", ".2f"), ("relative", "of the output's square", ".1%"))
    ]
    yield markdown(Table(columns, rows)).strip()
    yield f"File: [drift]({relpath(CELLS / 'drift.json', page.parent)})."


def drift_by_share() -> dict[str, dict[str, list[float]]]:
    """By the share taken from block 0: by kind of error, that of each block's FFN."""
    found: dict[str, dict[str, list[float]]] = json.loads((CELLS / "drift.json").read_text())
    return found["share of the first block"]  # type: ignore[return-value]  # the file's other entry is the machine


SLIMGPT = (slimgpt, losses, heads, recovered, growth, drift)
