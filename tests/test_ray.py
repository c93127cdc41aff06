"""Work spread over Ray's workers: to the bit what one process gives, also when workers are killed; refused early.

What starts Ray is slow; the unit suite has the same tests of sweeps with actors in this process (`InProcess`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from models import random, tiny, tiny_tokens
from oracles import job_of, write_texts
from studies import SEARCH, Loads, comparison, grid

from secateur import Goal, Request, Source, prune_to
from secateur.engine.loss import KLDivergence
from secateur.engine.sweep import DENSE, Part, final_states, sample_sweep
from secateur.errors import InvalidOptionError, MissingExtraError, WorkersError
from secateur.grid import Comparison, Grid, compare
from secateur.grid.pace import Standing
from secateur.hf import quiet_transformers
from secateur.model.load import load
from secateur.pruning import Pruned, run_job
from secateur.report.results import CellResult, dumps
from secateur.run import Run
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropBlock, KeepNeurons
from secateur.workers.session import Workers, require_workers, session
from secateur.workers.sweeps import SpreadSweeps, split

TWO = Workers(count=2, cpus=1)
SEARCHES: dict[str, dict[str, Any]] = {
    "evopress": {"generations": 4, "offspring": 6, "initial": 6, "initial_tokens": 24, "selection_tokens": "24,72"},
    "blockpruner": {"search_samples": 3, "criterion": "kl"},
    "2ssp": {},
    "secateur": {"allocation": "searched", "search_samples": 3, "search_rounds": 2},
}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One session for all tests, with room for more than one pair of workers: an idle pair keeps its room."""
    with session(Workers(count=6, cpus=1)):
        import ray

        yield ray


@dataclass(eq=False)
class Ref:
    value: Any


class InProcess:
    """Stands for Ray: an actor is an object here, a call is made at once, and what was called last comes first."""

    util = SimpleNamespace(register_serializer=lambda *args, **how: None)
    exceptions = SimpleNamespace(RayError=OSError, GetTimeoutError=TimeoutError)

    def __init__(self, cpus: int = 6) -> None:
        self.cpus = cpus

    def is_initialized(self) -> bool:
        return False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}, {"Alive": False, "Resources": {"CPU": 99}}]

    def put(self, value: Any) -> Ref:
        return Ref(value)

    def get(self, given: Any, timeout: float | None = None) -> Any:
        return [each.value for each in given] if isinstance(given, list) else given.value

    def wait(self, given: list[Ref], num_returns: int) -> tuple[list[Ref], list[Ref]]:
        return given[-num_returns:], given[:-num_returns]

    def remote(self, what: Any) -> Any:
        def begun(*given: Any) -> Any:
            made = what(*[each.value if isinstance(each, Ref) else each for each in given])
            return Actor(made) if isinstance(what, type) else Ref(made)

        started = SimpleNamespace(remote=begun)
        started.options = lambda **options: started
        return started


@dataclass(frozen=True)
class Actor:
    held: Any

    def __getattr__(self, name: str) -> Any:
        return InProcess().remote(getattr(self.held, name))


