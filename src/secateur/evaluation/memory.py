"""The most memory that a piece of work takes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
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
    weights = {id(p): p for p in [*model.hf.parameters(), *model.hf.buffers()]}.values()
    size = sum(tensor.nbytes for tensor in weights)
    devices = {tensor.device for tensor in weights if tensor.device.type == "cuda"}
    if not devices:
        living = _Living({tensor.untyped_storage()._cdata for tensor in weights if not tensor.is_meta})
        with living:
            work()
        return size + living.peak, TENSORS
    before = {device: torch.cuda.memory_allocated(device) for device in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    work()
    return size + sum(torch.cuda.max_memory_allocated(device) - before[device] for device in devices), COUNTER


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
