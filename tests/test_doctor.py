"""`secateur doctor`: it passes here, and whatever is sabotaged fails by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import json
from test_cli import call
from torch import Tensor

from secateur.cli import doctor as command
from secateur.doctor import checks, examine, installed
from secateur.doctor.checks import CHECKS, TOLERANCES, Pair
from secateur.doctor.examine import FAMILIES_TRIED, Examination, Finding
from secateur.doctor.installed import extras
from secateur.engine.moments import SecondMoment
from secateur.errors import InvalidOptionError, UnknownNameError
from secateur.methods import get_method, registry
from secateur.model.family_plugins import IN_TABLE
from secateur.model.modeling_secateur import FAMILIES
from secateur.model.stored import Stored
from secateur.model.tiny import TINY
from secateur.surgery.edits import DropBlock, Edit

QUICK = ("statistics", "walk", "sweep", "edits", "rotation", "cache", "checkpoint", "streamed")


def failures(check: str, subject: str = "llama", dtype: str = "float32") -> list[Finding]:
    tried: dict[str, Any] = {"families": (subject,)} if check != "pruning" else {}
    return examine.examine(["cpu"], dtypes=(dtype,), checks=(check,), **tried).failed


@pytest.mark.parametrize(("subject", "dtype"), [("llama", "float32"), ("gpt2", "bfloat16")])
def test_the_engines_hold_here(subject: str, dtype: str) -> None:
    """Each check on two kinds of families and in two dtypes, but not all of all, which is slow."""
    examination = examine.examine(["cpu"], checks=QUICK, families=(subject,), dtypes=(dtype,))
    assert {(each.check, each.subject, each.dtype) for each in examination.outcomes} == {
        (check, None if check == "statistics" else subject, dtype) for check in QUICK
    }
    for each in examination.outcomes:
        no_rotation = each.check == "rotation" and FAMILIES[str(each.subject)].no_rebase is not None
        assert each.verdict == ("not supported" if no_rotation else "passed"), each
        assert no_rotation or each.difference <= each.tolerance  # type: ignore[operator]  # both are numbers
    assert json.decode(json.encode(examination), type=Examination) == examination


def test_a_dtype_that_there_is_no_room_for_is_not_called_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(examine.F, "linear", full)
    assert examine.unsupported("cpu", torch.bfloat16) is None
    monkeypatch.setattr(examine.F, "linear", lambda *given: _no_kernel())
    assert examine.unsupported("cpu", torch.bfloat16) == "no kernel"


def _no_kernel() -> Any:
    raise NotImplementedError("no kernel")


@pytest.mark.slow
def test_all_holds_here() -> None:
    examination = examine.examine(["cpu"], families=TINY)
    assert examination.failed == []
    assert {each.dtype for each in examination.outcomes if each.verdict == "passed"} == set(TOLERANCES)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_all_holds_on_cuda() -> None:
    assert examine.examine(["cuda"]).failed == []


# --- what is wrong is found ---


def test_a_wrong_row_of_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused projection is said to have one head after another, so that other rows are kept."""
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], qkv_layout="per_head"))
    (failed,) = failures("edits", "gpt2")
    assert "KeepHeads" in str(failed.what)
    assert failed.difference > 100 * failed.tolerance  # type: ignore[operator]  # both are numbers


def test_a_method_that_does_not_do_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*args: Any, **options: Any) -> Iterator[Edit]:
        yield DropBlock(1)
        yield DropBlock(1)  # which is gone

    monkeypatch.setattr(registry, "_METHODS", {"window": replace(get_method("window"), prune=careless)})
    (failed,) = failures("pruning")
    assert (failed.subject, failed.expected) == ("window", "no error")
    assert str(failed.got).startswith("InvalidEditError: ")


def test_a_statistic_that_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    precise = SecondMoment.add

    def in_tf32(self: SecondMoment, x: Tensor, weights: Tensor) -> None:
        if self.dtype == torch.float32:
            x = (x.view(torch.int32) & -(2**13)).view(torch.float32)  # ten bits of mantissa
        precise(self, x, weights)

    monkeypatch.setattr(SecondMoment, "add", in_tf32)
    assert [each.what for each in failures("statistics")] == ["second moments"]