@pytest.fixture(params=["here", pytest.param("ray", marks=pytest.mark.slow)])
def any_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray with room for six workers, and what stands for it."""
    if request.param == "ray":
        yield request.getfixturevalue("ray")
        return
    monkeypatch.setitem(sys.modules, "ray", here := InProcess())
    yield here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with quiet_transformers():
        tiny("llama").hf.save_pretrained(folder)
    return folder


def spread(folder: Path) -> SpreadSweeps:
    source = Source(name=str(folder), device="cpu")
    return SpreadSweeps(TWO, source, "cpu", source.load().fingerprint())


@pytest.fixture(scope="module")
def sweeps(ray: Any, folder: Path) -> SpreadSweeps:
    """Two actors for all tests: each of their runs begins with the model as it was loaded."""
    return spread(folder)


@pytest.fixture
def any_sweeps(any_ray: Any, folder: Path, request: pytest.FixtureRequest) -> SpreadSweeps:
    return spread(folder) if isinstance(any_ray, InProcess) else request.getfixturevalue("sweeps")


def pruned(folder: Path, method: str, **how: Any) -> Pruned:
    """Args: how: of `Run`."""
    model = Source(name=str(folder), device="cpu").load()
    request = Request(
        method=method, sparsity=0.4, options=SEARCHES[method], calibration=tiny_tokens(model, 5, 24), seed=3
    )
    return run_job(job_of(request, model), run=Run(3, **how))


def require_same(one: Pruned, other: Pruned) -> None:
    assert one.record.edits == other.record.edits  # tensors by their sha256
    assert one.record.edits
    state, wanted = one.model.hf.state_dict(), other.model.hf.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
    assert one.record.notes == other.record.notes
    assert one.record.cost.forwards_asked == other.record.cost.forwards_asked


@pytest.mark.parametrize("method", ["evopress", "2ssp", *(pytest.param(m, marks=pytest.mark.slow) for m in
                                                         ("blockpruner", "secateur"))])  # fmt: skip
def test_a_search_over_actors_is_that_of_one_process(any_sweeps: SpreadSweeps, folder: Path, method: str) -> None:
    require_same(pruned(folder, method, sweeper=any_sweeps), pruned(folder, method))


class Killing:
    """An observer that kills an actor's process in the middle of some sweeps, after the first of their shares."""

    def __init__(self, sweeps: SpreadSweeps, at: tuple[int, ...]) -> None:
        self.sweeps, self.at, self.count, self.killed = sweeps, at, 0, list[int]()

    @contextlib.contextmanager
    def progress(self, label: str, total: float, done: float = 0.0) -> Iterator[Callable[[float], None]]:
        told = 0

        def advance(amount: float) -> None:
            nonlocal told
            told += 1
            if told == 1:
                self.count += 1
                if self.count in self.at:
                    actor = self.sweeps.actors[len(self.killed) % 2]
                    self.killed.append(ray_get(actor.__ray_call__.remote(lambda holder: os.getpid())))
                    os.kill(self.killed[-1], signal.SIGKILL)

        yield advance


def ray_get(reference: Any) -> Any:
    import ray

    return ray.get(reference)


@pytest.mark.slow
def test_killed_actors_follow_the_edits_again(sweeps: SpreadSweeps, folder: Path) -> None:
    observer = Killing(sweeps, (1, 3))
    require_same(pruned(folder, "blockpruner", sweeper=sweeps, observer=observer), pruned(folder, "blockpruner"))
    assert len(set(observer.killed)) == 2


def test_actors_follow_edits_with_weights_and_forget_another_run_s(any_sweeps: SpreadSweeps, folder: Path) -> None:
    for first in (0, 2):
        model, run = any_sweeps.source.load(), Run(sweeper=any_sweeps)
        tokens, width = tiny_tokens(model, 3, 24), 20
        weight = random(model.hidden_size, width, seed=first)
        versions = {Part(1, "mlp", 7): KeepNeurons(1, tuple(range(7)), random(model.hidden_size, 7, seed=9))}
        for edit in (KeepNeurons(first, tuple(range(width)), weight), DropBlock(3)):
            apply(model, edit)
            run.applied(edit)
        variants = [DENSE, frozenset({Part(1, "mlp", 7)}), frozenset({Part(1, "mlp", 7), Part(2, "attention")})]
        sweeper = any_sweeps(model, run, versions)
        metric = KLDivergence(sweeper.final_states(tokens))
        assert torch.equal(metric.reference, final_states(model, tokens))
        wanted = sample_sweep(model, tokens, variants, metric, versions=versions)
        assert torch.equal(sweeper.sums(tokens, variants, metric, "sweep"), wanted)


@pytest.mark.slow
def test_actors_may_stream_the_model(ray: Any, folder: Path) -> None:
    source = Source(name=str(folder), device="cpu", stream=True)
    streamed = SpreadSweeps(TWO, source, "cpu", source.load().fingerprint())
    require_same(pruned(folder, "blockpruner", sweeper=streamed), pruned(folder, "blockpruner"))


@pytest.mark.slow
def test_an_actor_with_another_model_is_refused(ray: Any, sweeps: SpreadSweeps, folder: Path) -> None:
    other = SpreadSweeps(Workers(count=1, cpus=1), sweeps.source, "cpu", "of another model")
    with pytest.raises(WorkersError, match="other weights"):
        pruned(folder, "evopress", sweeper=other)


@pytest.mark.slow
def test_a_pruning_for_a_goal_writes_the_same_weights(ray: Any, folder: Path, tmp_path: Path) -> None:
    """Several prunings, each of a model loaded afresh."""
    source = Source(name=str(folder), device="cpu")
    for out, workers in (("one", None), ("two", TWO)):
        request = Request(
            method="blockpruner", goal=Goal(target_bytes=90_000), calibration=tiny_tokens(tiny("llama"), 2, 24)
        )
        prune_to(request, source, tmp_path / out, workers=workers)
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


