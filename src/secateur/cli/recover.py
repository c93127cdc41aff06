"""`secateur recover`."""

from __future__ import annotations

import inspect
import math
import sys
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import fields
from rich.table import Table

from secateur.cli.groups import grouped
from secateur.cli.guard import out, start_logging
from secateur.cli.options import FILES, KeepRun, ModelName, ModelOptions, OutputOptions, Overwrite, ShardSize, TextField
from secateur.cli.progress import Bars
from secateur.heal.settings import Settings, description

if TYPE_CHECKING:
    from secateur.record import Record


def _recover(
    model: ModelName,
    *,
    data: Annotated[
        str,
        typer.Option(
            help=f"Instructions (`instruction`, `input`, `output`), prompts with completions, chats or texts: {FILES}; "
            "or a text's name, as c4."
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write; checkpoints lie in OUT.run meanwhile.")],
    distill: Annotated[
        bool,
        typer.Option(
            "--distill",
            help="Learn from the predictions of the dense model that MODEL's record names, or of --teacher, instead of "
            "from labels.",
        ),
    ] = False,
    teacher: Annotated[str | None, typer.Option(help="Learn from this model's predictions.")] = None,
    licence: Annotated[str | None, typer.Option(help="The data's licence, for record and card.")] = None,
    overwrite: Overwrite = False,
    max_shard_size: ShardSize = "5GB",
    keep_run: KeepRun = False,
    source: ModelOptions,
    texts: Annotated[
        Path | None, typer.Option("--data-dir", envvar="SECATEUR_DATA", help="Folder with the named texts.")
    ] = None,
    text_field: TextField = None,
    output: OutputOptions,
    **settings: Any,
) -> None:
    """Heal a pruned model by LoRA, the adapters merged, or by training all of it, and write it.

    Interrupted, it says where it stands; the same command goes on from there. The defaults are SlimGPT's.
    """
    start_logging(output.log_level, output.log_file)
    chosen = Settings(**settings)  # a bad value is told before torch is imported

    from secateur.heal.recover import RecoveryRequest, recover_to
    from secateur.output import Output

    outcome = recover_to(
        RecoveryRequest(
            data=data, settings=chosen, licence=licence, texts=texts, cache=source.cache_dir, text_field=text_field
        ),
        replace(source.of(model), stream=False), Output(out_dir, overwrite, max_shard_size, keep_run), observer=Bars(),
        distill=replace(source, revision=None).of(teacher) if teacher else distill or None,
        arguments={"command": sys.argv[1:]},
    )  # fmt: skip
    output.tell(outcome, out_dir, _show)


def _setting_flags() -> Iterator[inspect.Parameter]:
    """A flag for each of the settings."""
    kinds = typing.get_type_hints(Settings)
    for field in fields(Settings):
        kind = str if typing.get_origin(kinds[field.name]) is typing.Literal else kinds[field.name]
        names = (f"--{field.name}",) if kind is bool else ()  # without a --no- of it
        flag = typer.Option(*names, help=description(field.type), rich_help_panel="Training")
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, flag]
        )


recover = grouped(_recover, _setting_flags())


def _show(record: Record, folder: Path) -> None:
    recovery = record.recovery
    assert recovery is not None  # narrows the type; the record is of a recovery
    data, labels = recovery.data, recovery.objective == "labels"
    heading = ("held-out loss", "perplexity") if labels else ("held-out KL, nats",)
    table = Table("step", "tokens seen", *heading, box=None, pad_edge=False)
    seen = dict(recovery.tokens_seen)
    for step, loss in recovery.held_out_loss.curve:
        perplexity = [f"{math.exp(min(loss, 700)):.2f}"] if labels else []
        table.add_row(f"{step:,}", f"{seen[step]:,}", f"{loss:.4f}", *perplexity)
    out.print(table)
    out.print(
        f"{data.train:,} rows of {data.name} ({data.dropped:,} of {data.rows:,} dropped, "
        f"{data.held_out:,} held out), {recovery.steps:,} steps in {record.cost.seconds:.0f} s; "
        f"{record.after.parameters:,} parameters, as before\n"
        f"licence of the data: {data.licence or 'not known (give --licence)'}\n"
        f"written to {folder} (tier {record.tier})",
        highlight=False,
        markup=False,
    )
