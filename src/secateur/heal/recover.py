"""`recover`: a pruned (or dense) model healed by LoRA, with the account of how."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.assets import licence_of, read_training
from secateur.errors import DataError, Interrupted, InvalidOptionError, OutputError, OutputExistsError
from secateur.folders import resolved, write_file
from secateur.heal import (
    Distillation,
    Examples,
    Labels,
    Settings,
    attach,
    detach,
    make_examples,
    own_randomness,
    require_extra,
    targets,
)
from secateur.heal.record import make_recovery_record
from secateur.hf import quiet_transformers
from secateur.model.handle import Model
from secateur.record import Record
from secateur.run import Run
from secateur.version import __version__

_JOB = "recovery.json"  # in a run's folder: whose it is


@dataclass(frozen=True)
class Recovered:
    """A healed model with the account of how it came to be; `secateur.save` writes it.

    Attributes:
        model: the same object that was given to `recover`, its weights changed, its layout not.
        record: what will be saved as `secateur.json`.
    """

    model: Model
    record: Record = field(repr=False)


@dataclass(frozen=True)
class RecoveryJob:
    """A recovery that is fully specified and not yet run: every argument is checked, nothing is changed."""

    model: Model
    examples: Examples
    settings: Settings
    teacher: Model | None
    facts: dict[str, Any]  # of the data
    model_fingerprint: str
    teacher_fingerprint: str | None

    @property
    def fingerprint(self) -> str:
        """Identity of the outcome; the same in two runs of the same job."""
        parts = [
            "recover", self.model_fingerprint, self.examples.fingerprint(), self.teacher_fingerprint,
            asdict(self.settings), __version__,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def disk_bytes(self) -> int:
        """About what it will write: the model, and two checkpoints with adapters and their two moments in float32."""
        weights = sum(p.numel() * p.element_size() for p in self.model.hf.parameters())
        adapters = 0
        for path in targets(self.model):
            adapters += self.settings.rank * sum(self.model.hf.get_submodule(path).weight.shape)
        return weights + 2 * 3 * 4 * adapters


def prepare_recovery(
    model: Model,
    data: str | Path,
    *,
    distill: Model | None = None,
    licence: str | None = None,
    texts: Path | None = None,
    cache: Path | None = None,
    **settings: Any,
) -> RecoveryJob:
    """Check everything that `recover` will need. Arguments and errors are those of `recover`."""
    require_extra()
    unknown = settings.keys() - Settings.__dataclass_fields__.keys()
    if unknown:
        known = ", ".join(Settings.__dataclass_fields__)
        raise InvalidOptionError(f"recover has no option {', '.join(sorted(unknown))}; it has {known}")
    chosen = Settings(**settings)
    _check_model(model, chosen)
    if distill is not None:
        Distillation(model, distill)  # do they fit?
    read = read_training(str(data), data=texts, cache=cache)
    assert model.tokenizer is not None  # `_check_model` has seen to it
    examples = make_examples(read, model.tokenizer, chosen)
    highest = max(int(row.ids.max()) for row in (*examples.train, *examples.held_out))
    if highest >= model.vocab_size:
        raise DataError(
            f"the tokenizer does not fit the model: it gives token id {highest}, and the model's vocabulary has "
            f"{model.vocab_size}. Put the model's own tokenizer beside its weights"
        )
    known_licence, known_by = (licence, "given") if licence else licence_of(read)
    facts = {**examples.facts, "licence": known_licence, "licence_known_by": known_by}
    facts["fingerprint"] = examples.fingerprint()
    return RecoveryJob(
        model, examples, chosen, distill, facts, model.fingerprint(), distill.fingerprint() if distill else None
    )


def recover(
    model: Model,
    data: str | Path,
    *,
    distill: Model | None = None,
    licence: str | None = None,
    texts: Path | None = None,
    cache: Path | None = None,
    checkpoints: str | Path | None = None,
    run: Run | None = None,
    **settings: Any,
) -> Recovered:
    """Heal a model in place by LoRA, as SlimGPT does (arXiv 2412.18110): adapters on all linear maps, then merged.

    Args:
        model: pruned or dense, with its tokenizer; it must be resident as a whole.
        data: a file in the Alpaca form or with `messages` or `text`, or a text's name.
        distill: learn from this model's predictions (usually the dense one's) instead of from labels.
        licence: the data's, for the record and the card, where secateur does not know it.
        texts, cache: folders with named texts, and of what was fetched.
        checkpoints: a folder for what an interrupted run needs to go on; the same call goes on from there.
        settings: see `secateur.heal.Settings`; the defaults are the paper's.

    Raises:
        DataError, InvalidOptionError, MissingExtraError, UnsupportedModelError: before anything is trained.
        NumericalError, Interrupted: the loss became NaN or Inf, the user wants no more. The model is as it was.
    """
    job = prepare_recovery(model, data, distill=distill, licence=licence, texts=texts, cache=cache, **settings)
    return run_recovery(job, checkpoints=Path(checkpoints) if checkpoints else None, run=run)


def run_recovery(
    job: RecoveryJob,
    *,
    checkpoints: Path | None = None,
    overwrite: bool = False,
    run: Run | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Recovered:
    """Run a prepared recovery, or go on with it.

    Args:
        checkpoints: see `recover`.
        overwrite: another recovery's checkpoints there are thrown away.
        arguments: goes into the record as given.

    Raises:
        OutputExistsError: the checkpoints are another recovery's.
        Interrupted: by the user; says where it stands.
    """
    from secateur.heal import trainer  # imports half of transformers

    model, run = job.model, run or Run(job.settings.seed)
    objective = Distillation(model, job.teacher) if job.teacher else Labels(model)
    start = time.monotonic()
    with _run_folder(checkpoints, job.fingerprint, overwrite) as folder, quiet_transformers():
        with own_randomness(job.settings.seed):
            adapted = attach(model, job.settings)
            merge = False
            try:
                trained = trainer.train(
                    model, adapted, objective, job.examples, job.settings, folder, run, keep=checkpoints is not None
                )
                merge = True
            except KeyboardInterrupt as interrupt:
                raise Interrupted(_where(folder, job, kept=checkpoints is not None)) from interrupt
            finally:
                detach(model, adapted, merge=merge)
        after = trainer.measure(objective, job.examples, job.settings, run)
    record = make_recovery_record(
        model,
        model_fingerprint=job.model_fingerprint,
        fingerprint=job.fingerprint,
        settings={**asdict(job.settings), "batch_size": job.settings.rows_at_once},
        data=job.facts,
        teacher={**job.teacher.source, "fingerprint": job.teacher_fingerprint} if job.teacher else None,
        steps=trained.steps,
        resumed_at=trained.resumed_at,
        training=trained.training,
        held_out=[*trained.held_out, (trained.steps, after)],
        adapted=len(targets(model)),
        seconds=time.monotonic() - start,
        arguments=arguments,
    )
    model.parents = [*model.parents, record.alone]
    return Recovered(model, record)


def run_folder(out: Path) -> Path:
    """Where a recovery that will be written to `out` keeps its checkpoints."""
    out = resolved(out)
    return out.with_name(f"{out.name}.run")


def forget_run(folder: Path) -> None:
    """Remove a run's folder, if it is one."""
    if (folder / _JOB).is_file():
        shutil.rmtree(folder)


