"""`secateur eval`: judges a model and shows one table, the models side by side, and samples of their text below."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Annotated

import typer
from msgspec import to_builtins
from rich.markup import escape
from rich.table import Table

import secateur
from secateur.cli.groups import grouped
from secateur.cli.guard import EXIT_FAILED, note, out, say, start_logging
from secateur.cli.options import BOS, ModelName, OutputOptions, RunningOptions, SourceOptions, TaskOptions
from secateur.cli.progress import Bars
from secateur.errors import CheckpointError, InvalidOptionError
from secateur.judge.averages import STANDARD_ERRORS, at_chance
from secateur.judge.results import Evaluation, Fidelity, Inference, Judgement, Perplexity, TaskResult

Value = float | None

_INFERENCE = (
    ("throughput, tokens/s", "throughput_tokens_s", 1.0, ",.1f"),
    ("KV cache, bytes per token", "kv_bytes_per_token", 1.0, ",.0f"),
    ("peak memory, MB", "peak_memory_bytes", 1e-6, ",.1f"),
)
_FIGURES = (
    ("greedy agreement", "greedy_agreement", ".1%"), ("tokens before it differs", "common_prefix_tokens", ".1f"),
    ("distinct tokens, greedy text", "distinct_1", ".1%"), ("distinct pairs, greedy text", "distinct_2", ".1%"),
    ("distinct triples, greedy text", "distinct_3", ".1%"), ("ended by itself, greedy text", "ended_share", ".0%"),
)  # fmt: skip


@grouped
def evaluate(
    model: ModelName,
    *,
    against: Annotated[
        str | None, typer.Option(help="Another model, usually the dense one, on the same tokens and in turn.")
    ] = None,
    perplexity: Annotated[list[str] | None, typer.Option(help="A text's name or file; may be repeated.")] = None,
    fidelity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Loss, KL divergence from the model of --against and agreement with it, on your own text or chat file "
            "(of chats only responses count); may be repeated.",
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    samples: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    bos: Annotated[str, BOS] = "auto",
    running: RunningOptions,
    tasks: TaskOptions,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help='Exit with code 4 if this holds of the model, as "kl>0.1"; may be repeated.'
        ),
    ] = None,
    source: SourceOptions,
    output: OutputOptions,
) -> None:
    """Judge a model, pruned or dense: perplexity, fidelity to the dense one, cost of running it, its text, tasks.

    The result of a checkpoint of secateur's is added to its secateur.json.
    """
    from secateur.judge.judging import Judging
    from secateur.record import append_evaluation

    start_logging(output.log_level, output.log_file)
    judging = Judging(texts=tuple(perplexity or ()), length=length, samples=samples, bos=bos)  # type: ignore[arg-type]  # checked there
    judging = running.applied(tasks.applied(judging))
    if not (fidelity or judging.texts or judging.inference or judging.prompts or judging.tasks):
        raise InvalidOptionError(
            "nothing to do: give --perplexity TEXT, --fidelity FILE, --inference, --generate PROMPT or --tasks NAME"
        )
    other = replace(source, revision=None).of(against) if against else None
    report = secateur.evaluate(
        source.of(model), judging, against=other, fidelity_on=fidelity or (), fail_if=fail_if or (), data=source.data,
        cache=source.cache_dir, text_field=source.text_field, run=secateur.Run(observer=Bars()),
    )  # fmt: skip
    entries = to_builtins(report)
    if output.as_json:
        print(json.dumps(entries))
    else:
        _show(report)
    if model != "demo":  # the asset, not a folder of that name
        stamp = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "dtype": source.dtype}
        try:
            append_evaluation(Path(model), {**stamp, **entries})
        except (OSError, CheckpointError) as error:
            note(f"the result could not be added to {model}/secateur.json: {error}")
    for failure in report.failed or ():
        value = "not known" if failure.value is None else f"{failure.value:.6g}"
        note(f"failed, {failure.condition}: {failure.figure} is {value}")
    if report.failed:
        raise typer.Exit(EXIT_FAILED)


# --- the table ---


def _show(report: Evaluation) -> None:
    columns = [*([report.against] if report.against else []), report.model]
    names = [PurePath(str(column.name)).name for column in columns]
    table = _Comparison(names)
    table.row("parameters", [column.parameters for column in columns], ",")
    table.row("weights, MB", [column.weight_bytes / 1e6 for column in columns], ",.1f")
    for results in zip(*(column.perplexity or () for column in columns), strict=True):
        _perplexity(table, results)
    for result in columns[-1].fidelity or ():
        _fidelity(table, result)
    if inference := [column.inference for column in columns if column.inference]:
        _inference(table, inference)
    if generation := [column.generation for column in columns if column.generation]:
        for name, field, form in _FIGURES:
            values = [getattr(each.figures, field) for each in generation]
            if any(value is not None for value in values):
                table.row(name, values, form, change="")
    _tasks(table, columns)
    table.print()
    for name, column in zip(names, columns, strict=True):
        for sample in column.generation.samples if column.generation else ():
            say(f"\n{name}, {sample.settings['name']}: {sample.prompt}", style="bold")
            say(sample.text.strip())


class _Comparison:
    """A table of one or two models, with remarks below; of two also by how much the second differs."""

    def __init__(self, models: Sequence[str]) -> None:
        self.several = len(models) == 2
        self.remarks: list[str] = []
        self._table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        self._table.add_column("")  # on a narrow terminal words wrap, and figures stay whole
        for heading in (*models, *([""] if self.several else [])):
            self._table.add_column(escape(heading), no_wrap=True)

    def row(
        self,
        name: str,
        values: Sequence[Value],
        form: str | Callable[[float], str],
        *,
        spreads: Sequence[Value] = (),
        unit: str = "",
        change: str | None = None,
        style: str | None = None,
    ) -> None:
        """Add a row.

        Args:
            spreads: of the values, shown behind them.
            change: shown instead of the ratio of the two.
        """
        shown = form if callable(form) else lambda value: format(value, form)
        cells = ["-" if value is None else shown(value) for value in values]
        for place, spread in enumerate(spreads):
            cells[place] += "" if spread is None else f" ± {shown(spread)}"
        cells = [cell + unit for cell in cells]
        first, last = values[0], values[-1]
        if self.several and change is None and first and last is not None:
            change = f"{last / first - 1:+.1%}"
        self._table.add_row(*map(escape, [name, *cells, *([change or ""] if self.several else [])]), style=style)

    def print(self) -> None:
        out.print(self._table)
        for remark in self.remarks:
            say(remark, style="dim")


def _perplexity(table: _Comparison, results: Sequence[Perplexity]) -> None:
    """A row with standard errors; where the tokens differ, no change is shown but the reason told."""
    from secateur.judge.perplexity import ratio

    change = None
    if len(results) == 2:
        try:
            change = f"{ratio(*results) - 1:+.1%}"
        except InvalidOptionError as error:
            change = "other tokens"
            table.remarks.append(str(error))
    values = [result.perplexity for result in results]
    errors = [
        result.nll_stderr and value and value * result.nll_stderr for value, result in zip(values, results, strict=True)
    ]
    table.row(f"perplexity, {_windows(results[0])}", values, ".2f", spreads=errors, change=change)


def _fidelity(table: _Comparison, result: Fidelity) -> None:
    loss = "loss" if result.count == "all" else "loss of responses"
    for name, values, spread, form in (
        (loss, [result.dense_loss, result.loss], result.loss_stderr, ".3f"),
        ("KL", [None, result.kl], result.kl_stderr, ".4f"),
        ("top-1 agreement", [None, result.top1_agreement], result.top1_agreement_stderr, ".1%"),
    ):
        table.row(f"{name}, {_windows(result)}", values, form, spreads=[None, spread])


def _inference(table: _Comparison, results: Sequence[Inference]) -> None:
    """Rows of times with half their interquartile range, and of bytes; what the memory is of, as a remark."""
    first = results[0]
    several = "" if first.batch_size == 1 else f"{first.batch_size} x "
    times = (("prefill_ms", f"prompt of {several}{first.prompt_length}, ms"), ("token_ms", "each further token, ms"))
    for field, name in times:
        ranges = [getattr(result, f"{field}_iqr") for result in results]
        halves = [None if spread is None else spread / 2 for spread in ranges]
        table.row(name, [getattr(result, field) for result in results], ".1f", spreads=halves)
    for name, field, factor, form in _INFERENCE:
        table.row(name, [factor * getattr(result, field) for result in results], form)
    how = dict.fromkeys(str(result.peak_memory_by) for result in results)
    table.remarks.append(f"peak memory: {' / '.join(how)}")


def _windows(result: Perplexity | Fidelity) -> str:
    return f"{PurePath(str(result.text)).name}, {result.samples} x {result.length}{', with bos' if result.bos else ''}"


def _tasks(table: _Comparison, columns: Sequence[Judgement]) -> None:
    """A row per task, grey where the first column's model is near chance."""
    grey = False
    for name, first in (columns[0].tasks or {}).items():
        results = [column.tasks[name] for column in columns if column.tasks]
        values, spreads = [result.value for result in results], [result.stderr for result in results]
        near = at_chance(first) is not None
        grey |= near
        share = first.chance is not None  # in per cent; any other metric as it is
        change, form, unit = "", _percent if share else ".3g", " %" if share else ""
        if values[0] is not None and (last := values[-1]) is not None:
            change = f"{100 * (last - values[0]):+.1f} points" if share else f"{last - values[0]:+.3g}"
        style = "dim" if near else None
        table.row(_task_label(first, near), values, form, spreads=spreads, unit=unit, change=change, style=style)
        if first.truncated:
            table.remarks.append(
                f"{name}: {first.truncated} sequences are longer than the model's positions and lost their beginning"
            )
    if grey:
        who = "what it is judged against" if table.several else "the model"
        table.remarks.append(
            f"near chance: {who} is within {STANDARD_ERRORS:g} standard errors of it or below; differences say nothing"
        )


def _task_label(result: TaskResult, near: bool) -> str:
    shots = f", {result.fewshot}-shot from {result.fewshot_split}" if result.fewshot else ""
    chance = f" ({'near ' * near}chance, {_percent(result.chance)} %)" if result.chance is not None else ""
    return f"{result.task}, {result.metric}{shots}, {result.documents:,} documents{chance}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
