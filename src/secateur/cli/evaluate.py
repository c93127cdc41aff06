"""`secateur eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

import secateur
from secateur.cli.guard import EXIT_FAILED, err, start_logging
from secateur.cli.judged import show
from secateur.cli.options import (
    CacheDir,
    Data,
    Device,
    Dtype,
    Json,
    LogFile,
    LogLevel,
    ModelName,
    Revision,
)  # fmt: skip
from secateur.cli.progress import Bars
from secateur.cli.tasks import Fewshot, Limit, Tasks, unfolded
from secateur.errors import CheckpointError, InvalidOptionError
from secateur.evaluation.generation import REFERENCE, REFERENCE_PROMPTS
from secateur.model.load import load
from secateur.report.record import append_evaluation
from secateur.run import Run

_THEIRS = "2ssp"  # among prompts


def evaluate(
    model: ModelName,
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
    inference: Annotated[
        bool, typer.Option("--inference", help="Time the prompt and each further token; count bytes and memory.")
    ] = False,
    prompt_length: Annotated[int, typer.Option(help="--inference: tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="--inference: tokens after it.")] = 16,
    rounds: Annotated[int, typer.Option(help="--inference: measured rounds, after one to warm up.")] = 5,
    batch_size: Annotated[int, typer.Option(help="--inference: prompts at once.")] = 1,
    generate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPT",
            help="Continue this prompt greedily; may be repeated. 2ssp stands for the two prompts of the 2SSP "
            "reference, and for --beams.",
        ),
    ] = None,
    beams: Annotated[
        bool,
        typer.Option("--beams", help="Continue prompts as the 2SSP reference does, too: 5 beams, no 3-gram twice."),
    ] = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help='Exit with code 4 if this holds of the model, as "kl>0.1"; may be repeated.'
        ),
    ] = None,
    tasks: Tasks = None,
    limit: Limit = None,
    fewshot: Fewshot = None,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    data: Data = None,
    cache_dir: CacheDir = None,
    log_level: LogLevel = "warning",
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Judge a model, pruned or dense: perplexity, fidelity to the dense one, cost of running it, its text, tasks.

    The result of a checkpoint of secateur's is added to its secateur.json.
    """
    start_logging(log_level, log_file)
    if not (perplexity or fidelity or inference or generate or tasks):
        raise InvalidOptionError(
            "nothing to do: give --perplexity TEXT, --fidelity FILE, --inference, --generate PROMPT or --tasks NAME"
        )
    prompts, theirs = _prompts(generate or ())
    options: dict[str, Any] = {"device": device, "dtype": dtype, "cache": cache_dir}
    judged = load(model, revision=revision, **options)
    other = load(against, **options) if against else None
    report = secateur.evaluate(
        judged, against=other, perplexity_on=perplexity or (), fidelity_on=fidelity or (), length=length,
        samples=samples, with_inference=inference, prompt_length=prompt_length, new_tokens=new_tokens, rounds=rounds,
        batch_size=batch_size, prompts=prompts, decodings=(REFERENCE,) if beams or theirs else (),
        tasks=unfolded(tasks), limit=limit, fewshot=fewshot, fail_if=fail_if or (),
        data=data, cache=cache_dir, run=Run(observer=Bars()),
    )  # fmt: skip
    stamp = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "dtype": dtype}
    if as_json:
        print(json.dumps(report))
    else:
        show(report)
    if model != "demo":  # the asset, not a folder of that name
        try:
            append_evaluation(Path(model), {**stamp, **report})
        except (OSError, CheckpointError) as error:
            err.print(f"the result could not be added to {model}/secateur.json: {error}", markup=False, highlight=False)
    _end(report.get("failed", ()))


def _prompts(given: Sequence[str]) -> tuple[list[str], bool]:
    """The prompts, each once, and whether the reference's are among them."""
    prompts = [prompt for word in given for prompt in (REFERENCE_PROMPTS if word == _THEIRS else (word,))]
    return list(dict.fromkeys(prompts)), _THEIRS in given


def _end(failed: Sequence[dict[str, Any]]) -> None:
    """Say what failed, and end with a code of its own."""
    for each in failed:
        value = "not known" if each["value"] is None else f"{each['value']:.6g}"
        err.print(f"failed, {each['condition']}: {each['figure']} is {value}", markup=False, highlight=False)
    if failed:
        raise typer.Exit(EXIT_FAILED)
