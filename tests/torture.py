"""Kill runs at random moments, let the same call go on, and hold what comes out to the undisturbed run's.

    python tests/torture.py --kills 50 --seed 0 --out docs/results/torture/torture.json

Every run is a child, forked from this process, which has imported all that is heavy and computed nothing. The journal
(of a recovery: its checkpoints) says where a run stands; a moment to kill at is so many entries and a delay behind
them, drawn evenly over the time that the undisturbed run took between its first and its last entry, before the first
(reading), or after the last (writing). A process apart tries to load whatever looks like a finished folder throughout.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before any import

import argparse
import hashlib
import json
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from models import tiny_hf, tiny_tokenizer
from oracles import write_texts

import secateur
from secateur import Output, Request, Source, load, prune_to
from secateur.errors import OutputBusyError
from secateur.folders import write_file
from secateur.grid import Comparison, Grid, Judging, compare
from secateur.heal.recover import RecoveryRequest, recover_to
from secateur.heal.settings import Settings
from secateur.hf import quiet_transformers
from secateur.journal import run_folder
from secateur.record import read_record

PHASES = ("reading", "steps", "writing")
LEAST = 0.8  # share of the kills between the first entry and the last
_POLL = 0.001  # seconds
_LIMIT = 120  # of one run
WINDOWS: dict[str, Any] = {"samples": 24, "length": 64}
SEARCH = {"generations": 12, "offspring": 8, "initial": 8, "initial_tokens": 128, "selection_tokens": "128,256"}


# --- what is run ---


class Job(Protocol):
    """A call that writes OUT, and can be given again.

    Attributes:
        name: of the method, with what is special.
        shows: what looks like a finished folder, seen from the one that OUT lies in.
    """

    name: str
    shows: ClassVar[str]

    def work(self, inputs: Path, out: Path) -> None:
        """The call itself; in a child."""

    def entries(self, out: Path) -> int:
        """How many entries stand by now on the disk."""

    def outcome(self, out: Path) -> Any:
        """What two runs must have in common: JSON."""

    def resumed(self, out: Path) -> Resumed:
        """To be asked while nothing runs: tells later what a resumed run computed again."""


class Resumed(Protocol):
    kept: int  # entries that stood on the disk

    def recomputed(self) -> int:
        """How many of these have been computed again since."""


@dataclass(frozen=True)
class Pruning:
    shows: ClassVar[str] = "out"
    name: str
    method: str
    sparsity: float = 0.5
    options: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    keep_states: int = 0
    over: bool = False  # an older checkpoint lies there, which is to be overwritten

    def work(self, inputs: Path, out: Path) -> None:
        request = Request(
            method=self.method, sparsity=self.sparsity, options=self.options, calibration=str(inputs / "plain.txt"),
            **WINDOWS,
        )  # fmt: skip
        source = Source(name=str(inputs / "dense"), device="cpu", stream=self.stream)
        prune_to(request, source, Output(out, overwrite=self.over, keep_states=self.keep_states))

    def entries(self, out: Path) -> int:
        return _lines(out.with_name(f"{out.name}.run") / "journal.jsonl")

    def outcome(self, out: Path) -> Any:
        edits = read_record(out).edits
        return {"weights": _sums(out), "edits": json.loads(json.dumps(edits, default=asdict))}

    def resumed(self, out: Path) -> Journals:
        return Journals([run_folder(out) / "journal.jsonl"])


@dataclass(frozen=True)
class Comparing:
    shows: ClassVar[str] = "out/cells/[!.]*"
    name: str = "compare"

    def work(self, inputs: Path, out: Path) -> None:
        text = str(inputs / "plain.txt")
        comparison = Comparison(
            methods=("2ssp", "blockpruner"), sparsities=(0.3, 0.5), calibration=text, matched=False, samples=12,
            length=64,
        )  # fmt: skip
        judging = Judging(texts=(text,), length=64, samples=8)
        grid = Grid(load=Source(name=str(inputs / "dense"), device="cpu").load, folder=out, judging=judging)
        cells = compare(comparison, grid)
        failed = {name: cell.error for name, cell in cells.items() if not cell.done}
        assert not failed, failed

    def entries(self, out: Path) -> int:
        return sum(map(_lines, out.glob(".runs/*/journal.jsonl"))) + len(list(out.glob("cells/[!.]*/cell.json")))

    def outcome(self, out: Path) -> Any:
        cells = {path.parent.name: json.loads(path.read_text()) for path in out.glob("cells/[!.]*/cell.json")}
        assert not any(path.name.startswith(".") for path in out.rglob("*")), list(out.rglob(".*"))
        return {name: _without_times(cell) for name, cell in sorted(cells.items())}

    def resumed(self, out: Path) -> Journals:
        return Journals(list(out.glob(".runs/*/journal.jsonl")), list(out.glob("cells/[!.]*/cell.json")))


@dataclass(frozen=True)
class Recovery:
    shows: ClassVar[str] = "out"
    name: str = "recover"

    def work(self, inputs: Path, out: Path) -> None:
        settings = Settings(
            template="chat", max_length=64, global_batch=4, batch_size=4, max_steps=20, warmup_steps=1, lr=5e-3
        )
        request = RecoveryRequest(data=str(inputs / "chat.jsonl"), settings=settings)
        recover_to(request, Source(name=str(inputs / "dense"), device="cpu"), out)

    def entries(self, out: Path) -> int:
        return _newest(out.with_name(f"{out.name}.run"))

    def outcome(self, out: Path) -> Any:
        recovery = read_record(out).recovery
        assert recovery is not None
        return {"weights": _sums(out), "losses": json.loads(json.dumps(recovery.training_loss, default=asdict))}

    def resumed(self, out: Path) -> Checkpoints:
        return Checkpoints(out, _newest(run_folder(out)))


JOBS: tuple[Job, ...] = (
    Pruning("2ssp", "2ssp"),
    Pruning("2ssp, over an older folder", "2ssp", sparsity=0.4, over=True),
    Pruning("blockpruner", "blockpruner", sparsity=0.4),
    Pruning("evopress", "evopress", options=SEARCH),
    Pruning("slimgpt", "slimgpt"),
    Pruning("slimgpt, states kept", "slimgpt", keep_states=2),
    Pruning("slimgpt, streamed", "slimgpt", stream=True),
    Pruning("slicegpt", "slicegpt"),
    Pruning("secateur", "secateur"),
    Comparing(),
    Recovery(),
)


class Journals:
    """Journals are appended to in place: hard links to them show what became of them when their folders are gone. A
    grid's is replaced when a cell is done; that this cell is not made again, the cell shows."""

    def __init__(self, journals: Sequence[Path], cells: Sequence[Path] = ()) -> None:
        self._held = tempfile.TemporaryDirectory(prefix="links-", dir=_beside(journals, cells))
        self._cells = {path: path.read_bytes() for path in cells}
        self._had: dict[Path, bytes] = {}
        for number, path in enumerate(path for path in journals if path.exists()):
            link = Path(self._held.name) / str(number)
            link.hardlink_to(path)
            self._had[link] = b"".join(line for line in path.read_bytes().splitlines(True) if line.endswith(b"\n"))
        self.kept = len(self._cells) + sum(whole.count(b"\n") for whole in self._had.values())

    def recomputed(self) -> int:
        again = sum(path.read_bytes() != content for path, content in self._cells.items())
        for link, whole in self._had.items():
            now = link.read_bytes()
            assert now.startswith(whole), "what stood in a journal was written anew"
            keys = Counter(
                (step["job"], step["key"]) for step in (json.loads(line)["step"] for line in now.splitlines())
                if not step["key"].startswith("states/")
            )  # fmt: skip
            again += sum(count - 1 for count in keys.values())
        self._held.cleanup()
        return again


