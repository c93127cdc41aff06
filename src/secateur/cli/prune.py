"""`secateur prune`."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import to_builtins
from rich.markup import escape
from rich.table import Table

from secateur.cli.groups import grouped
from secateur.cli.guard import note, out, say, start_logging
from secateur.cli.options import (
    BOS,
    ROUND_TO,
    SEED,
    CalibrationOptions,
    CompensationOptions,
    For,
    GoalOptions,
    KeepRun,
    KeepStates,
    ModelName,
    OfShare,
    OutputOptions,
    Overwrite,
    ShardSize,
    SourceOptions,
    WorkerOptions,
)  # fmt: skip
from secateur.cli.progress import Bars
from secateur.errors import InvalidOptionError
from secateur.signatures import RECOMMENDED, Option, builtin_options

if TYPE_CHECKING:
    from secateur.forecast import Forecast
    from secateur.record import Record


def _prune(
    model: ModelName,
    *,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of parameters to remove, between 0 and 1; or give a goal.")
    ] = None,
    goals: GoalOptions,
    method: Annotated[str, typer.Option(help="`secateur methods` lists them.")] = RECOMMENDED,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None,
    of: OfShare = "blocks",
    round_to: Annotated[int | None, ROUND_TO] = None,
    for_: For = "any",
    seed: Annotated[int, SEED] = 0,
    bos: Annotated[str, BOS] = "auto",
    calibration: CalibrationOptions,
    compensation: CompensationOptions,
    perplexity_on: Annotated[
        list[str] | None,
        typer.Option("--perplexity", help="Measure on this text before and after; may be repeated."),
    ] = None,
    eval_samples: Annotated[int | None, typer.Option(help="First windows of it; all if not given.")] = None,
    eval_length: Annotated[int, typer.Option(help="Tokens per window of it.")] = 2048,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take; writes nothing.")] = False,
    overwrite: Overwrite = False,
    max_shard_size: ShardSize = "5GB",
    keep_run: KeepRun = False,
    keep_states: KeepStates = 0,
    source: SourceOptions,
    workers: WorkerOptions,
    output: OutputOptions,
    **options: Any,
) -> None:
    """Prune a model and write a smaller checkpoint.

    Options below "Method options" are those of the methods named beside them.
    """
    from secateur.forecast import forecast
    from secateur.judge.judging import Judging
    from secateur.output import Output
    from secateur.planning import Request
    from secateur.running import prune_to

    start_logging(output.log_level, output.log_file)
    judging = Judging(texts=tuple(perplexity_on or ()), length=eval_length, samples=eval_samples, bos=bos)  # type: ignore[arg-type]  # checked there
    goal = goals.of(judging)
    if (sparsity is None) == (goal is None):
        raise InvalidOptionError(
            "one of --sparsity, --target-bytes, --target-speedup and --max-perplexity-increase says how much is to go"
        )
    request = Request(
        sparsity=sparsity, goal=goal, method=method, of=of, round_to=round_to, for_=for_,  # type: ignore[arg-type]  # `of` is checked there
        options=_method_options(method, options), seed=seed, bos=bos,  # type: ignore[arg-type]  # `bos` is checked there
        data=source.data, cache=source.cache_dir, text_field=source.text_field,
        refit=compensation.refit, filters=compensation.filters(), **vars(calibration),
    )  # fmt: skip
    if dry_run:
        _show_forecast(forecast(request, source.of(model), keep_states=keep_states), output.as_json)
        return
    if out_dir is None:
        raise InvalidOptionError("--out DIR is missing: the folder to write (or ask for --dry-run)")
    outcome = prune_to(
        request, source.of(model), Output(out_dir, overwrite, max_shard_size, keep_run, keep_states),
        judging=judging, observer=Bars(), arguments={"command": sys.argv[1:]}, workers=workers.of(),
    )  # fmt: skip
    output.tell(outcome, out_dir, _show)


def method_flags(methods: Mapping[str, Mapping[str, Option]], taken: Container[str]) -> Iterator[inspect.Parameter]:
    """A flag per name of an option, told apart by its help; what cannot be one is told and left out.

    Args:
        methods: their options; the first that has a name decides whether it is on or off, or has a value.
        taken: names that the command has already.
    """
    by_name: dict[str, list[tuple[str, Option]]] = {}
    for method, options in methods.items():
        for option in options.values():
            users = by_name.setdefault(option.name, [])
            if option.name in taken:
                _not_a_flag(method, option, "it is the name of an option of every method")
            elif users and option.is_switch != users[0][1].is_switch:
                _not_a_flag(method, option, f"in {users[0][0]} it is {users[0][1].allowed}, here {option.allowed}")
            else:
                users.append((method, option))
    for name, users in by_name.items():
        if users:
            explained = "; ".join(f"{user}: {option.help} ({option.default_in_words})" for user, option in users)
            flag = typer.Option(help=explained, rich_help_panel="Method options", show_default=False)
            kind = bool if users[0][1].is_switch else str  # str: each method reads its own words
            yield inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag]
            )


def _options_by_method() -> dict[str, dict[str, Option]]:
    """Our methods' and then those of other packages, which are imported if there are any."""
    ours = builtin_options()
    if not entry_points(group="secateur.methods"):
        return ours
    from secateur.methods import methods

    return ours | {name: method.options for name, method in methods().items() if name not in ours}


