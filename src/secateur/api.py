"""secateur as Python: `prune`, `save` and what they stand on. The commands are thin wrappers of these."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from secateur.assets import Purpose, read_text
from secateur.driver import Pruning, run_method
from secateur.engine.tokens import Count, Tokens, tokenize
from secateur.errors import DataError, InvalidOptionError, OutputExistsError
from secateur.evaluation.perplexity import perplexity
from secateur.folders import resolved
from secateur.methods import get_method
from secateur.model.budget import Budget, Convention
from secateur.model.checkpoint import RECORD, Tier
from secateur.model.checkpoint import save as save_checkpoint
from secateur.model.handle import Model, require_finite, require_positions
from secateur.model.load import read_record
from secateur.report.record import dump, identity, make_record, public_name
from secateur.report.recovery import render_card
from secateur.run import Run


@dataclass(frozen=True)
class Pruned:
    """A pruned model with the account of how it came to be.

    Attributes:
        model: the same object that was given to `prune`, now smaller.
        record: what will be saved as `secateur.json`.
    """

    model: Model
    pruning: Pruning
    record: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Job:
    """A pruning that is fully specified and not yet run: every argument is checked, nothing is changed."""

    model: Model
    method: str
    tokens: Tokens
    budget: Budget
    seed: int
    options: dict[str, Any]
    model_fingerprint: str

    @property
    def fingerprint(self) -> str:
        """Identity of the outcome; the same in two runs of the same job."""
        return identity(self.model_fingerprint, self.tokens, self.method, self.options, self.budget, self.seed)


def read_tokens(
    model: Model,
    name: str,
    *,
    purpose: Purpose,
    length: int,
    samples: int | None = None,
    seed: int = 0,
    count: Count | None = "all",
    data: Path | None = None,
    cache: Path | None = None,
) -> Tokens:
    """Windows of a text for a model.

    Args:
        name: c4, wikitext2, fineweb-edu, demo, or a .txt, .jsonl or .parquet file.
        purpose: "calibration" or "evaluation": which split of a named text.
        length, samples, seed, count: see `secateur.engine.tokens.tokenize`. If count is None, of chat data responses
            count, of plain text all.
        data: folder with the named texts, for machines without a hub.

    Raises:
        DataError: the text is missing, unreadable or too short; the model has no tokenizer, or another model's.
        InvalidOptionError: windows longer than the model's positions.
    """
    if model.tokenizer is None:
        raise DataError("the model has no tokenizer; give `Tokens` instead of a text")
    require_positions(model.max_length, length)
    text = read_text(name, purpose=purpose, data=data, cache=cache)
    count = count or ("all" if text.conversations is None else "responses")
    tokens = tokenize(text, model.tokenizer, length=length, samples=samples, seed=seed, count=count)
    if (highest := int(tokens.ids.max())) >= model.vocab_size:
        raise DataError(
            f"the tokenizer does not fit the model: it gives token id {highest} for '{name}', and the model's "
            f"vocabulary has {model.vocab_size}. Put the model's own tokenizer beside its weights"
        )
    return tokens


def prepare(
    model: Model,
    method: str = "2ssp",
    *,
    sparsity: float,
    of: Convention = "blocks",
    round_to: int = 1,
    calibration: str | Tokens | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    count: Count = "all",
    data: Path | None = None,
    cache: Path | None = None,
    **options: Any,
) -> Job:
    """Check everything that `prune` will need. Arguments and errors are those of `prune`."""
    budget = Budget(sparsity, of=of, round_to=round_to)
    if isinstance(calibration, Tokens):
        tokens = calibration
        samples, length = tokens.samples, tokens.length
        _check_tokens(model, tokens)
    plan = get_method(method).plan(model, budget, samples, length, options)
    require_finite(model)
    if not isinstance(calibration, Tokens):
        name = calibration or ("demo" if model.source.get("asked") == "demo" else "c4")
        tokens = read_tokens(
            model, name, purpose="calibration", length=plan.length, samples=plan.samples, seed=seed, count=count,
            data=data, cache=cache,
        )  # fmt: skip
    return Job(model, method, tokens, budget, seed, plan.options, model.fingerprint())


def prune(
    model: Model,
    method: str = "2ssp",
    *,
    sparsity: float,
    of: Convention = "blocks",
    round_to: int = 1,
    calibration: str | Tokens | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    count: Count = "all",
    data: Path | None = None,
    cache: Path | None = None,
    run: Run | None = None,
    **options: Any,
) -> Pruned:
    """Prune a model in place.

    Args:
        sparsity: share of parameters to remove, in (0, 1).
        of: a share of the blocks' parameters, or of the whole model's.
        round_to: round FFN widths to a multiple of this, in methods that choose FFN widths.
        calibration: a text's name or file (c4 if None; demo for the demo model), or ready `Tokens`.
        samples, length: calibration windows; the paper's if None.
        seed: 0 takes the text's first windows, as the papers do; others draw from all.
        count: "responses" counts only what the assistant says, in chat data.
        options: the method's own; `secateur methods` lists them.

    Raises:
        InfeasibleBudgetError: with the reachable range. Other typed errors for other bad input, before anything is
            changed. If the run itself fails (NumericalError) or is interrupted, the model is left half-pruned: load it
            again.
    """
    job = prepare(
        model, method, sparsity=sparsity, of=of, round_to=round_to, calibration=calibration, samples=samples,
        length=length, seed=seed, count=count, data=data, cache=cache, **options,
    )  # fmt: skip
    return run_job(job, run=run)


def run_job(
    job: Job,
    *,
    run: Run | None = None,
    measure_on: Mapping[str, Tokens] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Pruned:
    """Run a prepared job.

    Args:
        measure_on: texts to take the perplexity on, before and after; goes into the record.
        arguments: goes into the record as given.
    """
    run = run or Run(job.seed)
    texts = dict(measure_on or {})
    judge = Run(observer=run.observer)  # keeps the evaluation out of the method's cost
    dense = {name: perplexity(job.model, tokens, run=judge) for name, tokens in texts.items()}
    head = job.model.head_cost
    start = time.monotonic()
    pruning = run_method(job.model, get_method(job.method), job.tokens, job.budget, run, **job.options)
    cost = {
        "seconds": round(time.monotonic() - start, 1),
        "block_tokens": run.meter.block_tokens,
        "head_tokens": run.meter.head_tokens,
        "forwards": round(run.meter.forwards(len(pruning.before.blocks), job.tokens.length, head=head), 2),
        "forwards_asked": round(run.meter.forwards_asked(len(pruning.before.blocks), job.tokens.length), 2),
    }
    record = make_record(
        job.model, pruning, job.tokens, model_fingerprint=job.model_fingerprint, seed=job.seed, cost=cost,
        arguments=arguments, notes=run.notes,
    )  # fmt: skip
    for name, tokens in texts.items():
        after = perplexity(job.model, tokens, run=judge)
        after["text"] = public_name(str(after["text"]))
        record["perplexity"].append({**after, "before": dense[name]["perplexity"], "after": after["perplexity"]})
    job.model.edited()  # a further pruning starts from here
    job.model.parents = [*job.model.parents, {key: value for key, value in record.items() if key != "parents"}]
    return Pruned(job.model, pruning, record)


class Result(Protocol):
    """What `save` writes: `Pruned`, or `Recovered`."""

    @property
    def model(self) -> Model: ...

    @property
    def record(self) -> dict[str, Any]: ...


class Identified(Protocol):
    """A job whose outcome has an identity."""

    @property
    def fingerprint(self) -> str: ...


def save(result: Result, folder: str | Path, *, overwrite: bool = False, max_shard_size: str = "5GB") -> Tier:
    """Write a checkpoint with record and card, whole or not at all; return its tier.

    Raises:
        OutputExistsError: the folder exists and `overwrite` is off.
    """
    files = {RECORD: dump(result.record), "README.md": render_card(result.record)}
    return save_checkpoint(result.model, Path(folder), files=files, overwrite=overwrite, max_shard_size=max_shard_size)


def _check_tokens(model: Model, tokens: Tokens) -> None:
    low, high = int(tokens.ids.min()), int(tokens.ids.max())
    if low < 0 or high >= model.vocab_size:
        raise InvalidOptionError(f"token ids from {low} to {high} do not fit the vocabulary of {model.vocab_size}")
    if not (torch.isfinite(tokens.weights).all() and (tokens.weights >= 0).all() and tokens.weights.any()):
        raise InvalidOptionError("the tokens' weights must be finite and not negative, and some above 0")


def already_there(job: Identified, folder: Path) -> dict[str, Any] | None:
    """The record of `folder` if it already holds this very job's result; None if there is nothing.

    Raises:
        OutputExistsError: it holds something else.
    """
    folder = resolved(folder)
    if not folder.exists():
        return None
    record = read_record(folder) if folder.is_dir() else None
    if record is not None and record.get("fingerprint") == job.fingerprint:
        return record
    what = "another pruning or recovery" if record else "something that secateur did not write"
    raise OutputExistsError(f"{folder} exists and holds {what}; choose another --out, or give --overwrite")