# --- cells of a grid ---


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))[0]


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer."""
    folder, model = tmp_path_factory.mktemp("model") / "tiny", Loads()()
    with quiet_transformers():
        model.hf.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
    return folder


def spread_grid(out: Path, readable: Path, text: Path, **more: Any) -> Grid:
    return grid(out, text, load=partial(load, str(readable), device="cpu"), **more)


def asked(text: Path) -> Comparison:
    """Two sizes of 2SSP and a match of each ShortGPT share steps; one of ShortGPT's cells fails."""
    return comparison(
        text, "2ssp", "shortgpt", "evopress", matched=True, sparsities=(0.25, 0.9), options={"evopress": SEARCH}
    )


def untimed(cell: CellResult) -> dict[str, Any]:
    """What a cell says but for when and how fast."""
    said = json.loads(dumps(cell))
    for name in ("created", "seconds", "machine"):
        said.pop(name, None)
    for part, names in (("prune", ("wall_s", "cpu_s")),):
        for name in names if said.get(part) else ():
            said[part].pop(name)
    return said


class Hearing:
    """Hears of the standings; kills a worker's process when it is first told of a cell's part."""

    def __init__(self, kill: tuple[str, str] | None = None) -> None:
        self.kill, self.killed, self.seen = kill, list[int](), list[Standing]()

    def __call__(self, standing: Standing) -> None:
        self.seen.append(standing)
        doing = [(standing.cell, standing.part), *(each[:2] for each in standing.beside)]
        if self.kill in doing and not self.killed:
            ours = psutil.Process().children(recursive=True)
            self.killed = [each.pid for each in ours if each.name() == "ray::make"]
            for pid in self.killed:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, readable: Path, text: Path) -> dict[str, CellResult]:
    """The cells as one process makes them."""
    return compare(asked(text), spread_grid(tmp_path_factory.mktemp("alone") / "out", readable, text))


@pytest.mark.slow
@pytest.mark.parametrize("kill", [None, ("evopress-0.25", "prune")], ids=["whole", "killed"])
def test_cells_by_workers_are_those_of_one_process(
    ray: Any, alone: dict[str, CellResult], readable: Path, text: Path, tmp_path: Path, kill: tuple[str, str] | None
) -> None:
    hearing, told = Hearing(kill), list[str]()
    cells = compare(
        asked(text),
        spread_grid(
            tmp_path / "out", readable, text, workers=TWO, on_standing=hearing,
            on_cell=lambda cell: told.append(cell.name),
        ),
    )  # fmt: skip
    assert {cell.status for cell in alone.values()} == {"done", "failed"}
    said, expected = ({name: untimed(cell) for name, cell in each.items()} for each in (cells, alone))
    if kill is not None:  # a killed search computes its dense states, which are no step, once more
        for each in (said, expected):
            forwards = each[kill[0]]["prune"]
            assert forwards.pop("forwards") > 0
            assert forwards.pop("forwards_asked") > 0
    assert said == expected
    assert sorted(told) == sorted(cells)
    assert bool(hearing.killed) == (kill is not None)
    assert hearing.seen[-1].finished == len(cells)
    assert any(standing.beside for standing in hearing.seen)
    assert (tmp_path / "out" / "main-table.md").is_file()
    assert not list((tmp_path / "out").glob(".seen-*"))


@pytest.mark.slow
def test_a_cell_whose_workers_all_die_has_failed(ray: Any, readable: Path, text: Path, tmp_path: Path) -> None:
    hearing, once = Hearing(("evopress-0.25", "prune")), replace(TWO, retries=0)
    more = {"workers": once, "on_standing": hearing}
    search = comparison(text, "evopress", options={"evopress": {**SEARCH, "generations": 60}})  # long enough to be hit
    cells = compare(search, spread_grid(tmp_path / "out", readable, text, **more))
    assert "worker died 1 times" in str(cells["evopress-0.25"].error)
    again = compare(search, spread_grid(tmp_path / "out", readable, text))
    assert [cell.status for cell in again.values()] == ["done", "done"]


