"""How much memory a model may take on a device, and giving back what it no longer takes."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from secateur.quantities import bytes_of

LIMIT = "SECATEUR_MEMORY"  # in the environment: what models may take, as "20GB", on machines that are shared
_M_MMAP_THRESHOLD = -3  # in malloc.h
_MAPPED_BYTES = 2**20


def free_bytes(device: torch.device | str) -> float | None:
    """What is free on a device, None where the system does not say; of a CPU also within the limits of its cgroups.

    Raises:
        InvalidOptionError: the environment's limit is no size.
    """
    free = list(_free_on_cuda(torch.device(device)) if torch.device(device).type == "cuda" else _free_here())
    if stated := os.environ.get(LIMIT):
        free.append(bytes_of(stated, LIMIT))
    return min(free, default=None)


def _free_on_cuda(device: torch.device) -> Iterator[float]:
    free, _ = torch.cuda.mem_get_info(device)
    yield free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own cache


def _free_here() -> Iterator[float]:
    if (available := re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))) is not None:
        yield 1024 * float(available[1])
    for line in _text("/proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds:
            yield from _left("/sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _left("/sys/fs/cgroup/memory", path, *files)


def _left(root: str, path: str, limit: str, used: str, cached: str) -> Iterator[float]:
    """What a control group and those around it leave: files that lie in memory make room when it is needed."""
    folder = Path(root) / path.lstrip("/")
    for group in (folder, *folder.parents):
        most, now = _text(group / limit).strip(), _text(group / used).strip()
        if most.isdigit() and now.isdigit():
            found = re.search(rf"^{cached} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
            yield float(int(most) - int(now) + (int(found[1]) if found else 0))
        if str(group) == root:
            return


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def return_freed_memory() -> None:
    """Have the C library give the memory of tensors back to the system as they go, for the whole process.

    glibc learns to keep ever larger ones (up to 32 MB) for itself, in pieces that the next block does not fit: a walk
    over many blocks would then hold several times what is open. Other libraries do without.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def trim_heap() -> None:
    """Have it give back smaller ones too, which it keeps between those that stay: megabytes with each block."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
