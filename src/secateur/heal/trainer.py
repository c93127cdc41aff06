"""The training itself is transformers' Trainer; here it is told what is minimised, in which order, and what to keep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from secateur.errors import NumericalError
from secateur.heal import state
from secateur.heal.data import IGNORED, Example, Examples, collate
from secateur.heal.objectives import Batch, Objective
from secateur.heal.settings import Settings
from secateur.model.handle import Model
from secateur.record import Curve
from secateur.run import Advance, Run

HELD_OUT_LOSS = "held_out_loss"  # the name in Trainer's history
_SAVES = 20  # checkpoints in a run
_LOGS = 50  # points of the training loss in a run
_BACKWARD = {
    "lora": 1.0,
    "all": 2.0,
}  # its cost in forwards (frozen weights need no gradient); progress counts in these


@dataclass(frozen=True)
class Course:
    """What is trained, on what, and how; and the numbers that follow from it.

    Attributes:
        copied: the weights in training are float32 copies of bfloat16 ones: matrix products are in bfloat16 throughout.
    """

    model: Model
    objective: Objective
    examples: Examples
    settings: Settings
    copied: bool = False

    @cached_property
    def tokens_seen(self) -> list[int]:
        """The tokens of all training rows up to a step, by step; [0] is 0."""
        settings, train, seen = self.settings, self.examples.train, [0]
        order = LikeLengths(train, settings.global_batch, settings.seed)
        for epoch in count():
            order.set_epoch(epoch)
            rows = [len(train[row].ids) for row in order]
            for start in range(0, len(rows), settings.global_batch):
                tokens = seen[-1] + sum(rows[start : start + settings.global_batch])
                over = settings.max_tokens is not None and tokens > settings.max_tokens and len(seen) > 1
                if over or len(seen) > settings.most_steps(len(train)):
                    return seen
                seen.append(tokens)
        raise AssertionError

    @property
    def steps(self) -> int:
        return len(self.tokens_seen) - 1

    @property
    def work_per_token(self) -> float:
        """Of training, in forwards."""
        return 1 + _BACKWARD[self.settings.train]

    def autocast(self, wanted: bool) -> AbstractContextManager[Any]:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=wanted or self.copied)

    @property
    def eval_every(self) -> int:
        """Steps between two held-out losses."""
        return self.settings.eval_every or max(1, self.steps // 4)

    @property
    def held_out_work(self) -> int:
        """Tokens through a forward for one held-out loss."""
        return sum(batch["input_ids"].numel() for batch in self._held_out())

    @property
    def work(self) -> float:
        """Tokens through a forward, all in all: training, and the held-out rows at the start and now and then."""
        train = self.examples.train
        order = LikeLengths(train, self.settings.global_batch, self.settings.seed)
        epoch = sum(batch["input_ids"].numel() for batch in self._batches([train[row] for row in order]))
        epochs = self.steps / self.settings.steps_per_epoch(len(train))
        measured = 1 + (self.steps - 1) // self.eval_every
        return self.work_per_token * epoch * epochs + measured * self.held_out_work

    @torch.no_grad()
    def held_out_loss(self, advance: Advance) -> float:
        """The loss per counted token over the held-out rows.

        Raises:
            NumericalError: it is NaN or Inf.
        """
        total, tokens = 0.0, 0
        for batch in self._held_out():
            with self.autocast(False):
                total += float(self.objective.total(batch))
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
            advance(batch["input_ids"].numel())
        if not math.isfinite(total):
            raise NumericalError("the held-out loss is NaN or Inf; try a lower --lr, or --dtype float32")
        return total / tokens

    def _held_out(self) -> Iterator[Batch]:
        return self._batches(sorted(self.examples.held_out, key=lambda row: -len(row.ids)))

    def _batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        for start in range(0, len(rows), self.settings.rows_at_once):
            yield collate(rows[start : start + self.settings.rows_at_once])


@dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
        resumed_at: the step of the checkpoint it went on from, None if it began at the beginning.
    """

    resumed_at: int | None
    training: Curve
    held_out: Curve

    @classmethod
    def of(cls, history: TrainerState, resumed_at: int | None) -> Trained:
        def curve(name: str) -> Curve:
            return [(int(entry["step"]), entry[name]) for entry in history.log_history if name in entry]

        return cls(resumed_at, curve("loss"), curve(HELD_OUT_LOSS))


