"""Kills, damage, full disks, changed jobs: a run goes on to the result that it would have had, or is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from oracles import Impatient, write_model, write_texts
from torture import LEAST, PHASES

import secateur.pruning
import secateur.running
from secateur import Output, Request, Source, prune_to
from secateur.errors import CheckpointError, Interrupted, JournalError, OutputBusyError, OutputError
from secateur.heal.recover import RecoveryRequest, recover_to
from secateur.heal.settings import Settings
from secateur.journal import Journal, run_folder

TORTURE = Path(__file__).with_name("torture.py")


@pytest.mark.slow
def test_runs_that_are_killed_go_on_to_the_undisturbed_result(tmp_path: Path) -> None:
    command = [sys.executable, str(TORTURE), "--kills", "10", "--seed", "1", "--out", str(tmp_path / "torture.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "torture.json").read_text())
    assert facts["kills"] >= 10
    assert facts["between_entries"] >= LEAST
    assert all(facts["phases"][phase] for phase in PHASES)
    assert facts["identical"] == facts["kills"]
    assert facts["recomputed"] == 0
    assert sum(job["kept"] for job in facts["jobs"].values()) > facts["kills"]
    assert facts["watcher"]["broken"] == []
    assert facts["watcher"]["whole"] >= facts["kills"] / 2


# --- in one process ---


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "dense")
    write_texts(folder)
    return folder


def request_of(inputs: Path, method: str = "slicegpt", **more: Any) -> Request:
    return Request(**{
        "method": method, "sparsity": 0.5, "calibration": str(inputs / "plain.txt"), "samples": 4, "length": 16, **more
    })  # fmt: skip


def pruned(inputs: Path, out: Path, method: str = "slicegpt", observer: Any = None, **more: Any) -> dict[str, bytes]:
    stream, output = more.pop("stream", False), Output(out, **more.pop("output", {}))
    source = Source(name=str(inputs / "dense"), device="cpu", stream=stream)
    prune_to(request_of(inputs, method, **more), source, output, observer=observer)
    return weights(out)


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def begun(inputs: Path, out: Path, method: str, share: float = 0.7, **more: Any) -> Path:
    """Interrupted; its run folder."""
    with pytest.raises(Interrupted):
        pruned(inputs, out, method, Impatient(share), **more)
    return run_folder(out)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slicegpt", "slimgpt"])
def test_a_run_that_ends_right_behind_an_entry_goes_on_to_the_same_result(
    inputs: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the edit that the entry is for is made: a moment that few kills hit."""
    whole = pruned(inputs, tmp_path / "whole", method, output={"keep_run": True})
    count = (run_folder(tmp_path / "whole") / "journal.jsonl").read_bytes().count(b"\n")
    put, done = Journal.put, []

    def last(*given: Any) -> None:
        put(*given)
        done.append(given)
        if len(done) == ends:
            raise KeyboardInterrupt

    for ends in range(1, count + 1, 2 if method == "slimgpt" else 1):
        done.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "put", last)
            with pytest.raises(Interrupted):
                pruned(inputs, tmp_path / f"out{ends}", method)
        assert pruned(inputs, tmp_path / f"out{ends}", method) == whole, ends


