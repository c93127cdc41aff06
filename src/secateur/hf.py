"""What transformers and the hub's client do to the whole process, held back: bars, warnings, shared generators;
and what transformers calls by another name from release to release."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import GenerationConfig, set_seed
from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and errors only, for the time of the context; the caller's settings come back."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it tells of every retry
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def with_cache(hf: Any, cache: Any) -> dict[str, Any]:
    """The arguments by which a model computes on a cache: named `cache` from transformers 5.24 on, where the older
    `past_key_values` is deprecated."""
    name = "cache" if "cache" in inspect.signature(hf.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


@contextmanager
def generation_settings_aside(hf: Any) -> Iterator[None]:
    """Without a model's own generation settings, which would fill what is not set in a call, and stop a saving where
    they contradict one another."""
    own = hf.generation_config
    hf.generation_config = GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = own


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
