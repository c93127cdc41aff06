"""Tensors in safetensors files: what the headers say, and reading and writing them one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from secateur.assets.cache import sha256_of
from secateur.errors import CheckpointError
from secateur.model.described import Description
from secateur.model.handle import tensor_bytes

# The format's names of dtypes, in the order in which tensors lie in a file: the widest first, so that all are aligned.
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32",
    torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_LINE = 64  # bytes; where in a cache line a matrix begins decides how a CPU sums up its products


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        start: of its bytes, from the file's beginning.
        address: where its bytes begin in memory once it is read, modulo a cache line: there products come out to the
            bit as with the tensor that was written, or that transformers maps into memory.
    """

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    address: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def read(self, *, pinned: bool = False) -> Tensor:
        """The tensor, in memory of its own.

        Args:
            pinned: in memory that a GPU can copy from by itself.

        Raises:
            CheckpointError: the file is not what it was.
        """
        room = torch.empty(self.nbytes + _LINE, dtype=torch.uint8, pin_memory=pinned)
        begin = (self.address - room.data_ptr()) % _LINE
        part = room[begin : begin + self.nbytes]
        into = part.numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start)
                while len(into) and (count := file.readinto(into)):
                    into = into[count:]
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read any more: {error.strerror or error}") from error
        if len(into):
            raise CheckpointError(f"{self.file} has become shorter while it was read")
        return part.view(self.dtype).view(self.shape)


def floating_dtype(tensors: Iterable[Stored]) -> torch.dtype:
    """The one in which transformers loads a checkpoint whose configuration states none: its first tensor's that has
    one; float32 without any."""
    return next((each.dtype for each in tensors if each.dtype.is_floating_point), torch.float32)


def stored_in(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name; their values are not read.

    Raises:
        CheckpointError: it is no whole safetensors file.
    """
    try:
        with safetensors.safe_open(file, framework="pt"):  # the library checks all that a header can be wrong in
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
    stored: dict[str, Stored] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if (dtype := _BY_NAME.get(entry["dtype"])) is None:
            raise CheckpointError(f"{file}: {name} is of {entry['dtype']}; weights are of F32, BF16 or F16")
        start = 8 + size + entry["data_offsets"][0]
        address = 0 if start % dtype.itemsize else start % _LINE  # nobody computes with what is not aligned at all
        stored[name] = Stored(file, start, dtype, tuple(entry["shape"]), address)
    return stored


def weight_files(about: Description) -> list[Path]:
    """The safetensors files of a model in a folder or on the hub, each once, in the order of their names.

    Raises:
        CheckpointError: its index is damaged, or names a file that is not there.
        FetchError: the hub does not give one.
    """
    index = about.file(SAFE_WEIGHTS_INDEX_NAME)
    if (whole := about.file(SAFE_WEIGHTS_NAME)) is not None:  # the order in which transformers looks
        return [whole]
    if index is None:
        raise CheckpointError(f"{about.name} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or (path := about.file(name)) is None:
            raise CheckpointError(f"{about.name} has no {name}, which {SAFE_WEIGHTS_INDEX_NAME} lists")
        files.append(path)
    return files


class TensorFile:
    """A safetensors file that is being written: a header that says where each tensor lies, then their bytes.

    Args:
        tensors: what it will hold; their shapes count.
        digested: its sha256 will be asked for.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], *, digested: bool = True) -> None:
        self._path, self._file = path, path.open("wb")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._start: dict[str, int] = {}
        end, order = 0, list(DTYPES)
        for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
            self._start[name], end = end, end + tensor.nbytes
            offsets = [self._start[name], end]
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._digest = hashlib.sha256()
        self._digested = 0 if digested else -1  # bytes from the file's beginning
        try:
            self._write(0, len(text).to_bytes(8, "little") + text)
        except BaseException:  # the disk is full
            with suppress(OSError):
                self.close()
            raise

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor's bytes to where they belong."""
        self._write(self._data + self._start[name], tensor_bytes(tensor))

    def stored(self, name: str, tensor: Tensor) -> Stored:
        """The tensor, once it was put, as one that lies where it lies now in memory."""
        address = tensor.data_ptr() % _LINE
        return Stored(self._path, self._data + self._start[name], tensor.dtype, tuple(tensor.shape), address)

    def sha256(self) -> str:
        """Of the whole file: taken while it was written, or else, if that was not from front to back, by reading it."""
        whole = self._digested == self._path.stat().st_size
        return self._digest.hexdigest() if whole else sha256_of(self._path)

    def _write(self, at: int, content: bytes | memoryview) -> None:
        self._file.seek(at)
        self._file.write(content)
        if at == self._digested:
            self._digest.update(content)
            self._digested += len(content)

    def close(self) -> None:
        self._file.close()
