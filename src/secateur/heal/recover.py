"""`recover`: a pruned (or dense) model trained, by LoRA or in full, with the account of how."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from msgspec import structs

from secateur.assets import TextSource, licence_of, read_text
from secateur.engine.tokens import bos_id_of
from secateur.errors import CheckpointError, DataError, Interrupted, InvalidOptionError
from secateur.export import loads_in, tier
from secateur.folders import claimed, require_space
from secateur.heal import state
from secateur.heal.adapter import adapters, require_extra, targets
from secateur.heal.data import Examples, make_examples
from secateur.heal.objectives import Distillation, Labels, recomputing
from secateur.heal.settings import Settings
from secateur.heal.whole import whole
from secateur.hf import own_randomness, quiet_transformers
from secateur.journal import Identity, fingerprint, forget, run_folder, taken_bytes
from secateur.model.coerce import ModelSource, borrowed, handed
from secateur.model.facts import configuration, environment, origin, sizes
from secateur.model.handle import Model
from secateur.model.load import TokenizerSource, load
from secateur.output import Outcome, Output
from secateur.record import (
    FORMAT,
    Cost,
    Facts,
    HeldOutLoss,
    Record,
    Recovery,
    TrainingData,
    public_arguments,
    public_facts,
)
from secateur.run import Observer, Run
from secateur.version import __version__

if TYPE_CHECKING:
    from secateur.heal.trainer import Course, Trained

Teacher: TypeAlias = "ModelSource | Literal[True] | None"  # whose predictions are learned from; True: see `recover`


@dataclass(frozen=True, kw_only=True)
class RecoveryRequest:
    """All that decides a recovery of a given model by a given teacher, or none. Only the settings are checked yet.

    Attributes:
        data: a text's name or file, a list of documents or a `datasets.Dataset`; best one with instructions or chats.
        licence: the data's, for the record and the card, where secateur does not know it.
        texts, cache: folders with named texts, and of what was fetched.
        text_field: the column that holds text or conversations, where it is none that is known.
    """

    data: TextSource
    settings: Settings = field(default_factory=Settings)
    licence: str | None = None
    texts: Path | None = None
    cache: Path | None = None
    text_field: str | None = None


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
    """A recovery that is fully specified and not yet run: every argument is checked."""

    model: Model
    examples: Examples
    settings: Settings
    teacher: Model | None
    data: TrainingData
    model_fingerprint: str
    configuration: str
    teacher_fingerprint: str | None

    @property
    def identity(self) -> Identity:
        """All that decides the outcome, by name."""
        settings = structs.asdict(self.settings)
        del settings["bos"]  # the data's fingerprint says what became of it
        return {
            "command": "recover", "model": self.model_fingerprint, "configuration": self.configuration,
            "data": self.data.fingerprint, "teacher": self.teacher_fingerprint, "settings": settings,
            "secateur": __version__,
        }  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """sha256 of the identity; the same in two runs of the same job."""
        return fingerprint(self.identity)

    @property
    def disk_bytes(self) -> int:
        """About what it will write: the model, and two checkpoints with what is trained and its two moments in
        float32."""
        weights = sum(p.numel() * p.element_size() for p in self.model.hf.parameters())
        return weights + 2 * 3 * 4 * self.trained_parameters

    @property
    def trained_parameters(self) -> int:
        if self.settings.train == "all":
            return sum(p.numel() for p in self.model.hf.parameters())
        widths = sum(sum(self.model.hf.get_submodule(path).weight.shape) for path in targets(self.model))
        return self.settings.rank * widths


def recover(
    model: ModelSource,
    data: TextSource,
    *,
    tokenizer: TokenizerSource | None = None,
    distill: Teacher = None,
    licence: str | None = None,
    texts: Path | None = None,
    cache: Path | None = None,
    text_field: str | None = None,
    checkpoints: str | Path | None = None,
    run: Run | None = None,
    **settings: Any,
) -> Recovered:
    """Train a model in place: adapters on all linear maps, then merged, as SlimGPT does (arXiv 2412.18110), or with
    `train="all"` every weight.

    Args:
        model, tokenizer: pruned or dense, as `secateur.prune` has them; it must be resident as a whole.
        data, licence, texts, cache, text_field: as `RecoveryRequest` has them.
        distill: learn from a model's predictions instead of from labels: from this one's, or if True from those of the
            dense model that the record names.
        checkpoints: a folder for what an interrupted run needs to go on; the same call goes on from there.
        settings: see `secateur.heal.settings.Settings`; the defaults are the paper's.

    Raises:
        DataError, InvalidOptionError, MissingExtraError, UnsupportedModelError: before anything is trained.
        CheckpointError, FetchError: the dense model is not where the record says, or is another one by now.
        NumericalError, Interrupted: the loss became NaN or Inf, the user wants no more. The model is as it was.
    """
    if unknown := sorted(settings.keys() - set(Settings.__struct_fields__)):
        known = ", ".join(Settings.__struct_fields__)
        raise InvalidOptionError(f"recover has no option {', '.join(unknown)}; it has {known}")
    request = RecoveryRequest(
        data=data, settings=Settings(**settings), licence=licence, texts=texts, cache=cache, text_field=text_field
    )
    with ExitStack() as stack:
        own = stack.enter_context(borrowed(model, tokenizer, cache=cache, adopt=True))
        named = dense_parent(own, cache) if distill is True else distill
        teacher = None if named is None else stack.enter_context(borrowed(named, tokenizer, cache=cache))
        job = prepare_recovery(request, own, teacher)
        return run_recovery(job, checkpoints=Path(checkpoints) if checkpoints else None, run=run)


def recover_to(
    request: RecoveryRequest,
    source: ModelSource,
    output: Output | str | Path,
    *,
    tokenizer: TokenizerSource | None = None,
    distill: Teacher = None,
    observer: Observer | None = None,
    arguments: Facts | None = None,
) -> Outcome:
    """Heal a model and write it, whole or not at all; an interrupted run goes on from what lies beside the output's
    folder, in `OUT.run`.

    Args:
        source, tokenizer, distill: as `recover` has them; a model in memory is healed in place.
        output: or the folder.
        arguments: goes into the record as given.

    Raises:
        OutputExistsError, OutputBusyError, OutputError: the folder holds something else, another process is about to
            write it, or it cannot be written.
        What `recover` raises.
    """
    require_extra(request.settings)
    output = output if isinstance(output, Output) else Output(Path(output))
    with ExitStack() as stack:
        own = stack.enter_context(handed(source, tokenizer, cache=request.cache, adopt=True))
        other = None
        if distill is not None and distill is not True:
            other = stack.enter_context(handed(distill, tokenizer, cache=request.cache))
        output.check(own.name, other.name if other else None, request.data)
        stack.enter_context(claimed(output.folder))
        model = own.load()
        if other is not None:
            teacher: Model | None = other.load()
        else:
            teacher = dense_parent(model, request.cache) if distill else None
        job = prepare_recovery(request, model, teacher)
        folder = run_folder(output.folder)
        if (record := output.holds(job.fingerprint)) is not None:
            if not output.keep_run:  # it was killed just before its run folder went
                forget(folder, job.identity)
            return Outcome(record, was_there=True)
        require_space(output.folder, max(0, job.disk_bytes - taken_bytes(folder)))
        run = Run(job.settings.seed, observer=observer)
        recovered = run_recovery(job, checkpoints=folder, overwrite=output.overwrite, run=run, arguments=arguments)
        output.write(recovered)
        if not output.keep_run:
            forget(folder)
    return Outcome(recovered.record, was_there=False)


def prepare_recovery(request: RecoveryRequest, model: Model, teacher: Model | None = None) -> RecoveryJob:
    """Check and read everything that a recovery of `model` will need. Errors are those of `recover`."""
    settings = request.settings
    require_extra(settings)
    for each in (model, teacher):
        if each is not None:
            each.require_whole("recovery")
    _check_model(model, settings)
    if teacher is not None:
        Distillation(model, teacher)  # do they fit?
    read = read_text(
        request.data, purpose="training", data=request.texts, cache=request.cache, text_field=request.text_field
    )
    assert model.tokenizer is not None  # `_check_model` has seen to it
    examples = make_examples(read, model.tokenizer, settings, bos_id=bos_id_of(model, settings.bos))
    highest = max(int(row.ids.max()) for row in (*examples.train, *examples.held_out))
    if highest >= model.vocab_size:
        raise DataError(
            f"the tokenizer does not fit the model: it gives token id {highest}, and the model's vocabulary has "
            f"{model.vocab_size}. Put the model's own tokenizer beside its weights"
        )
    licence, known_by = (request.licence, "given") if request.licence else licence_of(read)
    data = structs.replace(examples.facts, licence=licence, licence_known_by=known_by)
    teacher_fingerprint = teacher.fingerprint() if teacher else None
    return RecoveryJob(
        model, examples, settings, teacher, data, model.fingerprint(), configuration(model), teacher_fingerprint
    )


def dense_parent(model: Model, cache: Path | None = None) -> Model:
    """The dense model that a pruned one's record begins with, loaded in the dtype that it was pruned in.

    Raises:
        InvalidOptionError: the model has no record, or it does not say where the dense one lies.
        CheckpointError: what lies there is another one, by its fingerprint.
        What `secateur.load` raises.
    """
    if not model.parents:
        raise InvalidOptionError("the model has no record of where it comes from; name the dense model to learn from")
    root = model.parents[0]
    place = "demo" if root.model.get("source") == "pypi" else root.model.get("repository") or root.model.get("name")
    if not place:
        raise InvalidOptionError("the model's record does not name the dense model; name the one to learn from")
    spread = getattr(model.hf, "hf_device_map", None)
    dense = load(
        place, device="auto" if spread else str(model.device), dtype=root.environment.get("dtype", "auto"),
        revision=root.model.get("revision"), cache=cache,
    )  # fmt: skip
    if dense.fingerprint() != root.model["fingerprint"]:
        raise CheckpointError(
            f"{place} has other weights than the model that the record names; name the dense model that was pruned"
        )
    return dense


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


def run_recovery(
    job: RecoveryJob,
    *,
    checkpoints: Path | None = None,
    overwrite: bool = False,
    run: Run | None = None,
    arguments: Facts | None = None,
) -> Recovered:
    """Run a prepared recovery, or go on with it.

    Args:
        checkpoints: see `recover`.
        overwrite: another recovery's checkpoints there are thrown away.
        arguments: goes into the record as given.

    Raises:
        JournalError: the checkpoints are another recovery's.
        Interrupted: by the user; says where it stands.
    """
    from secateur.heal.trainer import Course, train  # imports half of transformers

    model, run = job.model, run or Run(job.settings.seed)
    objective = Distillation(model, job.teacher) if job.teacher else Labels(model)
    in_full = job.settings.train == "all"
    copied = in_full and model.dtype != torch.float32
    course = Course(model, objective, job.examples, job.settings, copied)
    start = time.monotonic()
    with state.opened(checkpoints, job.identity, overwrite=overwrite) as folder, quiet_transformers():
        try:
            with (
                own_randomness(job.settings.seed),
                whole(model) if in_full else adapters(model, job.settings) as net,
                recomputing(model) if job.settings.gradient_checkpointing else nullcontext(),
            ):
                trained = train(course, net, folder, run, resumable=checkpoints is not None)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(_standing(checkpoints, course.steps)) from interrupt
        course = replace(course, copied=False)
        with run.observer.progress("held-out loss", course.held_out_work) as advance:
            after = course.held_out_loss(advance)
    record = _record(course, trained, after, job, time.monotonic() - start, arguments or {})
    model.parents = [*model.parents, record.alone]
    return Recovered(model, record)


def _record(
    course: Course, trained: Trained, after: float, job: RecoveryJob, seconds: float, arguments: Facts
) -> Record:
    """The account of a training, with the held-out loss `after` merging. It has no edits, so none are replayed."""
    model, teacher, layout = job.model, job.teacher, sizes(job.model.layout(), job.model)
    settings, how = job.settings, "lora" if job.settings.train == "lora" else "training"
    held_out = _rounded([*trained.held_out, (course.steps, after)])
    training = _rounded(trained.training)
    recovery = Recovery(
        objective="distillation" if teacher else "labels",
        teacher=public_facts({**teacher.source, "fingerprint": job.teacher_fingerprint}) if teacher else None,
        data=job.data,
        settings={**structs.asdict(settings), "batch_size": settings.rows_at_once},
        adapted_maps=len(targets(model)) if settings.train == "lora" else 0,
        trained_parameters=job.trained_parameters,
        steps=course.steps,
        resumed_at=trained.resumed_at,
        held_out_loss=HeldOutLoss(before=trained.held_out[0][1], after=after, curve=held_out),
        training_loss=training,
        tokens_seen=[(step, course.tokens_seen[step]) for step in sorted({step for step, _ in held_out + training})],
    )
    return Record(
        secateur=__version__, format=FORMAT, fingerprint=job.fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"), method=how, seed=settings.seed,
        tier=tier(model), loads_in=loads_in(model), model=origin(model, job.model_fingerprint),
        arguments=public_arguments(arguments), environment=environment(model),
        cost=Cost(seconds=round(seconds, 1)), before=layout, after=layout, recovery=recovery,
        evaluations=[], edits=[], parents=model.parents,
    )  # fmt: skip


def _rounded(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, round(loss, 6)) for step, loss in curve]


def _standing(checkpoints: Path | None, steps: int) -> str:
    """Where an interrupted recovery stands, and how it goes on."""
    if checkpoints is None or (last := state.newest(checkpoints)) is None:
        return f"interrupted{' before the first checkpoint' if checkpoints else ''}; nothing was written"
    kept = f"step {state.step_of(last)} of {steps} is kept in {checkpoints}"
    return f"interrupted; {kept}. The same command goes on from there"
