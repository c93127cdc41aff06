"""Writing a model to disk, in the most widely loadable of the formats that can hold it exactly.

A format is one file here: `refuses` says why it cannot hold a model, `write` writes one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from secateur.errors import OutputError, OutputExistsError
from secateur.export import native, stock
from secateur.export.beside import write_beside
from secateur.folders import disk_full_as_oserror, new_folder, resolved
from secateur.hf import quiet_transformers
from secateur.model.described import write_sums
from secateur.model.handle import Model
from secateur.quantities import bytes_of
from secateur.record import RECORD

Tier = Literal["A", "B"]


class Format(Protocol):
    """A way to write a model into a folder."""

    def refuses(self, model: Model) -> str | None:
        """Why the format cannot hold the model exactly: the rest of a sentence that begins with its name."""

    def write(self, model: Model, folder: Path, max_shard_size: str) -> dict[str, str]:
        """Write configuration and weights; return the sha256 of each file with weights, by name."""

    def loads_in(self, model: Model) -> str:
        """The versions in which what is written loads; others refuse it."""


FORMATS: dict[Tier, Format] = {"A": stock, "B": native}  # the most widely loadable first


def tier(model: Model) -> Tier:
    """The most widely loadable format that can hold the model exactly."""
    return next(name for name, form in FORMATS.items() if form.refuses(model) is None)


def loads_in(model: Model) -> str:
    """The versions in which the model loads once it is saved, in words."""
    return FORMATS[tier(model)].loads_in(model)


def save(
    model: Model,
    folder: Path,
    *,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Tier:
    """Write the model, what lies beside it and further text files into `folder`, whole or not at all.

    Args:
        files: name -> content; record and card.
        overwrite: replace a folder that is there.
        max_shard_size: larger models are sharded, with an index.

    Raises:
        What `check_output` raises.
    """
    check_output(folder, overwrite=overwrite, max_shard_size=max_shard_size)
    chosen = tier(model)
    with new_folder(folder, overwrite=overwrite) as partial, disk_full_as_oserror(), quiet_transformers():
        write_sums(partial, FORMATS[chosen].write(model, partial, max_shard_size))
        write_beside(model, partial)
        for name, content in (files or {}).items():
            # an input's name may have bytes that are no UTF-8 (surrogates here): a record must not fail over them
            (partial / name).write_bytes(content.encode("utf-8", "backslashreplace"))
    return chosen


def check_output(folder: Path, *, overwrite: bool = False, max_shard_size: str = "5GB") -> None:
    """Raise what `save` would raise for its arguments; for callers that work for hours first.

    Raises:
        OutputExistsError: the folder is there and not to be overwritten; or it is, but secateur did not write it.
        OutputError: nothing can be written there.
        InvalidOptionError: the size is none.
    """
    bytes_of(max_shard_size, "the shard size")
    folder = resolved(folder)
    if folder.exists():
        if not folder.is_dir():
            raise OutputExistsError(f"{folder} is a file; a folder is needed")
        if not (folder / RECORD).is_file() and any(folder.iterdir()):
            raise OutputExistsError(
                f"{folder} holds something that secateur did not write; it is not overwritten: choose another folder"
            )
        if not overwrite:
            raise OutputExistsError(f"{folder} exists; choose another folder, or ask for it to be overwritten")
    parent = next(path for path in folder.parents if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise OutputError(f"{folder} cannot be written: no right to write in {parent}")
