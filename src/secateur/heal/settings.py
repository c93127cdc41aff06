"""The settings of a recovery; for LoRA SlimGPT's are the defaults. The command's flags are made of them."""

from __future__ import annotations

import functools
import math
import typing
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, ValidationError, convert

from secateur.assets import Bos
from secateur.errors import InvalidOptionError

Template = Literal["alpaca", "chat"]
Trainable = Literal["lora", "all"]
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]

LARGEST_BATCH = 8  # sequences at once, where none is asked


def _is(help: str) -> Meta:
    """What a setting is: for the command's help, and for the message where a value is none."""
    return Meta(description=help)


class Settings(Struct, frozen=True, kw_only=True):
    """How a model is healed. The defaults are those of SlimGPT (arXiv 2412.18110, its paper and code), for LoRA.

    Raises:
        InvalidOptionError: a value out of its range.
    """

    train: Annotated[
        Trainable,
        _is(
            "What is trained: lora (adapters on all linear maps, merged afterwards) or all (every weight, in float32: "
            "16 bytes per parameter)."
        ),
    ] = "lora"
    epochs: Annotated[Positive, _is("Passes over the training rows; a fraction is fine.")] = 1.0
    max_steps: Annotated[Count | None, _is("So many optimizer steps instead.")] = None
    max_tokens: Annotated[
        Count | None, _is("As many whole optimizer steps instead as so many tokens of training rows give.")
    ] = None
    lr: Annotated[Positive, _is("Peak of AdamW's learning rate, which falls to zero along a cosine.")] = 1e-4
    warmup_steps: Annotated[int, Meta(ge=0), _is("Steps of linear rise to it.")] = 10
    global_batch: Annotated[Count, _is("Rows per optimizer step.")] = 64
    batch_size: Annotated[
        Count | None, _is("Rows per forward, as memory allows; a divisor of global_batch. Up to 8 if not given.")
    ] = None
    max_length: Annotated[int, Meta(ge=2), _is("Tokens per row; what is longer is cut.")] = 256
    rank: Annotated[Count, _is("Of the LoRA adapters.")] = 8
    alpha: Annotated[Positive, _is("Of the LoRA adapters.")] = 16.0
    dropout: Annotated[float, Meta(ge=0, lt=1), _is("Of the LoRA adapters.")] = 0.05
    held_out: Annotated[
        Count | None,
        _is(
            "Rows to measure on and never train on; 8 % (with max_tokens of what these fill), at most 2000 (the "
            "paper's), if not given."
        ),
    ] = None
    eval_every: Annotated[Count | None, _is("Steps between two measurements; a quarter of all if not given.")] = None
    gradient_checkpointing: Annotated[
        bool, _is("Compute the blocks' activations again for the gradient: less memory, a third more time.")
    ] = False
    autocast: Annotated[
        bool,
        _is(
            "Training's matrix products in bfloat16, as in the paper, the logits' and the teacher's too: faster. "
            "Weights, adapters and measurements stay in their own dtype. A bfloat16 model of which all is trained "
            "has them so in any case."
        ),
    ] = False
    template: Annotated[
        Template, _is("How instructions are put: alpaca (the paper's prompt) or chat, the model's own chat template.")
    ] = "alpaca"
    bos: Annotated[
        Bos,
        _is(
            "Begin each row with the begin-of-sequence token: always, never, or auto, if the model's family needs it. "
            "Without, instructions and conversations begin as tokenizer and template have it."
        ),
    ] = "auto"
    seed: Annotated[int, Meta(ge=0, lt=2**32), _is("Of rows held out, order, adapters, dropout.")] = 0

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            value = getattr(self, name)
            try:
                convert(value, hint)
            except ValidationError as error:
                raise InvalidOptionError(f"{name} {value!r}: {error}. {description(hint)}") from None
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidOptionError(f"{name} must be a finite number, not {value!r}")
        if self.global_batch % self.rows_at_once:
            raise InvalidOptionError(
                f"batch_size {self.batch_size} does not divide global_batch {self.global_batch}: a step is a whole "
                "number of forwards"
            )

    @property
    def rows_at_once(self) -> int:
        """Rows per forward."""
        if self.batch_size is not None:
            return self.batch_size
        return next(n for n in range(LARGEST_BATCH, 0, -1) if self.global_batch % n == 0)

    def held_out_of(self, rows: int) -> int:
        """How many of so many rows are held out.

        Raises:
            InvalidOptionError: none would be left to train on.
        """
        used = rows if self.max_tokens is None else min(rows, self.max_tokens // self.max_length)
        wanted = self.held_out if self.held_out is not None else min(2000, max(1, math.floor(0.08 * used + 0.5)))
        if wanted >= rows:
            raise InvalidOptionError(f"{wanted} rows held out of {rows} leave none to train on")
        return wanted

    def steps_per_epoch(self, rows: int) -> int:
        return math.ceil(rows / self.global_batch)

    def most_steps(self, rows: int) -> float:
        """Optimizer steps over so many training rows; without an end where only `max_tokens` says it."""
        if self.max_steps is not None or self.max_tokens is not None:
            return self.max_steps or math.inf
        return math.ceil(self.epochs * self.steps_per_epoch(rows))


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Settings, include_extras=True)


def description(hint: Any) -> str:
    """What a field is, by its annotation."""
    return next(meta.description for meta in reversed(hint.__metadata__) if meta.description)
