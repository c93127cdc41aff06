"""Where hidden states lie: in memory, or, of a streamed model and beyond a budget, in files that are mapped into it.

Running in groups what does not fit would read a streamed model once per group. The system pages mapped files in and
out as they are needed, and their bytes are those that memory would hold, so results are the same.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import OutputError
from secateur.model.handle import Model

STATE_BYTES = 2**30  # hidden states in memory at once; of streamed models the rest is in files


class Room:
    """Memory, on the device where states are computed."""

    device: torch.device | None = None  # where states must be taken to be computed with, if it is not where they lie

    def empty(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Room for states of a shape, in the dtype of others."""
        return like.new_empty(tuple(shape))

    def takes(self, place: Tensor, states: Tensor) -> bool:
        """Whether states of that width can lie in the place of others."""
        return place.shape[-1] == states.shape[-1] and place.device == states.device

    def put(self, states: Tensor) -> Tensor:
        """States as they will lie here."""
        return states


class MappedRoom(Room):
    """Files in a folder, without names where the system can do without: they go with the tensors.

    Args:
        device: of the computation.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device

    def empty(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """
        Raises:
            OutputError: the disk has no such room.
        """
        count = torch.Size(shape).numel()
        try:
            handle, name = tempfile.mkstemp(prefix="states-", dir=self.folder)
            try:
                if hasattr(os, "posix_fallocate"):  # a hole that the disk cannot fill later would be a crash
                    os.posix_fallocate(handle, 0, max(1, count * like.dtype.itemsize))
                states = torch.from_file(name, shared=True, size=count, dtype=like.dtype).view(tuple(shape))
            finally:
                os.close(handle)
                with suppress(OSError):  # Windows: it is in use, and goes with the folder
                    os.unlink(name)
        except OSError as error:
            raise OutputError(
                f"hidden states do not fit in {self.folder.parent}: {error.strerror or error}; calibrate on fewer "
                "tokens, or choose a folder on another disk (--out; where nothing is written, TMPDIR)"
            ) from error
        return states

    def takes(self, place: Tensor, states: Tensor) -> bool:
        return place.shape[-1] == states.shape[-1]

    def put(self, states: Tensor) -> Tensor:
        return self.empty(states, states.shape).copy_(states)


def room_for(model: Model, states_bytes: float, budget_bytes: float) -> Room:
    """Memory; of a streamed model, files where the states take more than the budget."""
    if model.is_streamed and states_bytes > budget_bytes and (folder := model.scratch) is not None:
        return MappedRoom(folder, model.device)
    return Room()
