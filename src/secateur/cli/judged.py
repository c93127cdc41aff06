"""What `secateur eval` shows: one table, the models side by side, and samples of their text below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich.markup import escape
from rich.table import Table

from secateur.cli.guard import out
from secateur.cli.tasks import task_rows
from secateur.errors import InvalidOptionError
from secateur.judge.perplexity import ratio

Judged = Mapping[str, Any]
Value = float | None

_INFERENCE = (
    ("throughput, tokens/s", "throughput_tokens_s", 1.0, ",.1f"),
    ("KV cache, bytes per token", "kv_bytes_per_token", 1.0, ",.0f"),
    ("peak memory, MB", "peak_memory_bytes", 1e-6, ",.1f"),
)
_FIGURES = (
    ("greedy agreement", "greedy_agreement", ".1%"),
    ("tokens before it differs", "common_prefix_tokens", ".1f"),
    ("distinct tokens", "distinct_1", ".1%"),
    ("distinct pairs", "distinct_2", ".1%"),
    ("distinct triples", "distinct_3", ".1%"),
    ("ended by itself", "ended_share", ".0%"),
)


def show(report: Mapping[str, Any]) -> None:
    """Print what `secateur.evaluate` returns."""
    columns = [report[name] for name in ("against", "model") if name in report]
    names = [PurePath(str(each["name"])).name for each in columns]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")  # on a narrow terminal words wrap, and figures stay whole
    for heading in (*names, *([""] if len(columns) == 2 else [])):
        table.add_column(escape(heading), no_wrap=True)
    _row(table, "parameters", [each["parameters"] for each in columns], ",")
    _row(table, "weights, MB", [each["weight_bytes"] / 1e6 for each in columns], ",.1f")
    remarks = _perplexity(table, columns)
    _fidelity(table, columns)
    remarks += _inference(table, columns)
    _generation(table, columns)
    remarks += task_rows(table, columns)
    out.print(table)
    for remark in remarks:
        out.print(remark, style="dim", markup=False, highlight=False)
    for name, each in zip(names, columns, strict=True):
        for sample in each.get("generation", {}).get("samples", ()):
            how = sample["settings"]["name"]
            out.print(f"\n{name}, {how}: {sample['prompt']}", style="bold", markup=False, highlight=False)
            out.print(sample["text"].strip(), markup=False, highlight=False)


def _row(
    table: Table,
    name: str,
    values: Sequence[Value],
    form: str,
    *,
    spreads: Sequence[Value] = (),
    change: str | None = None,
) -> None:
    """Add a row; with two values also by how much the second differs, unless `change` says something else."""
    cells = ["-" if value is None else format(value, form) for value in values]
    for place, spread in enumerate(spreads):
        cells[place] += "" if spread is None else f" ± {spread:{form}}"
    first, last = values[0], values[-1]
    if len(values) == 2 and change is None and first and last is not None:
        change = f"{last / first - 1:+.1%}"
    table.add_row(escape(name), *cells, *([change or ""] if len(values) == 2 else []))


def _perplexity(table: Table, columns: Sequence[Judged]) -> list[str]:
    """A row per text, each with its standard error; where the tokens differ, no change is shown but the reason told."""
    remarks = []
    for results in zip(*(each.get("perplexity", ()) for each in columns), strict=True):
        first, change = results[0], None
        if len(results) == 2:
            try:
                change = f"{ratio(*results) - 1:+.1%}"
            except InvalidOptionError as error:
                change = "other tokens"
                remarks.append(str(error))
        values = [each["perplexity"] for each in results]
        errors = [each["nll_stderr"] and each["perplexity"] * each["nll_stderr"] for each in results]
        label = f"perplexity, {_window_label(first)}"
        _row(table, label, values, ".2f", spreads=errors, change=change)
    return remarks


def _fidelity(table: Table, columns: Sequence[Judged]) -> None:
    """Rows of the judged model, which is the last column."""
    for result in columns[-1].get("fidelity", ()):
        where = _window_label(result)
        loss = ("loss, " if result["count"] == "all" else "loss of responses, ") + where
        _row(table, loss, [result["dense_loss"], result["loss"]], ".3f", spreads=[None, result["loss_stderr"]])
        for name, key, form in (("KL", "kl", ".4f"), ("top-1 agreement", "top1_agreement", ".1%")):
            spread = result[f"{key}_stderr"]
            _row(table, f"{name}, {where}", [None, result[key]], form, spreads=[None, spread])


def _inference(table: Table, columns: Sequence[Judged]) -> list[str]:
    """Rows of times with half their interquartile range, and of bytes; what the memory is of, as a remark."""
    if "inference" not in columns[0]:
        return []
    results = [each["inference"] for each in columns]
    first = results[0]
    several = "" if first["batch_size"] == 1 else f"{first['batch_size']} x "
    times = (("prefill_ms", f"prompt of {several}{first['prompt_length']}, ms"), ("token_ms", "each further token, ms"))
    for key, name in times:
        ranges = [each[f"{key}_iqr"] for each in results]
        halves = [None if spread is None else spread / 2 for spread in ranges]
        _row(table, name, [each[key] for each in results], ".1f", spreads=halves)
    for name, key, factor, form in _INFERENCE:
        _row(table, name, [factor * each[key] for each in results], form)
    return [f"peak memory: {' / '.join(dict.fromkeys(each['peak_memory_by'] for each in results))}"]


def _generation(table: Table, columns: Sequence[Judged]) -> None:
    if "generation" not in columns[0]:
        return
    figures = [each["generation"]["figures"] for each in columns]
    for name, key, form in _FIGURES:
        values = [each[key] for each in figures]
        if any(value is not None for value in values):
            _row(table, f"{name}, greedy text" if "greedy" not in name else name, values, form, change="")


def _window_label(result: Mapping[str, Any]) -> str:
    return f"{PurePath(str(result['text'])).name}, {result['samples']} x {result['length']}"