@pytest.mark.parametrize("broken", ["walk", "sweep"])
def test_an_engine_that_is_off(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "sweep":
        monkeypatch.setattr(checks, "sweep", lambda *args: torch.full((5,), 4.5, dtype=torch.float64))
    else:
        monkeypatch.setattr(checks, "_keep", lambda states, x, weights: states.append(x.roll(1, dims=1)))
    for dtype in TOLERANCES:
        (failed,) = failures(broken, dtype=dtype)
        assert failed.difference > failed.tolerance  # type: ignore[operator]  # both are numbers


def test_a_streamed_block_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Stored.read
    monkeypatch.setattr(Stored, "read", lambda self, **how: read(self, **how) * 1.01)
    (failed,) = failures("streamed")
    assert failed.what == "mean losses of two variants"


@pytest.mark.parametrize(
    ("got", "apart"),
    [
        (torch.tensor([1.0, 4.0]), 0.0), (torch.tensor([1.0, 3.0]), 0.25), (torch.tensor([1.0, math.nan]), math.nan),
        (torch.ones(3), math.inf),
    ],
)  # fmt: skip
def test_how_far_tensors_are_apart(got: Tensor, apart: float) -> None:
    pair = Pair("a pair", torch.tensor([1.0, 4.0]), got)
    assert examine.difference(pair) == pytest.approx(apart, nan_ok=True)
    assert examine.difference(Pair("a pair", "one", "other")) == math.inf


def test_a_dtype_that_the_device_lacks_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = examine.F.layer_norm

    def without_half(x: Tensor, *args: Any) -> Tensor:
        if x.dtype == torch.float16:
            raise RuntimeError("\"LayerNormKernelImpl\" not implemented for 'Half'")
        return norm(x, *args)

    monkeypatch.setattr(examine.F, "layer_norm", without_half)
    told = call("doctor", "--checks", "walk", "--families", "llama", "--dtypes", "float16,float32")
    assert told.code == 0
    assert "not implemented for 'Half'" in told.out
    outcomes = examine.examine(["cpu"], checks=("walk",), families=("llama",)).outcomes
    assert [each.verdict for each in outcomes] == ["passed", "passed", "not supported"]


# --- the command ---


def test_the_command_says_what_failed_and_ends_with_4(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["doctor", "--device", "cpu", "--dtypes", "float32", "--families", "gpt2", "--checks", "edits,walk"]
    assert call(*words).code == 0
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], qkv_layout="per_head"))
    told, as_json = call(*words), call(*words, "--json")
    assert told.code == as_json.code == 4
    read = json.decode(as_json.out, type=Examination)
    (failed,) = read.failed
    assert (failed.check, failed.subject, failed.device, failed.dtype) == ("edits", "gpt2", "cpu", "float32")
    assert read.installed.packages["torch"] == torch.__version__
    for said in (failed.what, failed.expected, failed.got, failed.device, failed.dtype):
        assert str(said) in told.out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--device", "nonsense"), InvalidOptionError), (("--device", "auto"), InvalidOptionError),
        (("--dtypes", "float8"), UnknownNameError), (("--families", "lama"), UnknownNameError),
        (("--checks", "pulse"), UnknownNameError),
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused(words: tuple[str, str], error: type[Exception]) -> None:
    told = call("doctor", *words)
    assert (told.code, told.out) == (3, "")
    assert words[1] in told.err
    asked = {"device": "devices"}.get(words[0][2:], words[0][2:])
    with pytest.raises(error, match=words[1]):
        examine.examine(**{asked: (words[1],)})


def test_every_family_of_ours_can_be_tried() -> None:
    assert set(TINY) == IN_TABLE


def test_what_the_help_repeats_is_so() -> None:
    told = (command.DTYPES, command.FAMILIES, command.CHECKS)
    assert tuple(tuple(each.split(",")) for each in told) == (tuple(TOLERANCES), FAMILIES_TRIED, tuple(CHECKS))


# --- what is installed ---


def test_what_an_extra_lacks_comes_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pruner-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pruner\nVersion: 1.0\n"
        "Provides-Extra: there\nProvides-Extra: old\nProvides-Extra: gone\nProvides-Extra: dev\n"
        'Requires-Dist: torch>=2\nRequires-Dist: pytest>=1; extra == "there"\n'
        'Requires-Dist: pytest>=999; extra == "old"\n'
        'Requires-Dist: pytest>=1; extra == "gone"\nRequires-Dist: no-such-package>=3; extra == "gone"\n'
        'Requires-Dist: other-package; python_version < "3" and extra == "gone"\n'
        'Requires-Dist: pruner[gone]; extra == "there"\nRequires-Dist: nothing; extra == "dev"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {each.name: (each.missing, each.command) for each in extras("pruner")} == {
        "gone": (["no-such-package>=3"], "pip install 'pruner[gone]'"),
        "old": (["pytest>=999"], "pip install 'pruner[old]'"),
        "there": ([], None),
    }
    assert extras("no-such-package") == []
    assert installed.installed().packages["torch"] == torch.__version__