@pytest.mark.slow
def test_an_interrupt_ends_the_workers_and_the_same_command_goes_on(readable: Path, text: Path, tmp_path: Path) -> None:
    words = [
        "compare", readable, "--methods", "evopress", "--sparsities", "0.25", "--texts", text, "--calibration",
        text, "--samples", "2", "--length", "24", "--eval-length", "24", "--out", tmp_path / "out", "--workers", "2",
        "--no-matched",
    ]  # fmt: skip
    search = SEARCHES["evopress"] | {"generations": 60, "selection_tokens": "24,48"}  # long enough to be hit
    words += [word for name, value in search.items() for word in ("--option", f"evopress.{name}={value}")]
    # a shell that starts the tests in the background has them, and so the command, deaf to interrupts
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{hears}; from secateur.cli import main; main()", *map(str, words)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    process = psutil.Process(running.pid)
    wait_until(lambda: any(each.name() == "ray::make" for each in process.children(recursive=True)))
    workers = process.children(recursive=True)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted in " in told
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert (tmp_path / "out" / "cells" / "evopress-0.25" / "cell.json").is_file()


def wait_until(true: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


# --- which actor does what ---

VARIANTS = [
    DENSE,
    *(frozenset({Part(number, kind)}) for number in range(4) for kind in ("attention", "mlp")),
    frozenset({Part(0, "attention"), Part(3, "mlp")}), frozenset({Part(1, "mlp"), Part(1, "attention")}),
]  # fmt: skip


@pytest.mark.parametrize("samples", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_every_variant_of_every_sample_is_some_actor_s_once(samples: int, count: int) -> None:
    shares = list(split(VARIANTS, samples, count, range(4), 0.5))
    done = [(v, s) for share in shares for v in share.variants for s in share.samples]
    assert sorted(done) == [(v, s) for v in range(len(VARIANTS)) for s in range(samples)]
    assert len(shares) <= 2 * count


@pytest.mark.parametrize("head", [0.0, 3.0, 30.0])
def test_work_is_split_about_evenly_and_neighbours_stay_together(head: float) -> None:
    """Of a greedy round over 30 blocks, in block-forwards; a part's first variant is computed from the first block."""
    variants = [frozenset({Part(number, "attention")}) for number in range(30)]
    halves = [share.variants for share in split(variants, 1, 2, range(30), head)]
    assert [place for half in halves for place in half] == list(range(30))

    def work(some: range) -> float:
        return sum(head + 30 - max(0, place - 1) * (place != some.start) for place in some)

    assert max(map(work, halves)) < 1.1 * min(map(work, halves))
    assert sum(map(work, halves)) < 1.1 * work(range(30))


# --- refused ---


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Of a cluster that is not there."""
    monkeypatch.setitem(sys.modules, "ray", InProcess())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Workers(count=2, address=f"127.0.0.1:{free.getsockname()[1]}")


def test_what_cannot_be_reached_is_refused_at_once(nobody: Workers) -> None:
    with pytest.raises(WorkersError, match="no Ray cluster answers"), session(nobody):
        pass


def test_ray_is_asked_for_nothing_where_the_output_is_there(nobody: Workers, folder: Path, tmp_path: Path) -> None:
    request = Request(method="2ssp", sparsity=0.4, calibration=tiny_tokens(tiny("llama"), 2, 24))
    source = Source(name=str(folder), device="cpu")
    prune_to(request, source, tmp_path / "out")
    assert prune_to(request, source, tmp_path / "out", workers=nobody).was_there
    with pytest.raises(WorkersError, match="no Ray cluster answers"):
        prune_to(request, source, tmp_path / "other", workers=nobody)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("wrong", [{"count": 0}, {"cpus": 0}, {"gpus": 1.5}, {"gpus": -1}, {"address": "ray://h:1"},
                                   {"address": "host"}])  # fmt: skip
def test_workers_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError):
        Workers(**{"count": 2, **wrong})


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"secateur\[ray\]"), session(TWO):
        pass


def test_room_and_folder_are_looked_at_before_any_work(any_ray: Any, tmp_path: Path) -> None:
    require_workers(TWO, "cpu", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(WorkersError, match="room for 6 workers of 1 CPUs"):
        require_workers(Workers(count=7, cpus=1), "cpu")
    with pytest.raises(WorkersError, match="room for 0 workers"):
        require_workers(TWO, "cuda")


def test_a_model_in_memory_cannot_be_spread(tmp_path: Path) -> None:
    request = Request(method="blockpruner", sparsity=0.4)
    with pytest.raises(InvalidOptionError, match="by its name"):
        prune_to(request, tiny("llama"), tmp_path / "out", workers=TWO)
