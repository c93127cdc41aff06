"""Sums of a checkpoint's weight files: written beside them, compared when they are loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from secateur.assets.cache import sha256_of
from secateur.errors import CheckpointError
from secateur.model.described import Description

SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the sha256 of files, by name, beside them."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    (folder / SUMS).write_text(text, encoding="utf-8")


def verify_weights(about: Description) -> bool:
    """Compare the weight files with the sums beside them; a checkpoint without sums is left alone.

    Reading is all it costs, about a second per gigabyte; but files of the hub are fetched if they are not there yet.

    Returns:
        Whether there were sums to compare with.

    Raises:
        CheckpointError: a file is missing or is not what was written.
    """
    path = about.file(SUMS)
    if path is None:
        return False
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    for line in lines:
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or Path(name).name != name:
            raise CheckpointError(f"{path} is damaged: {line[:80]!r} is no line of a sha256 and a file's name")
        weights = about.file(name)
        if weights is None:
            instead = "it was not uploaded, or cannot be fetched now" if about.on_hub else "restore it from a copy"
            raise CheckpointError(f"{about.name} has no {name}, which {SUMS} lists; {instead}")
        if sha256_of(weights) != digest:
            raise CheckpointError(
                f"{weights} is not the file that secateur wrote: its sha256 differs from {SUMS}. If it is "
                f"damaged, restore it from a copy; if it was changed on purpose, take {SUMS} away"
            )
    return True
