"""`secateur plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import mean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from secateur.cli.groups import grouped
from secateur.cli.guard import out, say
from secateur.cli.options import Json, ModelName, ModelOptions, words
from secateur.cli.progress import in_words
from secateur.errors import InvalidOptionError

if TYPE_CHECKING:
    from secateur.fitting import Fitting, Need


def _plan(
    model: ModelName,
    *,
    fits: Annotated[str, typer.Option(metavar="SIZE", help="The memory that it must run in, as 24GB or 16GiB.")],
    context: Annotated[
        str, typer.Option(metavar="TOKENS", help="Tokens of each sequence in the KV cache, as 4096 or 32k.")
    ] = "4096",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    method: Annotated[
        str | None, typer.Option("--methods", help="Methods, commas between.", show_default="all")
    ] = None,
    sparsities: Annotated[
        str, typer.Option(help="Shares of the blocks' parameters to list where they fit, commas between.")
    ] = "0.125,0.25,0.375,0.5",
    as_json: Json = False,
    source: ModelOptions,
) -> None:
    """List what fits into a memory: the dense model, or methods and sparsities, with what each takes and what the demo
    model lost by it. The configuration is enough; no weights are read."""
    from secateur.fitting import fitting
    from secateur.judge.inference import at_least_one
    from secateur.methods import get_method
    from secateur.quantities import bytes_of, share_of, tokens_of

    at_least_one(batch=batch)
    shares = [share_of(word, "a sparsity") for word in words(sparsities)]
    if not all(0 < share < 1 for share in shares):
        raise InvalidOptionError(f"sparsities lie strictly between 0 and 1, not {sparsities}")
    names = [get_method(name).name for name in words(method)]
    size, length = bytes_of(fits, "--fits"), tokens_of(context, "--context")
    answer = fitting(source.of(model), fits=size, context=length, batch=batch, sparsities=shares, names=names)
    if as_json:
        print(json.dumps(asdict(answer)))
    else:
        _show(answer)


def _show(answer: Fitting) -> None:
    sequences = f"{answer.batch} x {answer.context:,} tokens"
    verdict = "fits as it is" if answer.dense_fits else "does not fit"
    say(f"{answer.model} in {answer.dtype}, {sequences}, in {_gb(answer.fits_bytes)} GB: the dense model {verdict}")
    table = Table("method", "share", box=None, pad_edge=False)
    for heading in ("weights", "KV", "in all", "forwards", "time", "to prune", "loss"):
        table.add_column(heading, justify="right")
    for column in table.columns:
        column.no_wrap = True
    table.add_row("dense", "", *_needs(answer.dense))
    for choice in answer.choices:
        loss = choice.demo_loss
        table.add_row(
            escape(choice.method), f"{choice.sparsity:.4g}{' (least)' if choice.least else ''}", *_needs(choice.need),
            f"{choice.forwards:,.0f}", in_words(choice.seconds), _gb(choice.pruning_bytes),
            f"{mean(loss.values()):+.2f}" if loss else "?",
        )  # fmt: skip
    out.print(table)
    for name, reason in answer.refused.items():
        say(f"{name}: {reason}")
    say(
        "Sizes in GB. KV: the cache of all sequences at full length. In all: with an estimate of activations, of one "
        "prompt at a time. Forwards, time, to prune: what the pruning takes on this device, by one probed block."
    )
    say(
        f"Loss: the demo model's (?: not measured), in nats per token above dense, the mean over {_texts(answer)}, "
        f"between measured sizes on a straight line ({answer.loss_source}). "
        + (
            "It was measured on this model."
            if answer.is_demo
            else "What this model would lose is not known: nothing was measured on it, and larger models tend to lose "
            "less. The column only says which methods lost more on a model of 135M."
        )
    )


def _needs(need: Need) -> list[str]:
    return [_gb(size) for size in (need.weights, need.kv_cache, need.total)]


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f}"


def _texts(answer: Fitting) -> str:
    return ", ".join(next((list(each.demo_loss) for each in answer.choices if each.demo_loss), ["its texts"]))


plan = grouped(_plan)
