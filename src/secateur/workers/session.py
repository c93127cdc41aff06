"""A session of Ray: in this machine, or a cluster by its address. Nothing is asked of the network but that address.

Ray hands arguments between its own processes by cloudpickle; what secateur writes stays safetensors and JSON. Tensors
travel through Ray's object store as their bytes, which processes of one machine share.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import InvalidOptionError, MissingExtraError, WorkersError
from secateur.version import __version__

_REACHED_S = 5.0  # for the port of a cluster to answer; Ray itself waits for two minutes and then ends the process
_PROBED_S = 120.0  # for a worker to start and look


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Processes that share the work of one command.

    Attributes:
        count: how many.
        address: of a Ray cluster, HOST:PORT, or "auto" for the one that this machine belongs to; None starts Ray here
            for the time of the command.
        cpus: of each, and its torch threads; those of this process, here divided among the workers, if None.
        gpus: of each; one where the model is on CUDA, if None.
        retries: how often what a worker did is done again after the worker was killed.

    Raises:
        InvalidOptionError: a number out of its range, or no such address.
    """

    count: int
    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidOptionError(f"workers are at least 1, not {self.count}")
        if self.threads < 1:
            raise InvalidOptionError(f"a worker takes at least 1 CPU, not {self.cpus}")
        if self.gpus is not None and (self.gpus < 0 or (self.gpus > 1 and self.gpus % 1)):
            raise InvalidOptionError(f"a worker takes a whole number of GPUs or a share of one, not {self.gpus}")
        if self.address is not None and self.address != "auto":
            host, _, port = self.address.rpartition(":")
            if not (host and port.isdecimal() and int(port) < 2**16) or "/" in host:
                raise InvalidOptionError(
                    "a Ray cluster is reached by HOST:PORT of its head, as `ray start --head` says it, or by `auto` "
                    f"on one of its machines; not by {self.address!r}"
                )

    @property
    def threads(self) -> int:
        """CPUs, and torch threads, of each."""
        if self.cpus is not None:
            return self.cpus
        here = torch.get_num_threads()
        return max(1, here // self.count) if self.address is None else here

    def options(self, device: str) -> dict[str, Any]:
        """What a worker asks Ray for, where the model is on that kind of device."""
        gpus = self.gpus if self.gpus is not None else float(device == "cuda")
        return {"num_cpus": self.threads, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}


def ray_module() -> Any:
    """
    Raises:
        MissingExtraError: Ray is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would phone home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of a change to come
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError.of("ray", "ray", "--workers") from error
    return ray


@contextmanager
def session(workers: Workers | None) -> Iterator[None]:
    """Ray is there for the time of the context: started here, or the cluster joined; or the one that this process is in
    already, which stays. Without workers nothing is done.

    Raises:
        MissingExtraError: Ray is not installed.
        WorkersError: there is no cluster at the address, or Ray does not start.
    """
    if workers is None:
        yield
        return
    ray = ray_module()
    if ray.is_initialized():
        share_tensors()
        yield
        return
    with ExitStack() as stack:
        _start(ray, workers, stack)
        stack.callback(ray.shutdown)  # first of all: ends the workers
        share_tensors()
        yield


def _start(ray: Any, workers: Workers, stack: ExitStack) -> None:
    settings: dict[str, Any] = {"address": workers.address}
    if workers.address is None:
        folder = tempfile.TemporaryDirectory(prefix="secateur-ray-", ignore_cleanup_errors=True)
        settings = {
            "address": "local", "num_cpus": workers.count * workers.threads, "include_dashboard": False,
            "_temp_dir": stack.enter_context(folder),
        }  # fmt: skip
    elif workers.address != "auto":
        host, _, port = workers.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED_S).close()
        except OSError as error:
            raise WorkersError(
                f"no Ray cluster answers at {workers.address} ({error.strerror or error}); `ray start --head` says the "
                "address of one, and without --ray the workers are of this machine"
            ) from error
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (Exception, SystemExit) as error:  # it ends the process where a cluster does not answer rightly
        token = (
            "" if workers.address is None else ". A cluster that asks for a token needs RAY_AUTH_MODE=token here, too"
        )
        raise WorkersError(f"Ray could not be joined: {first_line(error)}{token}") from error


def require_workers(workers: Workers, device: str, folder: Path | None = None) -> None:
    """Refuse, before any work, what the cluster or its workers lack.

    Args:
        folder: which the workers must see.

    Raises:
        WorkersError: there is no room for so many, they have another version of secateur or torch, or they see another
            folder than this process.
    """
    ray, options = ray_module(), workers.options(device)
    room = sum(_room(node["Resources"], options) for node in ray.nodes() if node["Alive"])
    if room < workers.count:
        raise WorkersError(
            f"Ray has room for {room} workers of {options['num_cpus']} CPUs and {options['num_gpus']:g} GPUs, not for "
            f"{workers.count}; ask for fewer (--workers), or for smaller ones (--worker-cpus, --worker-gpus)"
        )
    mark = None if folder is None else folder / f".seen-{uuid.uuid4().hex[:8]}"
    try:
        if mark is not None:
            mark.touch()
        probe = ray.remote(_probe).options(max_retries=workers.retries, **options)
        seen = ray.get([probe.remote(mark) for _ in range(workers.count)], timeout=_PROBED_S)
    except ray.exceptions.GetTimeoutError as error:
        raise WorkersError(
            f"{workers.count} workers did not start within {_PROBED_S:.0f} s; others may have taken the CPUs and GPUs"
        ) from error
    except ray.exceptions.RayError as error:
        raise WorkersError(f"a worker could not be started: {first_line(error)}") from error
    finally:
        if mark is not None:
            mark.unlink(missing_ok=True)
    for host, versions, sees in seen:
        if versions != _versions():
            raise WorkersError(f"{host} has {versions}, this process {_versions()}; the workers need the same")
        if not sees:
            raise WorkersError(
                f"{host} does not see {folder}; the folder must be on a file system that all machines see"
            )


def _room(has: dict[str, float], options: dict[str, Any]) -> int:
    asked = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    return int(min(has.get(name, 0) // much for name, much in asked.items() if much))


def _probe(mark: Path | None) -> tuple[str, str, bool]:
    return socket.gethostname(), _versions(), mark is None or mark.exists()


def _versions() -> str:
    return f"secateur {__version__}, torch {torch.__version__}"


def begin_work(threads: int, folder: Path) -> None:
    """For a worker, before anything else: its threads, and the folder that relative names are of, where it is there."""
    torch.set_num_threads(threads)
    share_tensors()
    if folder.is_dir():
        os.chdir(folder)


def caused(error: Exception) -> Exception:
    """What a worker raised, as it raised it; or a typed error of a worker that died."""
    ray = ray_module()
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    return WorkersError(f"a worker died, and was not to be replaced: {first_line(error)}")


def share_tensors() -> None:
    """Hand tensors of this process over as their bytes: Ray's store then holds them once for all of a machine."""
    ray_module().util.register_serializer(Tensor, serializer=_to_bytes, deserializer=_from_bytes)


def _to_bytes(tensor: Tensor) -> tuple[Any, torch.dtype, tuple[int, ...]]:
    data = tensor.detach().cpu().contiguous()
    return data.flatten().view(torch.uint8).numpy(), data.dtype, tuple(data.shape)


def _from_bytes(stored: tuple[Any, torch.dtype, tuple[int, ...]]) -> Tensor:
    """A tensor on the stored bytes, which must only be read."""
    data, dtype, shape = stored
    if not data.size:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(data)).view(dtype).reshape(shape)


def first_line(error: BaseException) -> str:
    """What an error says, without the trace that Ray puts behind it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