@dataclass(frozen=True)
class Checkpoints:
    out: Path
    kept: int

    def recomputed(self) -> int:
        recovery = read_record(self.out).recovery
        assert recovery is not None
        return max(0, self.kept - (recovery.resumed_at or 0))


def _beside(*paths: Sequence[Path]) -> Path | None:
    """A folder on the same disk as the first path that there is, out of the run's sight."""
    found = [path for several in paths for path in several]
    return next((parent for parent in found[0].parents if (parent / "life").exists()), None) if found else None


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _newest(run: Path) -> int:
    steps = [int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")]
    return max(steps, default=0)


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def _without_times(cell: dict[str, Any]) -> dict[str, Any]:
    prune = {name: value for name, value in (cell.get("prune") or {}).items() if name not in ("wall_s", "cpu_s")}
    return {name: value for name, value in cell.items() if name not in ("created", "seconds")} | {"prune": prune}


# --- children ---


def forked(work: Callable[[], None], log: Path) -> int:
    """The id of a child that does the work; 0 is its status if that went well, and the log has the rest."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def done(work: Callable[[], None], log: Path) -> None:
    """Do it in a child, to its end."""
    _, status = os.waitpid(forked(work, log), 0)
    assert status == 0, log.read_text()


def write_inputs(folder: Path) -> None:
    """A model of 8 blocks with its tokenizer, an older checkpoint, and texts."""
    with quiet_transformers():
        tiny_hf("llama", num_hidden_layers=8, hidden_size=64).save_pretrained(folder / "dense")
        tiny_tokenizer().save_pretrained(folder / "dense")
    write_texts(folder)
    request = Request(method="shortgpt", sparsity=0.25, calibration=str(folder / "plain.txt"), samples=2, length=16)
    prune_to(request, str(folder / "dense"), folder / "older")


@dataclass(frozen=True)
class Life:
    """A folder with one OUT and the runs that write it.

    Attributes:
        root: has also the inputs.
    """

    root: Path
    name: str
    job: Job

    @property
    def folder(self) -> Path:
        return self.root / self.name / "life"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def log(self) -> Path:
        return self.root / self.name / "log"

    def begin(self) -> None:
        """Make the folder, and have it watched."""
        self.folder.mkdir(parents=True)
        if isinstance(self.job, Pruning) and self.job.over:
            shutil.copytree(self.root / "inputs" / "older", self.out)
        write_file(self.root / "watched", f"{self.folder}\n{self.job.shows}")

    def start(self) -> int:
        return forked(lambda: self.job.work(self.root / "inputs", self.out), self.log)


class Moment(NamedTuple):
    """When so many entries have been on the disk for so many seconds."""

    entries: int
    delay: float


class Timeline(NamedTuple):
    """Seconds from the start of a run to each of its entries, and to its end."""

    entries: tuple[float, ...]
    end: float

    def draw(self, phase: str, generator: random.Random) -> Moment:
        began, last = self.entries[0], self.entries[-1]
        if phase == "reading":
            return Moment(0, generator.uniform(0, began))
        if phase == "writing":
            return Moment(len(self.entries), generator.uniform(0, self.end - last))
        at = generator.uniform(began, last)
        before = [time for time in self.entries if time <= at]
        return Moment(len(before), at - before[-1])


def timeline(life: Life) -> Timeline:
    """Of an undisturbed run, as it looks from outside."""
    child, began, times = life.start(), time.monotonic(), list[float]()
    while not os.waitpid(child, os.WNOHANG)[0]:
        now, standing = time.monotonic() - began, life.job.entries(life.out)
        times += [now] * (standing - len(times))
        time.sleep(_POLL)
    assert not life.folder.joinpath("out.run").exists()
    return Timeline(tuple(times), time.monotonic() - began)


def killed(life: Life, moment: Moment, entries: int) -> str | None:
    """Kill a run at a moment, and say in which phase it was; None if it had ended before.

    Args:
        entries: that the run has in the end.
    """
    child, since, began, most = life.start(), None, time.monotonic(), 0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, life.log.read_text()
            return None
        most, now = max(most, life.job.entries(life.out)), time.monotonic()
        assert now - began < _LIMIT, f"{life.name} does not end"
        if since is None and most >= moment.entries:
            since = now
        if since is not None and (most > moment.entries or now - since >= moment.delay):
            break
        time.sleep(_POLL)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return None
    most = max(most, life.job.entries(life.out))
    return "reading" if not most else "steps" if most < entries else "writing"


# --- the watcher ---


@contextmanager
def watched(root: Path) -> Iterator[Callable[[], tuple[int, list[str]]]]:
    """Another process looks for finished folders of the present life and loads them; gives how often it could, and
    what was wrong with any."""
    log, stop = root / "watcher.log", root / "stop"
    child = forked(lambda: _watch(root, stop), log)
    told: list[str] = []
    try:
        yield lambda: (sum(line == "whole" for line in told), [line for line in told if line != "whole"])
    finally:
        stop.touch()
        os.waitpid(child, 0)
        told += [line for line in log.read_text().splitlines() if line.startswith(("whole", "broken"))]


def _watch(root: Path, stop: Path) -> None:
    seen: set[tuple[str, int, int]] = set()
    while not stop.exists():
        with suppress(FileNotFoundError):
            life, shows = (root / "watched").read_text().splitlines()
            for folder in Path(life).glob(shows):
                state = folder.stat()
                if (mark := (str(folder), state.st_ino, state.st_mtime_ns)) not in seen:
                    seen.add(mark)
                    sys.stdout.write(f"{_looked_at(folder)}\n")
                    sys.stdout.flush()
        time.sleep(_POLL)


def _looked_at(folder: Path) -> str:
    """Whether a folder with a name to be read is whole: as it was found, one that was replaced meanwhile apart."""
    try:
        if folder.parent.name == "cells":
            assert json.loads((folder / "cell.json").read_text())["name"] == folder.name
        else:
            model = load(str(folder))  # all that SHA256SUMS lists
            assert model.parents, "it has no record"
            assert model.tokenizer is not None, "it has no tokenizer"
            assert (folder / "README.md").exists(), "it has no card"
    except Exception as error:
        return f"broken: {folder}: {type(error).__name__}: {error}"
    return "whole"


# --- the torture ---


@dataclass
class Tally:
    """What became of the kills of one job."""

    kills: int = 0
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    kept: int = 0  # entries on the disk at the kills
    identical: int = 0
    recomputed: int = 0


def torture(kills: int, seed: int, jobs: Sequence[Job] = JOBS, root: Path | None = None) -> dict[str, Any]:
    """Kill runs so often, resume each to its end; whatever is not as it should be raises, or stands in what is given.

    Returns:
        Facts as JSON.
    """
    with tempfile.TemporaryDirectory(prefix="torture-", dir=root) as place:
        folder, generator, began = Path(place), random.Random(seed), time.monotonic()
        (folder / "inputs").mkdir()
        done(lambda: write_inputs(folder / "inputs"), folder / "log")
        with watched(folder) as looked:
            tallies = _torture(folder, kills, jobs, generator)
            second_refused(folder, next(job for job in jobs if job.name == "evopress"))
        whole, broken = looked()
    phases = {phase: sum(tally.phases[phase] for tally in tallies.values()) for phase in PHASES}
    total = sum(phases.values())
    return {
        "command": f"python tests/torture.py --kills {kills} --seed {seed}",
        "secateur": secateur.__version__, "torch": torch.__version__, "machine": platform.machine(),
        "kills": total, "phases": phases, "between_entries": phases["steps"] / total,
        "identical": sum(tally.identical for tally in tallies.values()),
        "recomputed": sum(tally.recomputed for tally in tallies.values()),
        "watcher": {"whole": whole, "broken": broken}, "seconds": round(time.monotonic() - began, 1),
        "jobs": {name: asdict(tally) for name, tally in tallies.items()},
    }  # fmt: skip


def _torture(folder: Path, kills: int, jobs: Sequence[Job], generator: random.Random) -> dict[str, Tally]:
    tallies, known = {job.name: Tally() for job in jobs}, dict[str, tuple[Timeline, Any]]()
    phases = dict.fromkeys(PHASES, 0)
    lives = 0
    while sum(phases.values()) < kills or phases["steps"] < LEAST * sum(phases.values()) or not all(phases.values()):
        assert lives < 4 * kills + 20, f"too few kills hit what they were to hit: {phases}"
        total = sum(phases.values())
        phase = "steps"
        if phases["steps"] >= LEAST * (total + 1):
            phase = min(("reading", "writing"), key=lambda each: phases[each])
        job = min(generator.sample(list(jobs), len(jobs)), key=lambda each: tallies[each.name].phases[phase])
        if job.name not in known:
            life = Life(folder, f"{job.name} undisturbed", job)
            life.begin()
            taken = timeline(life)
            assert life.out.exists(), life.log.read_text()
            known[job.name] = taken, job.outcome(life.out)
        life = Life(folder, f"{lives}", job)
        lives += 1
        life.begin()
        for hit in _killed_and_resumed(life, phase, *known[job.name], generator, tallies[job.name]):
            phases[hit] += 1
    return tallies


def _killed_and_resumed(
    life: Life, phase: str, taken: Timeline, wanted: Any, generator: random.Random, tally: Tally
) -> list[str]:
    """Kill a run, and now and then the one that goes on from it; then let it end. Gives the phases that were hit."""
    hits, stood = list[str](), list[Resumed]()
    for _ in range(generator.choice((1, 1, 2))):
        moment = taken.draw(phase, generator)
        if stood:  # it goes on from there at once
            moment = Moment(max(moment.entries, min(stood[-1].kept, len(taken.entries) - 1)), moment.delay)
        if (hit := killed(life, moment, len(taken.entries))) is None:
            break
        hits.append(hit)
        stood.append(life.job.resumed(life.out))
    if not hits:
        return []
    _, status = os.waitpid(life.start(), 0)
    assert status == 0, life.log.read_text()
    assert [path.name for path in life.folder.iterdir()] == ["out"], list(life.folder.iterdir())
    same = life.job.outcome(life.out) == wanted
    for hit, resumed in zip(hits, stood, strict=True):
        tally.kills += 1
        tally.phases[hit] += 1
        tally.kept += resumed.kept
        tally.recomputed += resumed.recomputed()
        tally.identical += same
    return hits


def second_refused(folder: Path, job: Job) -> None:
    """While a run is at its third entry, another process wants to write the same: it is refused, the first one ends."""
    life = Life(folder, "two at once", job)
    life.begin()
    first = life.start()
    while job.entries(life.out) < 3:
        time.sleep(_POLL)

    def second() -> None:
        try:
            job.work(folder / "inputs", life.out)
        except OutputBusyError:
            return
        raise AssertionError("a second process was let in")

    done(second, life.log)
    assert os.waitpid(first, 0)[1] == 0, life.log.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    facts = torture(given.kills, given.seed)
    text = json.dumps(facts, indent=1)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    sys.exit(facts["identical"] < facts["kills"] or facts["recomputed"] > 0 or bool(facts["watcher"]["broken"]))


if __name__ == "__main__":
    main()
