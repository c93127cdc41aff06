"""The training itself is transformers' Trainer; here it is told what is minimised, in which order, and what to keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from secateur.errors import NumericalError
from secateur.heal import state
from secateur.heal.data import Example, Examples, collate
from secateur.heal.objectives import Batch, Objective, mean_loss
from secateur.heal.settings import Settings
from secateur.model.handle import Model
from secateur.run import Advance, Run

HELD_OUT_LOSS = "held_out_loss"  # the name in Trainer's history
_SAVES = 20  # checkpoints in a run
_LOGS = 50  # points of the training loss in a run
_BACKWARD = 1.0  # what a backward costs, in forwards (frozen weights need no gradient); progress counts in these


@dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
        steps: of how many the run consists.
        resumed_at: the step of the checkpoint it went on from, None if it began at the beginning.
        training, held_out: (step, loss per counted token).
    """

    steps: int
    resumed_at: int | None
    training: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


def train(
    model: Model,
    adapted: Any,
    objective: Objective,
    examples: Examples,
    settings: Settings,
    folder: Path,
    run: Run,
    *,
    keep: bool = True,
) -> Trained:
    """Train the adapters that `adapted` put on `model`, going on from the newest checkpoint in `folder`.

    Args:
        keep: write checkpoints.

    Raises:
        NumericalError: the loss became NaN or Inf.
        CheckpointError: the checkpoint is damaged or of another model.
    """
    last = next(reversed(state.checkpoints(folder)), None)
    steps = settings.steps(len(examples.train))
    if last is not None and state.step_of(last) >= steps:  # trained, but interrupted before it was written
        state.read_adapters(last, adapted)
        return _told(state.read_history(last), steps, steps)
    done = 0.0 if last is None else state.step_of(last) / steps
    total = _work(examples, settings)
    with run.observer.progress("recovery", total, done * total) as advance:
        trainer = _Recovery(model, adapted, objective, examples, settings, folder, advance, last, keep)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return _told(trainer.state, steps, state.step_of(last) if last else None)


def held_out_loss(
    objective: Objective, examples: Examples, settings: Settings, advance: Advance | None = None
) -> float:
    """The loss per counted token over the held-out rows."""

    def batches() -> Iterator[Batch]:
        for batch in _batches(_longest_first(examples.held_out), settings):
            yield batch
            if advance is not None:
                advance(batch["input_ids"].numel())

    return mean_loss(objective, batches())


def measure(objective: Objective, examples: Examples, settings: Settings, run: Run) -> float:
    """`held_out_loss` with a bar of its own."""
    with run.observer.progress("held-out loss", _held_out_work(examples, settings)) as advance:
        return held_out_loss(objective, examples, settings, advance)


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
        self,
        model: Model,
        adapted: Any,
        objective: Objective,
        examples: Examples,
        settings: Settings,
        folder: Path,
        advance: Advance,
        last: Path | None,
        keep: bool,
    ) -> None:
        self._model = model
        self._adapted = adapted
        self._objective = objective
        self._examples = examples
        self._settings = settings
        self._advance = advance
        steps = settings.steps(len(examples.train))
        use_cache = adapted.config.use_cache
        super().__init__(
            model=adapted,
            args=_arguments(model, settings, steps, folder, resuming=last is not None),
            train_dataset=examples.train,
            data_collator=collate,
            callbacks=[_Conductor(eval_every(settings, steps), max(1, steps // _SAVES) if keep else None)],
            compute_loss_func=_per_token,
        )
        adapted.config.use_cache = use_cache  # Trainer has set its own
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the loss per counted token of the whole step."""
        assert num_items_in_batch is not None  # Trainer counts the labels where it has a loss function
        with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._settings.autocast):
            total = self._objective.total(inputs)
        loss = _per_token(total, None, num_items_in_batch)
        self._advance((1 + _BACKWARD) * inputs["input_ids"].numel())
        return loss.to(self.args.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss over the held-out rows."""
        self._model.hf.eval()
        metrics = {HELD_OUT_LOSS: held_out_loss(self._objective, self._examples, self._settings, self._advance)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LikeLengths(self._examples.train, self._settings.global_batch, self._settings.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state.write(Path(str(self.args.output_dir)), self._adapted, self.optimizer, self.lr_scheduler, self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state.read_adapters(Path(resume_from_checkpoint), self._adapted)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.read_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.read_generators(Path(checkpoint))


class _Conductor(TrainerCallback):
    """Says when to measure and when to save, and stops a training that has blown up."""

    def __init__(self, eval_every: int, save_every: int | None) -> None:
        self._eval_every = eval_every
        self._save_every = save_every

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


def eval_every(settings: Settings, steps: int) -> int:
    """Steps between two held-out losses."""
    return settings.eval_every or max(1, steps // 4)


def _per_token(total: Tensor, labels: object, num_items_in_batch: Tensor | int) -> Tensor:
    """Trainer's form of a loss function."""
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _arguments(model: Model, settings: Settings, steps: int, folder: Path, *, resuming: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.rows_at_once,
        gradient_accumulation_steps=settings.global_batch // settings.rows_at_once,
        optim="adamw_torch",
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        max_grad_norm=1.0,
        seed=settings.seed,
        logging_steps=max(1, steps // _LOGS),
        logging_nan_inf_filter=False,
        eval_on_start=not resuming,
        eval_strategy="no",  # the conductor says when
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
    )
    if arguments.n_gpu > 1:  # one model on its own device, no copies of it on the others
        arguments._n_gpu = 1
    return arguments


def _work(examples: Examples, settings: Settings) -> float:
    """Tokens through a forward, all in all: training steps, and the held-out rows at the start and now and then."""
    steps = settings.steps(len(examples.train))
    order = LikeLengths(examples.train, settings.global_batch, settings.seed)
    epoch = sum(batch["input_ids"].numel() for batch in _batches([examples.train[row] for row in order], settings))
    measured = 1 + (steps - 1) // eval_every(settings, steps)
    return (1 + _BACKWARD) * epoch * steps / settings.steps_per_epoch(len(examples.train)) + measured * _held_out_work(
        examples, settings
    )


def _held_out_work(examples: Examples, settings: Settings) -> int:
    return sum(batch["input_ids"].numel() for batch in _batches(_longest_first(examples.held_out), settings))


def _batches(rows: Sequence[Example], settings: Settings) -> Iterator[Batch]:
    for start in range(0, len(rows), settings.rows_at_once):
        yield collate(rows[start : start + settings.rows_at_once])


def _longest_first(rows: Iterable[Example]) -> list[Example]:
    return sorted(rows, key=lambda row: -len(row.ids))


def _told(history: TrainerState, steps: int, resumed_at: int | None) -> Trained:
    def curve(name: str) -> list[tuple[int, float]]:
        return [(int(entry["step"]), entry[name]) for entry in history.log_history if name in entry]

    return Trained(steps, resumed_at, curve("loss"), curve(HELD_OUT_LOSS))