def harm(folder: Path, generator: random.Random) -> str:
    """Cut a file of a run folder short, or flip a bit of it; says what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = generator.choice(files)
    content, place = bytearray(path.read_bytes()), generator.randrange(path.stat().st_size)
    if generator.random() < 0.5:
        path.write_bytes(content[:place])
        return f"{path.relative_to(folder)} cut at {place}"
    content[place] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return f"{path.relative_to(folder)} flipped at {place}"


def resumed_or_refused(folder: Path, generator: random.Random, again: Any, whole: dict[str, bytes]) -> int:
    """Damage a run folder at many places; gives how often a run went on from what was left of it."""
    kept, went_on = folder.with_name("kept"), 0
    shutil.copytree(folder, kept)
    for _ in range(16):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        done = harm(folder, generator)
        with suppress(JournalError, CheckpointError):
            assert again() == whole, done
            went_on += 1
        shutil.rmtree(folder.with_name("out"), ignore_errors=True)
    return went_on


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slicegpt", "slimgpt"])
def test_a_damaged_run_folder_gives_the_same_result_or_is_refused(inputs: Path, tmp_path: Path, method: str) -> None:
    whole = pruned(inputs, tmp_path / "whole", method)
    folder = begun(inputs, tmp_path / "out", method, output={"keep_states": 1})
    assert any((folder / "tensors").iterdir())
    went_on = resumed_or_refused(folder, random.Random(0), lambda: pruned(inputs, tmp_path / "out", method), whole)
    assert went_on >= 12  # refused where it is unreadable whose run it is


def test_edited_blocks_of_a_killed_streamed_run_are_not_trusted(inputs: Path, tmp_path: Path) -> None:
    whole = pruned(inputs, tmp_path / "whole", "slimgpt")
    folder = begun(inputs, tmp_path / "out", "slimgpt", stream=True)
    left = folder / "blocks" / "secateur-blocks-x"
    left.mkdir(parents=True)
    (left / "000000.safetensors").write_bytes(b"of a killed process")
    assert pruned(inputs, tmp_path / "out", "slimgpt", stream=True) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_a_damaged_recovery_gives_the_same_result_or_is_refused(inputs: Path, tmp_path: Path) -> None:
    settings = Settings(template="chat", max_length=64, global_batch=4, max_steps=6, warmup_steps=1, lr=5e-3)

    def recovered(observer: Any = None, out: str = "out") -> dict[str, bytes]:
        request = RecoveryRequest(data=str(inputs / "chat.jsonl"), settings=settings)
        recover_to(request, str(inputs / "dense"), tmp_path / out, observer=observer)
        return weights(tmp_path / out)

    whole = recovered(out="whole")
    with pytest.raises(Interrupted):
        recovered(Impatient(0.6))
    refused = 16 - resumed_or_refused(run_folder(tmp_path / "out"), random.Random(1), recovered, whole)
    assert refused > 4  # a checkpoint is large, and its sums tell


def as_root(*command: str) -> None:
    subprocess.run([*([] if os.geteuid() == 0 else ["sudo", "-n"]), *command], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    try:
        as_root("mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    try:
        yield
    finally:
        as_root("umount", str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slicegpt", "slimgpt"])
def test_a_disk_that_others_fill_meanwhile_ends_a_run_and_with_room_it_goes_on(
    inputs: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secateur.running, "require_space", lambda folder, needs: None)  # there was room by then
    whole = pruned(inputs, tmp_path / "whole", method)
    page, disk = 4096, tmp_path / "disk"
    needed = sum(map(len, whole.values()))
    middle = 0
    for pages in range(8, 8 + needed // page * 4, needed // page // 3 + 1):
        with small_disk(disk, pages * page):
            try:
                result = pruned(inputs, disk / "out", method)
            except OutputError:
                assert not (disk / "out").exists()
                standing = Journal(run_folder(disk / "out"), repair=False).entries
                middle += bool(standing)
                as_root("mount", "-o", "remount,size=64m", str(disk))
                result = pruned(inputs, disk / "out", method)
            assert result == whole
            assert [path.name for path in disk.iterdir()] == ["out"]
    assert middle


@pytest.fixture(scope="module")
def interrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `out`, to be copied."""
    return begun(inputs, tmp_path_factory.mktemp("begun") / "out", "slimgpt")


@pytest.mark.parametrize("what", ["sparsity", "option", "seed", "calibration", "model", "version"])
def test_a_changed_job_is_refused(
    inputs: Path, interrupted: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(interrupted, run_folder(tmp_path / "out"))
    changed: dict[str, Any] = {
        "sparsity": {"sparsity": 0.4}, "option": {"options": {"damping": 0.02}}, "seed": {"seed": 3},
        "calibration": {"samples": 3},
    }.get(what, {})  # fmt: skip
    if what == "model":
        inputs = tmp_path / "inputs"
        write_model(inputs / "dense", seed=1)
        write_texts(inputs)
    if what == "version":
        monkeypatch.setattr(secateur.pruning, "__version__", "0.0.1")
    named = {"sparsity": "size sparsity", "option": "options damping", "version": "secateur"}.get(what, what)
    with pytest.raises(JournalError, match=rf"changed: .*{named} \("):
        pruned(inputs, tmp_path / "out", "slimgpt", **changed)
    assert pruned(inputs, tmp_path / "out", "slimgpt", output={"overwrite": True}, **changed)


class Meddling(Impatient):
    """Wants to write the same meanwhile, once."""

    def __init__(self, inputs: Path, out: Path) -> None:
        super().__init__(2.0)
        self.given, self.refused = (inputs, out), 0

    def progress(self, label: str, total: float, done: float = 0.0) -> Any:
        if not self.refused:
            self.refused = 1
            with pytest.raises(OutputBusyError):
                pruned(*self.given)
        return super().progress(label, total, done)


def test_a_second_run_is_refused_while_one_is_at_work(inputs: Path, tmp_path: Path) -> None:
    meddling = Meddling(inputs, tmp_path / "out")
    whole = pruned(inputs, tmp_path / "whole")
    assert pruned(inputs, tmp_path / "out", observer=meddling) == whole
    assert meddling.refused


def test_what_a_kill_left_of_a_finished_run_goes(inputs: Path, tmp_path: Path) -> None:
    """It came after the output was there, and before its run folder was gone, or in the middle of that."""
    out = tmp_path / "out"
    for left in (lambda path: True, lambda path: path.name in ("run.json", "lock"), lambda path: path.name == "lock"):
        pruned(inputs, out, output={"keep_run": True, "overwrite": True})
        for path in run_folder(out).iterdir():
            if not left(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = out.stat().st_ino
        pruned(inputs, out)
        assert out.stat().st_ino == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    another = begun(inputs, tmp_path / "out", "slimgpt", output={"overwrite": True})
    pruned(inputs, out)
    assert another.exists()  # which is not this job's


def test_a_folder_that_is_no_run_s_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    mine = run_folder(tmp_path / "out") / "blocks" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    for path in (mine, mine.parents[1] / "notes"):
        path.write_text("years of work")
    with pytest.raises(JournalError, match="something else"):
        pruned(inputs, tmp_path / "out")
    assert mine.read_text() == "years of work"
