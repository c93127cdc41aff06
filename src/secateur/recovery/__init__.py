"""Healing a pruned model: LoRA adapters trained by peft and transformers' Trainer, then merged.

`trainer` is imported where it is needed, since it takes its time.
"""

from secateur.isolation import own_randomness
from secateur.recovery.adapter import attach, detach, require_extra, targets
from secateur.recovery.data import Examples, make_examples
from secateur.recovery.objectives import Distillation, Labels, Objective
from secateur.recovery.settings import Settings, Template

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
