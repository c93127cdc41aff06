"""`secateur inspect`."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import convert, to_builtins
from rich.table import Table

from secateur.cli.guard import out, say
from secateur.cli.options import CacheDir, Json, ModelName, Revision

if TYPE_CHECKING:
    from secateur.model.handle import Model
    from secateur.model.modeling_secateur import Shape
    from secateur.record import Record


def inspect(
    model: ModelName,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare the weight files, fetched if need be, with the sums written with them."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a model is made of, which exports fit it and, if secateur pruned it, how. Loads no weights."""
    from secateur.model.described import describe, verify_weights
    from secateur.model.load import Source, record_of

    hollow = Source(name=model, revision=revision, cache=cache_dir).hollow(tokenizer=True)
    about = describe(hollow.source["location"], hollow.source["revision"])  # `demo` is no folder of that name
    shapes = [block.shape for block in hollow.layout().blocks.values()]
    summary = {"model": model, **_model_facts(hollow, shapes), **_history(record_of(about))}
    if verify:
        summary["verified"] = verify_weights(about)
    if as_json:
        print(json.dumps(summary))
    else:
        _show(summary, _block_table(shapes, hollow.hidden_size))


def _model_facts(hollow: Model, shapes: list[Shape]) -> dict[str, Any]:
    from secateur.export import EXPORTS, refusal
    from secateur.model.modeling_secateur import PREFIX

    layout = hollow.layout()
    return {
        "family": hollow.family.model_type,
        "native": hollow.source["model_type"].startswith(PREFIX),
        "parameters": layout.parameters,
        "block_parameters": layout.block_parameters,
        "hidden_size": hollow.hidden_size,
        "needs_bos": hollow.family.needs_bos,
        "dtype": str(hollow.dtype).removeprefix("torch."),
        "blocks": [vars(shape) for shape in shapes],
        "exports": {name: refusal(hollow, name) for name in EXPORTS},  # None where it fits, else why not
    }


def _history(record: Record | None) -> dict[str, Any]:
    """How it was last pruned, how it was healed, what was measured: as far as there is any."""
    if record is None:
        return {}
    history: dict[str, Any] = {"evaluations": record.evaluations}
    if pruned := next((step for step in reversed(record.chain) if step.recovery is None), None):
        parts = ("method", "options", "sparsity", "tier", "calibration", "created")
        history["pruned"] = {name: value for name, value in pruned.to_json().items() if name in parts}
        history["pruned"]["edits"] = dict(Counter(edit["edit"] for edit in pruned.edits))
    if recoveries := [step.recovery for step in record.chain if step.recovery is not None]:
        history["recoveries"] = to_builtins(recoveries)
    return history


def _show(summary: dict[str, Any], blocks: Table) -> None:
    from secateur.model.described import SUMS
    from secateur.record import Recovery

    say(
        f"{summary['model']}: {summary['family']}, {summary['parameters']:,} parameters "
        f"({summary['block_parameters']:,} in blocks), hidden size {summary['hidden_size']}, {summary['dtype']}"
        + (", texts begin with the begin-of-sequence token (--bos)" if summary["needs_bos"] else "")
    )
    out.print(blocks)
    for name, reason in summary["exports"].items():
        say(f"export --to {name}: {'fits' if reason is None else f'no, it {reason}'}")
    if "verified" in summary:
        say("weights: as secateur wrote them" if summary["verified"] else f"weights: no {SUMS} to compare with")
    if pruned := summary.get("pruned"):
        achieved, edits = pruned["sparsity"]["achieved"], (f"{count} {kind}" for kind, count in pruned["edits"].items())
        say(
            f"pruned by {pruned['method']}: {achieved['blocks']:.2%} of the blocks' parameters "
            f"({achieved['model']:.2%} of all); edits: {', '.join(edits)}"
        )
    for recovery in convert(summary.get("recoveries", []), list[Recovery]):
        data, losses = recovery.data, recovery.held_out_loss
        say(
            f"trained {recovery.way} on {data.train:,} rows of {data.name}: held-out loss {losses.before:.4f} to "
            f"{losses.after:.4f}; licence of the data: {data.licence or 'not known'}"
        )


def _block_table(shapes: list[Shape], hidden: int) -> Table:
    """Blocks of one shape in a row share a line."""
    rebased = any(shape.attention_skip or shape.mlp_skip for shape in shapes)
    stream = ["residual stream"] if rebased else []
    table = Table("blocks", "FFN neurons", "query heads", "KV heads", *stream, box=None, pad_edge=False)
    for shape, group in groupby(enumerate(shapes), key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        name = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        widths = [" > ".join(map(str, shape.stream(hidden)))] if rebased else []
        sizes = (str(n) if n else "none" for n in (shape.width, shape.query_heads, shape.kv_heads))
        table.add_row(name, *sizes, *widths)
    return table
