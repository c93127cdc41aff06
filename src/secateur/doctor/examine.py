"""All checks on all devices and dtypes, and what comes of each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from msgspec import Struct
from torch import Tensor
from torch.nn import functional as F

from secateur.doctor.checks import CHECKS, OF_FAMILIES, OF_METHODS, TOLERANCES, Case, Pair
from secateur.doctor.installed import Installed, installed
from secateur.engine.moments import matmul_precision
from secateur.errors import InvalidOptionError, UnknownNameError, UnsupportedEditError
from secateur.hf import quiet_transformers
from secateur.methods import methods
from secateur.model.load import check_device
from secateur.model.tiny import TINY
from secateur.run import Run

FAMILIES_TRIED = ("llama", "gpt2", "gemma2")  # grouped queries; Conv1D and learned positions; sliding windows

_WORDS = 300  # characters of a value that is no tensor

Verdict = Literal["passed", "failed", "not supported"]


class Finding(Struct, frozen=True, kw_only=True):
    """What came of one check.

    Attributes:
        check: its name, one of CHECKS.
        subject: the family or method that it was tried on; None for what depends on the device alone.
        device: as torch names it.
        dtype: of the model.
        difference: the largest between what was expected and what came, as a share of the largest number expected;
            None where no numbers were compared.
        tolerance: what that may be.
        what: was compared where it failed, or why it is not supported; None where it passed.
        expected, got: in words, where it failed.
        seconds: that it took.
    """

    check: str
    subject: str | None
    device: str
    dtype: str
    verdict: Verdict
    difference: float | None = None
    tolerance: float | None = None
    what: str | None = None
    expected: str | None = None
    got: str | None = None
    seconds: float = 0.0


class Examination(Struct, frozen=True, kw_only=True):
    """What `secateur doctor --json` prints."""

    installed: Installed
    outcomes: list[Finding]

    @property
    def failed(self) -> list[Finding]:
        return [outcome for outcome in self.outcomes if outcome.verdict == "failed"]


def examine(
    devices: Sequence[str] | None = None,
    *,
    dtypes: Sequence[str] = tuple(TOLERANCES),
    families: Sequence[str] = FAMILIES_TRIED,
    checks: Sequence[str] = tuple(CHECKS),
    run: Run | None = None,
) -> Examination:
    """Try the checks; what fails, or crashes, is an outcome and no error. TF32 is off meanwhile.

    Args:
        devices: as torch names them; the CPU and each CUDA device if None.
        dtypes: of TOLERANCES.
        families: of TINY.

    Raises:
        InvalidOptionError: no such device, or "auto", which is several.
        UnknownNameError: no such dtype, family or check.
    """
    where = list(devices) if devices else all_devices()
    if "auto" in where:
        raise InvalidOptionError("'auto' is all devices together, and a check runs on one; name it, as cpu or cuda:1")
    for device in where:
        check_device(device)
    for kind, names, known in (
        ("family", families, TINY),
        ("check", checks, CHECKS),
        ("dtype", dtypes, TOLERANCES),
    ):
        for name in names:
            if name not in known:
                raise UnknownNameError.of(kind, name, known)
    cases = [
        (check, Case(subject, device, getattr(torch, dtype)))
        for device in where
        for dtype in dtypes
        for check in checks
        for subject in _subjects(check, families)
    ]
    outcomes, refused = [], dict[tuple[str, torch.dtype], str | None]()
    with (run or Run()).progress("doctor", len(cases)) as done, quiet_transformers(), _errors_only():
        for check, case in cases:
            place = case.device, case.dtype
            if place not in refused:
                refused[place] = unsupported(*place)
            outcomes.append(_outcome(check, case, refused[place]))
            done(1)
    return Examination(installed=installed(), outcomes=outcomes)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Tiny models have no tokenizer, and few tokens; nobody needs to be warned of either."""
    logger = logging.getLogger("secateur")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def all_devices() -> list[str]:
    """The CPU and each CUDA device."""
    return ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Why torch cannot run a model in that dtype there; None where it can."""
    try:
        with torch.no_grad():
            x = torch.ones(1, 2, 8, 8, device=device, dtype=dtype)
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
            for norm in (F.layer_norm, F.rms_norm):
                x = norm(F.silu(F.linear(x, x[0, 0])), (8,))
            x.sum().item()
    except (RuntimeError, NotImplementedError) as error:
        # every device has float32, and room for this: else something is broken, and the checks say what
        if dtype == torch.float32 or isinstance(error, torch.OutOfMemoryError):
            return None
        return str(error).partition("\n")[0]
    return None


def _subjects(check: str, families: Sequence[str]) -> Iterable[str]:
    return families if check in OF_FAMILIES else methods() if check in OF_METHODS else [""]


def _outcome(check: str, case: Case, refused: str | None) -> Finding:
    dtype, start = str(case.dtype).removeprefix("torch."), time.monotonic()
    here = partial(Finding, check=check, subject=case.subject or None, device=case.device, dtype=dtype)
    if refused is not None:
        return here(verdict="not supported", what=refused)
    worst, limit = None, TOLERANCES[dtype]
    try:
        with matmul_precision():
            for pair in CHECKS[check](case):
                limit = TOLERANCES[dtype] if pair.tolerance is None else pair.tolerance
                apart = difference(pair)
                if not apart <= limit:  # NaN is a failure
                    expected, got = in_words(pair)
                    numbers = isinstance(pair.got, Tensor)
                    return here(
                        verdict="failed", what=pair.what, expected=expected, got=got,
                        difference=apart if numbers else None, tolerance=limit if numbers else None,
                    )  # fmt: skip
                worst = max(worst or 0.0, apart)
    except UnsupportedEditError as error:
        return here(verdict="not supported", what=str(error))
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return here(verdict="failed", what="the check itself", expected="no error", got=got)
    return here(verdict="passed", difference=worst, tolerance=limit, seconds=round(time.monotonic() - start, 3))


def difference(pair: Pair) -> float:
    """The largest between two tensors as a share of the largest number expected, infinite where they do not compare; of
    anything else 0 or infinity."""
    expected, got = pair.expected, pair.got
    if not (isinstance(expected, Tensor) and isinstance(got, Tensor)):
        return 0.0 if expected == got else math.inf
    if expected.shape != got.shape:
        return math.inf
    one, other = expected.detach().double().cpu(), got.detach().double().cpu()
    return float((one - other).abs().max() / one.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def in_words(pair: Pair) -> tuple[str, str]:
    """What was expected and what came: of tensors of one shape, the numbers that are farthest apart."""
    expected, got = pair.expected, pair.got
    if not (isinstance(expected, Tensor) and isinstance(got, Tensor)):
        return _short(expected), _short(got)
    if expected.shape != got.shape:
        return f"shape {tuple(expected.shape)}", f"shape {tuple(got.shape)}"
    one, other = expected.detach().double().cpu().flatten(), got.detach().double().cpu().flatten()
    place = int((one - other).abs().nan_to_num(math.inf).argmax())
    return f"{one[place]:.6g}", f"{other[place]:.6g}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _WORDS else f"{text[:_WORDS]} ..."