def _check_model(model: Model, settings: Settings) -> None:
    if model.tokenizer is None:
        raise DataError("the model has no tokenizer, so it cannot be given text to train on")
    if model.max_length is not None and settings.max_length > model.max_length:
        raise InvalidOptionError(f"max_length {settings.max_length}; the model's positions end at {model.max_length}")
    if model.dtype == torch.float16:
        raise InvalidOptionError("float16 cannot be trained without loss scaling; take bfloat16 or float32")
    if model.device.type == "cuda" and model.device.index not in (None, 0):
        raise InvalidOptionError(
            f"Trainer works on the first CUDA device, not on {model.device}; set "
            f"CUDA_VISIBLE_DEVICES={model.device.index} and use --device cuda"
        )
    targets(model)


@contextmanager
def _run_folder(folder: Path | None, fingerprint: str, overwrite: bool) -> Iterator[Path]:
    """The folder for checkpoints, made or taken up again; one that vanishes if none is asked."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        path = Path(place)
        if folder is not None:
            _claim(path, fingerprint, overwrite)
        yield path


def _claim(folder: Path, fingerprint: str, overwrite: bool) -> None:
    marker = folder / _JOB
    if folder.exists():
        try:
            if json.loads(marker.read_text(encoding="utf-8"))["fingerprint"] == fingerprint:
                return
        except (OSError, ValueError, KeyError, TypeError):
            if not folder.is_dir() or any(folder.iterdir()):
                raise OutputExistsError(f"{folder} is no folder of a recovery's checkpoints; move it away") from None
        else:
            if not overwrite:
                raise OutputExistsError(
                    f"{folder} has the checkpoints of another recovery (other model, data or settings); go on with "
                    "that one, choose another --out, or give --overwrite to throw them away"
                )
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(marker, json.dumps({"fingerprint": fingerprint}) + "\n")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error


def _where(folder: Path, job: RecoveryJob, *, kept: bool) -> str:
    """Where an interrupted recovery stands, and how it goes on."""
    from secateur.heal import state

    last = next(reversed(state.checkpoints(folder)), None) if kept else None
    if last is None:
        return "interrupted" + (" before the first checkpoint" if kept else "") + "; nothing was written"
    steps = job.settings.steps(len(job.examples.train))
    return (
        f"interrupted; step {state.step_of(last)} of {steps} is kept in {folder}. The same command goes on from there"
    )
