"""The settings of a recovery; SlimGPT's are the defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import InvalidOptionError

Template = Literal["alpaca", "chat"]

LARGEST_BATCH = 8  # sequences at once, where none is asked


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is healed. The defaults are those of SlimGPT (arXiv 2412.18110, its paper and code).

    Args:
        epochs: passes over the training rows; a fraction is fine.
        max_steps: stop after so many optimizer steps instead.
        lr: the peak of AdamW's learning rate, which falls to zero along a cosine.
        warmup_steps: steps of linear rise to it.
        global_batch: rows per optimizer step.
        batch_size: rows per forward, a divisor of `global_batch`; the largest up to 8 if None.
        max_length: tokens per row; what is longer is cut.
        rank, alpha, dropout: of the LoRA adapters.
        held_out: rows never trained on; min(2000, 8 % of the rows) if None (the paper: 2000).
        eval_every: steps between two held-out losses; a quarter of all steps if None.
        autocast: training's matrix products in bfloat16 (the paper trains in it), the logits' and the teacher's too,
            which is faster; weights, adapters and held-out losses stay in their own dtype.
        template: how instructions are put: the Alpaca prompt, or the model's own chat template.
        seed: decides the held-out rows, the order, the adapters' first values and the dropout.

    Raises:
        InvalidOptionError: a value out of its range.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    lr: float = 1e-4
    warmup_steps: int = 10
    global_batch: int = 64
    batch_size: int | None = None
    max_length: int = 256
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    held_out: int | None = None
    eval_every: int | None = None
    autocast: bool = False
    template: Template = "alpaca"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_steps", "global_batch", "batch_size", "rank", "held_out", "eval_every")
        for name in counts:
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise InvalidOptionError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("epochs", "lr", "alpha"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise InvalidOptionError(f"{name} must be a positive number, not {value!r}")
        if not (type(self.max_length) is int and self.max_length >= 2):
            raise InvalidOptionError(f"max_length must be a whole number of at least 2, not {self.max_length!r}")
        if not (type(self.warmup_steps) is int and self.warmup_steps >= 0):
            raise InvalidOptionError(f"warmup_steps must be a whole number of at least 0, not {self.warmup_steps!r}")
        if not (type(self.seed) is int and 0 <= self.seed < 2**32):
            raise InvalidOptionError(f"seed must be a whole number from 0 to 2**32 - 1, not {self.seed!r}")
        if not 0 <= self.dropout < 1:
            raise InvalidOptionError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if self.template not in get_args(Template):
            raise InvalidOptionError(f"template is one of {', '.join(get_args(Template))}, not {self.template!r}")
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
        wanted = self.held_out if self.held_out is not None else min(2000, max(1, math.floor(0.08 * rows + 0.5)))
        if wanted >= rows:
            raise InvalidOptionError(f"{wanted} rows held out of {rows} leave none to train on")
        return wanted

    def steps_per_epoch(self, rows: int) -> int:
        return math.ceil(rows / self.global_batch)

    def steps(self, rows: int) -> int:
        """Optimizer steps over so many training rows."""
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch(rows))
