"""What is installed here: packages, extras with what they lack, devices."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, metadata, requires, version

import torch
from msgspec import Struct
from packaging.requirements import Requirement

PACKAGES = ("secateur", "torch", "transformers", "safetensors", "huggingface-hub")
_OF_AUTHORS = {"all", "dev", "docs"}  # extras that are nobody's to miss


class Extra(Struct, frozen=True, kw_only=True):
    """Packages that some commands need.

    Attributes:
        missing: requirements that are not met, as pip names them.
        command: that installs them; None where nothing is missing.
    """

    name: str
    missing: list[str]
    command: str | None


class Device(Struct, frozen=True, kw_only=True):
    """A device of torch's.

    Attributes:
        name: as torch takes it.
        kind: as its maker calls it.
        bytes: of its memory; None of a CPU.
    """

    name: str
    kind: str
    bytes: int | None


class Installed(Struct, frozen=True, kw_only=True):
    """The machine as Python sees it.

    Attributes:
        python, system: versions.
        packages: versions by name, None of one that has no metadata.
        cuda: the version that torch was built for; None for none.
        threads: of torch on the CPU.
        extras: secateur's; empty where it runs from its source without being installed.
    """

    python: str
    system: str
    packages: dict[str, str | None]
    cuda: str | None
    threads: int
    devices: list[Device]
    extras: list[Extra]


def installed() -> Installed:
    """Look around. Packages are not imported, but for torch."""
    return Installed(
        python=platform.python_version(), system=f"{platform.system()} {platform.machine()}",
        packages={name: _version(name) for name in PACKAGES}, cuda=torch.version.cuda,
        threads=torch.get_num_threads(), devices=devices(), extras=extras(),
    )  # fmt: skip


def devices() -> list[Device]:
    """The CPU and each CUDA device."""
    found = [Device(name="cpu", kind=platform.processor() or platform.machine(), bytes=None)]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found.append(Device(name=f"cuda:{number}", kind=about.name, bytes=about.total_memory))
    return found


def extras(package: str = "secateur") -> list[Extra]:
    """The extras of an installed package, by its own metadata."""
    try:
        about = metadata(package)
    except PackageNotFoundError:
        return []
    wanted = [Requirement(line) for line in requires(package) or ()]
    made = []
    for name in sorted(set(about.get_all("Provides-Extra") or ()) - _OF_AUTHORS):
        own = [need for need in wanted if need.marker and need.marker.evaluate({"extra": name})]
        missing = [f"{need.name}{need.specifier}" for need in own if not (_met(need) or need.name == package)]
        made.append(Extra(name=name, missing=missing, command=f"pip install '{package}[{name}]'" if missing else None))
    return made


def _met(need: Requirement) -> bool:
    found = _version(need.name)
    return found is not None and need.specifier.contains(found, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
