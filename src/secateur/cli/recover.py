"""`secateur recover`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from secateur.cli.guard import err, out, start_logging
from secateur.cli.options import (
    CacheDir,
    Device,
    Dtype,
    Json,
    LogFile,
    LogLevel,
    ModelName,
    Revision,
)  # fmt: skip
from secateur.cli.progress import Bars

if TYPE_CHECKING:
    from secateur.record import Record

_TRAINING = "Training"


def recover(
    model: ModelName,
    data: Annotated[
        str,
        typer.Option(
            help="A .jsonl file with `instruction`, `input`, `output` (Alpaca), or `messages` (chat), or `text`; a "
            ".txt file; or a text's name, as c4."
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write; checkpoints lie in OUT.run meanwhile.")],
    distill: Annotated[
        str | None,
        typer.Option(help="Learn from this model's predictions, usually the dense one's, instead of from labels."),
    ] = None,
    template: Annotated[
        str,
        typer.Option(help="How instructions are put: alpaca (the paper's prompt) or the model's own chat template."),
    ] = "alpaca",
    licence: Annotated[str | None, typer.Option(help="The data's licence, for record and card.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option(help="So many optimizer steps instead.", rich_help_panel=_TRAINING)
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_TRAINING)] = 1e-4,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear rise to it.", rich_help_panel=_TRAINING)] = 10,
    global_batch: Annotated[int, typer.Option(help="Rows per optimizer step.", rich_help_panel=_TRAINING)] = 64,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Rows per forward, as memory allows; divides --global-batch. Up to 8 if not given.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens per row.", rich_help_panel=_TRAINING)] = 256,
    rank: Annotated[int, typer.Option(help="Of the adapters.", rich_help_panel=_TRAINING)] = 8,
    alpha: Annotated[float, typer.Option(help="Of the adapters.", rich_help_panel=_TRAINING)] = 16.0,
    dropout: Annotated[float, typer.Option(help="Of the adapters.", rich_help_panel=_TRAINING)] = 0.05,
    held_out: Annotated[
        int | None,
        typer.Option(
            help="Rows to measure on and never train on; 8 %, at most 2000, if not given.", rich_help_panel=_TRAINING
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between two measurements; a quarter of all if not given.", rich_help_panel=_TRAINING),
    ] = None,
    autocast: Annotated[
        bool,
        typer.Option(
            "--autocast",
            help="Training's matrix products in bfloat16, as in the paper: faster. Weights and measurements stay as "
            "they are.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of rows held out, order, adapters, dropout.", rich_help_panel=_TRAINING)
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is there.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Larger models are saved in shards.")] = "5GB",
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    texts: Annotated[
        Path | None,
        typer.Option("--data-dir", envvar="SECATEUR_DATA", help="Folder with the named texts."),
    ] = None,
    cache_dir: CacheDir = None,
    log_level: LogLevel = "warning",
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Heal a pruned model by LoRA and write it, the adapters merged.

    Interrupted, it says where it stands; the same command goes on from there. The defaults are SlimGPT's.
    """
    from secateur.heal import Settings, require_extra
    from secateur.heal.recover import forget_run, prepare_recovery, run_folder, run_recovery
    from secateur.model.load import load
    from secateur.output import Output
    from secateur.run import Run

    start_logging(log_level, log_file)
    require_extra()
    settings: dict[str, Any] = {
        "epochs": epochs, "max_steps": max_steps, "lr": lr, "warmup_steps": warmup_steps, "global_batch": global_batch,
        "batch_size": batch_size, "max_length": max_length, "rank": rank, "alpha": alpha, "dropout": dropout,
        "held_out": held_out, "eval_every": eval_every, "autocast": autocast,
        "template": template, "seed": seed,
    }  # fmt: skip
    Settings(**settings)  # a bad value is told before a model is loaded
    output = Output(out_dir, overwrite, max_shard_size)
    output.check(model, distill, data)
    loaded = load(model, device=device, dtype=dtype, revision=revision, cache=cache_dir)
    teacher = load(distill, device=device, dtype=dtype, cache=cache_dir) if distill else None
    job = prepare_recovery(loaded, data, distill=teacher, licence=licence, texts=texts, cache=cache_dir, **settings)
    with output.claimed():
        if (record := output.holds(job.fingerprint)) is not None:
            told = f"{out_dir} already holds this result; `secateur eval` measures it"
            err.print(told, markup=False, highlight=False)
        else:
            output.require_space(job.disk_bytes)
            folder = run_folder(out_dir)
            recovered = run_recovery(
                job, checkpoints=folder, overwrite=overwrite, run=Run(seed, observer=Bars()),
                arguments={"command": sys.argv[1:]},
            )  # fmt: skip
            output.write(recovered)
            forget_run(folder)
            record = recovered.record
    if as_json:
        print(json.dumps({"out": str(out_dir), **record.summary()}))
    else:
        _show(record, out_dir)


def _show(record: Record, folder: Path) -> None:
    recovery = record.recovery
    assert recovery is not None  # narrows the type; the record is of a recovery
    data, labels = recovery.data, recovery.objective == "labels"
    heading = ("held-out loss", "perplexity") if labels else ("held-out KL, nats",)
    table = Table("step", *heading, box=None, pad_edge=False)
    for step, loss in recovery.held_out_loss.curve:
        table.add_row(str(step), f"{loss:.4f}", *([f"{math.exp(min(loss, 700)):.2f}"] if labels else []))
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
