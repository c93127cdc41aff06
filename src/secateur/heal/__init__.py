"""Healing a pruned model: LoRA adapters trained by peft and transformers' Trainer, then merged.

`trainer` is imported where it is needed, since it takes its time.
"""

from secateur.heal.adapter import attach, detach, require_extra, targets
from secateur.heal.data import Examples, make_examples
from secateur.heal.objectives import Distillation, Labels, Objective
from secateur.heal.settings import Settings, Template
from secateur.hf import own_randomness

__all__ = [
    "Distillation",
    "Examples",
    "Labels",
    "Objective",
    "Settings",
    "Template",
    "attach",
    "detach",
    "make_examples",
    "own_randomness",
    "require_extra",
    "targets",
]
