"""What transformers and the hub's client do to the whole process, held back: bars, warnings, shared generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import set_seed
from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and errors only, for the time of the context; the caller's settings come back."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    logging.disable_progress_bar()
    _set(logging, ERROR)
    _set(hub_logging, ERROR)  # it tells of every retry
    try:
        yield
    finally:
        _set(logging, verbosity)
        _set(hub_logging, hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def _set(library: Any, verbosity: int) -> None:
    """Only where it changes: the caches of all loggers of the process are emptied each time."""
    if library.get_verbosity() != verbosity:
        library.set_verbosity(verbosity)


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """New linear maps and embeddings are left unfilled, for the time of the context: on `meta` there is nothing to
    fill, and torch draws all the same, which is a good part of what a hollow model takes."""
    kinds: tuple[Any, ...] = nn.Linear, nn.Embedding
    before = [kind.reset_parameters for kind in kinds]
    try:
        for kind in kinds:
            kind.reset_parameters = lambda module: None
        yield
    finally:
        for kind, own in zip(kinds, before, strict=True):
            kind.reset_parameters = own


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed the shared generators of Python, numpy and torch for the time of the context."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            set_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
