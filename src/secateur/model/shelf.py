"""Where the tensors of a streamed model lie while its parts are closed: in its checkpoint, or where edits were kept."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import OutputError
from secateur.model.memory import return_freed_memory
from secateur.model.stored import Stored, TensorFile


class _ScratchFile:
    """A file of edited tensors, which goes with the last that lies in it."""

    def __init__(self, path: Path) -> None:
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __deepcopy__(self, memo: Any) -> _ScratchFile:
        return self


@dataclass(frozen=True)
class Home:
    """Where a tensor of a closed part lies, and the dtype that it has while the part is open."""

    stored: Stored
    dtype: torch.dtype
    file: _ScratchFile | None = field(default=None, compare=False)  # where it is not a checkpoint's


class Shelf:
    """Reads the tensors of parts, one part ahead by a thread of its own, and keeps those that were edited.

    Models that are copies of each other share one: nothing on it ever changes.

    Args:
        scratch: the folder in which one for edited tensors is made, which goes with the last model that reads from it.
    """

    def __init__(self, device: torch.device, scratch: Path | None) -> None:
        self.device = device
        return_freed_memory()
        try:
            if scratch is not None:
                scratch.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="secateur-blocks-", dir=scratch))
        except OSError as error:
            raise OutputError(f"no folder for edited blocks in {scratch}: {error.strerror or error}") from error
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.bytes_read = 0
        self._numbers = itertools.count()
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[Sequence[Home], Future[list[Tensor]]] | None = None

    def __deepcopy__(self, memo: Any) -> Shelf:
        return self

    def fetch(self, homes: Sequence[Home]) -> list[Tensor]:
        """Tensors on the device, in their dtypes."""
        ahead, self._ahead = self._ahead, None
        read = ahead[1].result() if ahead is not None and ahead[0] == homes else []
        tensors = []
        for home in homes:  # one by one, so that no two copies of a whole part are held
            raw = read.pop(0) if read else self._read([home])[0]
            tensors.append(raw.to(self.device, non_blocking=raw.is_pinned()).to(home.dtype))
        return tensors

    def read_ahead(self, homes: Sequence[Home]) -> None:
        """Begin to read what is likely to be fetched next, as it is in the files; nothing else is kept for it."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="secateur-blocks")
        self._ahead = homes, self._reader.submit(self._read, homes)

    def put(self, tensors: Mapping[str, Tensor]) -> dict[str, Home]:
        """Keep tensors, in a file that is there whole or not at all.

        Raises:
            OutputError: there is no room.
        """
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        file = self.folder / f"{next(self._numbers):06d}.safetensors"
        partial = file.with_suffix(".partial")
        try:
            with closing(TensorFile(partial, here, digested=False)) as written:
                for name, tensor in here.items():
                    written.put(name, tensor)
            partial.replace(file)
        except OSError as error:
            raise OutputError(
                f"edited blocks cannot be kept in {self.folder.parent}: {error.strerror or error}; choose a folder on "
                "a disk with room for the smaller model (--out; else TMPDIR), or load the model whole"
            ) from error
        found = {name: replace(written.stored(name, tensor), file=file) for name, tensor in here.items()}
        held = _ScratchFile(file)
        return {name: Home(stored, stored.dtype, held) for name, stored in found.items()}

    def _read(self, homes: Sequence[Home]) -> list[Tensor]:
        pinned = self.device.type == "cuda"
        self.bytes_read += sum(home.stored.nbytes for home in homes)
        with torch.cuda.device(self.device) if pinned else nullcontext():  # a thread begins on the first GPU
            return [home.stored.read(pinned=pinned) for home in homes]
