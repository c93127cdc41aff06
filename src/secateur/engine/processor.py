"""What this machine's processor is slow at."""

from __future__ import annotations

import functools
import logging
import math
import time

import torch

from secateur.model.handle import Model

_LARGE = 50_000_000  # parameters: anything is quick enough with fewer
_SIZE = 256  # of the square factors that are timed: some milliseconds where it is slow
_ROUNDS = 5


def warn_if_slow(model: Model) -> None:
    """Say, once per dtype, that the CPU computes the model's far more slowly than float32.

    One without instructions for bfloat16 or float16 takes several times as long for each product, up to twenty.
    """
    if model.device.type == "cpu" and model.dtype.itemsize < 4 and model.layout().parameters >= _LARGE:
        _warn_if_slow(model.dtype)


@functools.cache
def _warn_if_slow(dtype: torch.dtype) -> None:
    if (times := _seconds(dtype) / _seconds(torch.float32)) > 1.5:
        logging.getLogger(__name__).warning(
            "on this processor a matrix product takes %.0f times as long in %s as in float32; --dtype float32 is "
            "faster, in twice the memory", times, str(dtype).removeprefix("torch."),
        )  # fmt: skip


def _seconds(dtype: torch.dtype) -> float:
    """Of a matrix product, at best."""
    factor, least = torch.ones(_SIZE, _SIZE, dtype=dtype), math.inf
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        torch.nn.functional.linear(factor, factor)
        least = min(least, time.perf_counter() - start)
    return least
