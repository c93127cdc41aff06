"""Writing a model to disk: in the most widely loadable format that can hold it exactly, or as an export for an engine.

A format is one file here: `refuses` says why it cannot hold a model, `write` writes one. `FORMATS` are those that a
checkpoint is saved in, which secateur loads again; `EXPORTS` those that somebody asks for by name, for an engine.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from secateur.errors import (
    InvalidOptionError,
    MissingExtraError,
    OutputError,
    OutputExistsError,
    UnknownNameError,
    UnsupportedExportError,
)
from secateur.export import gguf, native, nemotron_nas, padded, stock, vllm
from secateur.export.beside import write_beside
from secateur.folders import disk_full_as_oserror, new_folder, resolved
from secateur.hf import quiet_transformers
from secateur.model.described import write_sums
from secateur.model.handle import Model
from secateur.quantities import bytes_of
from secateur.record import RECORD, public_name
from secateur.version import __version__

Tier = Literal["A", "B"]
EXPORT = "secateur-export.json"  # in the folder of an export: which it is, and of what


class Format(Protocol):
    """A way to write a model into a folder."""

    def refuses(self, model: Model) -> str | None:
        """Why the format cannot hold the model exactly: the rest of a sentence that begins with its name.

        The model may be hollow: it asks for no weights.
        """

    def loads_in(self, model: Model) -> str:
        """The versions in which what is written loads; others refuse it."""


class Checkpoint(Format, Protocol):
    """A format that secateur loads again."""

    def write(self, model: Model, folder: Path, max_shard_size: str) -> dict[str, str]:
        """Write configuration and weights; return the sha256 of each file with weights, by name."""


class Export(Format, Protocol):
    """A format for an engine. Its card says what follows.

    An export may have options: parameters of its `write` with defaults. `refuses` and `nbytes` have those that they
    depend on. One that is written by another package names it: `NEEDS`, also the extra's name.

    Attributes:
        LIBRARY: the hub's name of the library that loads it.
        USAGE: the exact commands, in Markdown, and which of them were run.
        write: as a checkpoint's, with options.
        nbytes: of the weights as it writes them, of a model that may be hollow.
    """

    LIBRARY: str
    USAGE: str
    write: Callable[..., dict[str, str]]
    nbytes: Callable[..., int]


FORMATS: dict[Tier, Checkpoint] = {"A": stock, "B": native}  # the most widely loadable first
# Kin stand side by side: where one refuses, the nearest that does not is the alternative.
EXPORTS: dict[str, Export] = {"vllm": vllm, "nemotron-nas": nemotron_nas, "padded": padded, "gguf": gguf}


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
        _write_files(files or {}, partial)
    return chosen


def export(
    model: Model,
    to: str,
    folder: Path,
    *,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Write the model for an engine, with what lies beside it, into `folder`, whole or not at all.

    Args:
        to: one of `EXPORTS`.
        files, overwrite: as `save` has them.
        options: of the format; `max_shard_size` of those in several files.

    Raises:
        What `require_export` and `check_output` raise.
    """
    form = require_export(model, to, **options)
    check_output(folder, overwrite=overwrite)
    about = {
        "format": to,
        "options": export_options(to, options),
        "model": public_name(model.source.get("name") or ""),
        "secateur": __version__,
    }
    files = {EXPORT: json.dumps(about, indent=2) + "\n", **(files or {})}
    with new_folder(folder, overwrite=overwrite) as partial, disk_full_as_oserror(), quiet_transformers():
        write_sums(partial, form.write(model, partial, **options))
        write_beside(model, partial)
        _write_files(files, partial)


def require_export(model: Model, to: str, **options: Any) -> Export:
    """The format of that name, if it can hold the model.

    Args:
        model: it may be hollow.
        options: of the format.

    Raises:
        UnknownNameError: there is no such format.
        InvalidOptionError: it has no such option, or a shard size is none.
        UnsupportedExportError: it cannot hold the model exactly.
        MissingExtraError: what writes it is not installed.
    """
    if to not in EXPORTS:
        raise UnknownNameError.of("export", to, EXPORTS)
    form = EXPORTS[to]
    own = _options(form.write)
    for name in options:
        if name not in own:
            raise InvalidOptionError(f"{to} has no option '{name}'; it has {', '.join(own) or 'none'}")
    bytes_of(options.get("max_shard_size", "5GB"), "the shard size")
    if (reason := refusal(model, to, **options)) is None:
        if (package := getattr(form, "NEEDS", None)) and importlib.util.find_spec(package) is None:
            raise MissingExtraError.of(package, package, f"export --to {to}")
        return form
    place = list(EXPORTS).index(to)
    kin = sorted(enumerate(EXPORTS), key=lambda pair: abs(pair[0] - place))[1:]
    near = next((name for _, name in kin if refusal(model, name) is None), None)
    if options and refusal(model, to) is None:
        near = f"{to} without these options"
    instead = f"--to {near} can hold it" if near else "no export can; transformers loads the checkpoint as it is"
    raise UnsupportedExportError(f"{to} {reason} ({instead})")


def export_options(to: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All of a format's, those that are not given at their defaults."""
    return _options(EXPORTS[to].write) | dict(options)


def refusal(model: Model, to: str, **options: Any) -> str | None:
    """Why an export cannot hold the model exactly: the rest of a sentence that begins with its name; None if it can."""
    form = EXPORTS[to]
    return form.refuses(model, **_asked(form.refuses, options))


def nbytes(model: Model, to: str, **options: Any) -> int:
    """Bytes of the weights as an export writes them. The model may be hollow."""
    form = EXPORTS[to]
    return form.nbytes(model, **_asked(form.nbytes, options))


def _asked(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _options(function)}


def _options(function: Any) -> dict[str, Any]:
    """A format's options with their defaults: the parameters of its function that have one."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _write_files(files: Mapping[str, str], folder: Path) -> None:
    for name, content in files.items():
        # an input's name may have bytes that are no UTF-8 (surrogates here): a record must not fail over them
        (folder / name).write_bytes(content.encode("utf-8", "backslashreplace"))


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
        ours = (folder / RECORD).is_file() or (folder / EXPORT).is_file()
        if not ours and any(folder.iterdir()):
            raise OutputExistsError(
                f"{folder} holds something that secateur did not write; it is not overwritten: choose another folder"
            )
        if not overwrite:
            raise OutputExistsError(f"{folder} exists; choose another folder, or ask for it to be overwritten")
    parent = next(path for path in folder.parents if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise OutputError(f"{folder} cannot be written: no right to write in {parent}")
