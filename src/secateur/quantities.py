"""Quantities as people write them: bytes (24GB), tokens (32k), shares (25%), times (30d). All are read here."""

from __future__ import annotations

import math
import re

from secateur.errors import InvalidOptionError

_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"S": 1, "M": 60, "H": 3600, "D": 86_400, "W": 604_800}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_of(size: object, what: str = "a size") -> int:
    """200MB -> 200,000,000, as disks and the hub count; 24GiB is binary. A whole number is bytes.

    Raises:
        InvalidOptionError: it is none, or less than a byte; `what` names it.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    read = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(I?)B", size.strip().upper()) if isinstance(size, str) else None
    count = round(float(read[1]) * (_BINARY if read[3] else _DECIMAL)[read[2]]) if read else 0
    if not count:
        raise InvalidOptionError(f"{what} is a number above 0 with a unit, as 5GB or 500MB, not {size!r}")
    return count


def seconds_of(time: object, what: str = "a time") -> float:
    """30d -> 2,592,000; of weeks, days, hours, minutes and seconds (w, d, h, m, s).

    Raises:
        InvalidOptionError: it is none; `what` names it.
    """
    read = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([WDHMS])", str(time).strip().upper())
    if read is None:
        raise InvalidOptionError(f"{what} is a number with a unit, as 30d or 12h, not {time!r}")
    return float(read[1]) * _SECONDS[read[2]]


def tokens_of(number: object, what: str = "a number of tokens") -> int:
    """4096 -> 4096; 32k -> 32,768, as the lengths of contexts are named.

    Raises:
        InvalidOptionError: it is none, or less than one; `what` names it.
    """
    read = re.fullmatch(r"(\d+)\s*([KM]?)", str(number).strip().upper())
    if read is None or not int(read[1]):
        raise InvalidOptionError(f"{what} is a whole number of at least 1, as 4096 or 32k, not {number!r}")
    return int(read[1]) * (_BINARY[read[2]] if read[2] else 1)


def share_of(share: object, what: str = "a share") -> float:
    """0.25 -> 0.25; 25% -> 0.25.

    Raises:
        InvalidOptionError: it is none; `what` names it.
    """
    text = str(share).strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidOptionError(f"{what} is a number or a percentage, as 0.25 or 25%, not {share!r}")
    return value