def _not_a_flag(method: str, option: Option, why: str) -> None:
    note(f"the option '{option.name}' of {method} is left out: {why}")


def _method_options(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Those that were given, refused where the method has none of that name."""
    from secateur.methods import get_method

    options = get_method(method).options
    chosen = {
        name: options[name].parse(value) if name in options and isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }
    get_method(method).complete(chosen)
    return chosen


def _show(record: Record, folder: Path) -> None:
    before, after = record.before, record.after
    table = Table("", "before", "after", "", box=None, pad_edge=False)

    def row(name: str, old: float, new: float, form: str = ",.0f", unit: str = "") -> None:
        table.add_row(
            escape(name), f"{old:{form}}{unit}", f"{new:{form}}{unit}", f"{new / old - 1:+.1%}" if old else ""
        )

    row("parameters", before.parameters, after.parameters)
    row("weights", before.weight_bytes / 1e6, after.weight_bytes / 1e6, ",.1f", " MB")
    row("blocks", before.blocks, after.blocks)
    row("attention modules", before.attentions, after.attentions)
    row("KV heads", before.kv_heads, after.kv_heads)
    row("FFN neurons", before.neurons, after.neurons)
    if after.stream_width != before.stream_width:
        row("hidden width", before.stream_width, after.stream_width)
    for text in record.perplexity or ():
        row(f"perplexity, {Path(text.text).name}", text.before, text.after, ".2f")
    achieved, cost = record.achieved, record.cost
    asked = f"{record.sparsity.sentence}\n" if record.sparsity else ""
    goal = f"{record.goal.sentence}\n" if record.goal else ""
    by, windows = " + ".join([record.method, *(record.filters or ())]), record.calibration or {}
    out.print(table)
    for remark in record.remarks:
        say(remark)
    say(
        f"{by}: {achieved.blocks:.2%} of the blocks' parameters removed ({achieved.model:.2%} of all) in "
        f"{cost.seconds:.0f} s, {_forwards(cost.forwards or 0, cost.forwards_asked or 0)}\n{asked}{goal}"
        f"calibrated on {windows.get('name')}, {windows.get('samples')} x {windows.get('length')} tokens\n"
        f"written to {folder} (tier {record.tier})"
    )


def _show_forecast(foretold: Forecast, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(foretold), default=to_builtins))
        return
    parameters = foretold.parameters
    say(
        f"{foretold.method} on {foretold.model}, {foretold.samples} x {foretold.length} tokens"
        f"{', each window begun by the begin-of-sequence token' if foretold.bos else ''}: "
        f"{parameters['before']:,} -> {parameters['after']:,} parameters\n"
        f"{foretold.sparsity.sentence}\n{foretold.goal.sentence + chr(10) if foretold.goal else ''}"
        f"peak memory {foretold.peak_memory_bytes / 1e9:.2f} GB beyond Python and torch"
        f"{', the weights streamed from their files' if foretold.streamed else ''}, "
        f"disk {foretold.disk_bytes / 1e9:.2f} GB, and at most {foretold.run_bytes / 1e9:.2f} GB beside it meanwhile\n"
        f"{_forwards(foretold.forwards, foretold.forwards_asked)}, "
        f"about {foretold.seconds:.0f} s by one probed block"
    )


def _forwards(done: float, asked: float) -> str:
    return f"{done:.1f} full-length forwards (of {asked:.1f} asked for)"


_OWN = inspect.signature(grouped(_prune)).parameters
prune = grouped(_prune, method_flags(_options_by_method(), _OWN))