def train(course: Course, trained: Any, folder: Path, run: Run, *, resumable: bool = True) -> Trained:
    """Train what of `trained`, the model or peft's around it, wants a gradient, going on from the newest checkpoint in
    `folder`.

    Args:
        resumable: write checkpoints.

    Raises:
        NumericalError: the loss became NaN or Inf.
        CheckpointError: the checkpoint is damaged or of another model.
    """
    last = state.newest(folder)
    done = None if last is None else state.step_of(last)
    if last is not None and done is not None and done >= course.steps:  # trained, but interrupted before it was written
        state.read_trained(last, trained)
        return Trained.of(state.read_history(last), course.steps)
    with run.observer.progress("recovery", course.work, (done or 0) / course.steps * course.work) as advance:
        trainer = _Recovery(course, trained, folder, advance, resuming=last is not None, resumable=resumable)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return Trained.of(trainer.state, done)


class LikeLengths(Sampler[int]):
    """Rows in a random order for each epoch, sorted by length within each optimizer step.

    A step's gradient is a sum over its rows, so their order within it is free: rows of like length share a forward and
    little is filled up. The longest come first, so that memory that does not suffice shows at once.
    """

    def __init__(self, rows: Sequence[Example], global_batch: int, seed: int) -> None:
        self._lengths = [len(row.ids) for row in rows]
        self._global_batch = global_batch
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=Run(self._seed).rng("order", self._epoch)).tolist()
        for start in range(0, len(order), self._global_batch):
            yield from sorted(order[start : start + self._global_batch], key=lambda row: -self._lengths[row])


class _Recovery(Trainer):
    """Trainer with our loss, our order of rows, and checkpoints without pickle."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the counted tokens of the whole step

    def __init__(
        self, course: Course, trained: Any, folder: Path, advance: Advance, *, resuming: bool, resumable: bool
    ) -> None:
        self._course, self._trained, self._advance = course, trained, advance
        use_cache = trained.config.use_cache
        super().__init__(
            trained, _arguments(course, folder, resuming=resuming), collate, course.examples.train,
            callbacks=[_Conductor(course.eval_every, max(1, course.steps // _SAVES) if resumable else None)],
            compute_loss_func=_per_token,
        )  # fmt: skip
        trained.config.use_cache = use_cache  # Trainer has set its own
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the loss per counted token of the whole step."""
        assert num_items_in_batch is not None  # Trainer counts the labels where it has a loss function
        course = self._course
        with course.autocast(course.settings.autocast):
            total = course.objective.total(inputs)
        loss = _per_token(total, None, num_items_in_batch)
        self._advance(course.work_per_token * inputs["input_ids"].numel())
        return loss.to(self.args.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss over the held-out rows."""
        self._course.model.hf.eval()
        metrics = {HELD_OUT_LOSS: self._course.held_out_loss(self._advance)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        settings = self._course.settings
        return LikeLengths(self._course.examples.train, settings.global_batch, settings.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state.write(Path(str(self.args.output_dir)), self._trained, self.optimizer, self.lr_scheduler, self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state.read_trained(Path(resume_from_checkpoint), self._trained)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.read_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.read_generators(Path(checkpoint))


class _Conductor(TrainerCallback):
    """Says when to measure and when to save, and stops a training that has blown up."""

    def __init__(self, eval_every: int, save_every: int | None) -> None:
        self._eval_every, self._save_every = eval_every, save_every

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps  # measured after merging
        control.should_evaluate = not last and state.global_step % self._eval_every == 0
        if self._save_every is not None:
            control.should_save = last or state.global_step % self._save_every == 0

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise NumericalError(
                f"the training loss is NaN or Inf at step {state.global_step}; try a lower --lr, or --dtype float32"
            )


def _per_token(total: Tensor, labels: object, num_items_in_batch: Tensor | int) -> Tensor:
    """Trainer's form of a loss function."""
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _arguments(course: Course, folder: Path, *, resuming: bool) -> TrainingArguments:
    settings, device = course.settings, course.model.device.type
    arguments = TrainingArguments(  # when to measure and to save, the conductor says
        output_dir=str(folder), max_steps=course.steps, per_device_train_batch_size=settings.rows_at_once,
        gradient_accumulation_steps=settings.global_batch // settings.rows_at_once, optim="adamw_torch",
        learning_rate=settings.lr, lr_scheduler_type="cosine", warmup_steps=settings.warmup_steps,
        max_grad_norm=1.0, seed=settings.seed, logging_steps=max(1, course.steps // _LOGS),
        logging_nan_inf_filter=False, eval_on_start=not resuming, eval_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False, use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
    )  # fmt: skip
    if arguments.n_gpu > 1:  # one model on its own device, no copies of it on the others
        arguments._n_gpu = 1
    return arguments
