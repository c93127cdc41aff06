"""The most memory that a piece of work takes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.model.handle import Model

COUNTER = "torch's counter on the device"
TENSORS = "tensors alive at once; what an operation takes inside is not seen"


def peak_tensor_memory(model: Model, work: Callable[[], object]) -> tuple[int, str]:
    """Do some work with a model; return its weights' bytes and the most beside them, and how that was measured.

    Other models that are loaded do not count. On CUDA torch's own counter tells. A CPU has none, and the process's
    memory holds all models: there every tensor is counted from the operation that makes it until it is gone.
    """
    if not _devices(model):
        weights = _weights(model)
        living = _Living({tensor.untyped_storage()._cdata for tensor in weights if not tensor.is_meta})
        with living:
            work()
        return sum(tensor.nbytes for tensor in weights) + living.peak, TENSORS
    with device_peak(model) as told:
        work()
    assert told[0] is not None  # narrows the type; there are devices
    return told[0], COUNTER


@contextmanager
def device_peak(model: Model) -> Iterator[list[int | None]]:
    """Gives a list that holds, after the context, what `peak_tensor_memory` tells of CUDA; None where there is none.

    What else was on the devices before does not count, nor what was used there earlier: the counters begin anew.
    """
    told: list[int | None] = []
    devices = _devices(model)
    size = sum(tensor.nbytes for tensor in _weights(model))
    before = {device: torch.cuda.memory_allocated(device) for device in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    yield told
    beside = sum(torch.cuda.max_memory_allocated(device) - there for device, there in before.items())
    told.append(size + beside if devices else None)


def _weights(model: Model) -> list[torch.Tensor]:
    return list({id(each): each for each in [*model.hf.parameters(), *model.hf.buffers()]}.values())


def _devices(model: Model) -> set[torch.device]:
    return {tensor.device for tensor in _weights(model) if tensor.device.type == "cuda"}


class _Living(TorchDispatchMode):
    """Adds up the storages of the tensors that operations give, for as long as each is there.

    Args:
        known: storages that were there before.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak = 0
        self._known = known
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._see(each.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        self.peak = max(self.peak, sum(self._bytes.values()))
        weakref.finalize(storage, self._bytes.pop, key, None)
