"""Work spread over Ray's workers: to the bit what one process gives, also when workers are killed; refused early."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random, tiny, tiny_tokens

from secateur import Goal, Request, Source, prune_to
from secateur.engine.loss import KLDivergence
from secateur.engine.sweep import DENSE, Part, final_states, sample_sweep
from secateur.errors import InvalidOptionError, MissingExtraError, WorkersError
from secateur.hf import quiet_transformers
from secateur.pruning import Pruned, plan, prepare, run_job
from secateur.run import Run
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropBlock, KeepNeurons
from secateur.workers import Workers, session
from secateur.workers.session import require_workers
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with quiet_transformers():
        tiny("llama").hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sweeps(ray: Any, folder: Path) -> SpreadSweeps:
    """Two actors for all tests: each of their runs begins with the model as it was loaded."""
    source = Source(name=str(folder), device="cpu")
    return SpreadSweeps(TWO, source, "cpu", source.load().fingerprint())


def pruned(folder: Path, method: str, **how: Any) -> Pruned:
    """Args: how: of `Run`."""
    model = Source(name=str(folder), device="cpu").load()
    request = Request(
        method=method, sparsity=0.4, options=SEARCHES[method], calibration=tiny_tokens(model, 5, 24), seed=3
    )
    return run_job(prepare(plan(request, model), model), run=Run(3, **how))


def require_same(one: Pruned, other: Pruned) -> None:
    assert one.record.edits == other.record.edits  # tensors by their sha256
    assert one.record.edits
    state, wanted = one.model.hf.state_dict(), other.model.hf.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
    assert one.record.notes == other.record.notes
    assert one.record.cost.forwards_asked == other.record.cost.forwards_asked


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_over_actors_is_that_of_one_process(sweeps: SpreadSweeps, folder: Path, method: str) -> None:
    require_same(pruned(folder, method, sweeper=sweeps), pruned(folder, method))


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


def test_actors_follow_edits_with_weights_and_forget_another_run_s(sweeps: SpreadSweeps, folder: Path) -> None:
    for first in (0, 2):
        model, run = sweeps.source.load(), Run(sweeper=sweeps)
        tokens, width = tiny_tokens(model, 3, 24), 20
        weight = random(model.hidden_size, width, seed=first)
        versions = {Part(1, "mlp", 7): KeepNeurons(1, tuple(range(7)), random(model.hidden_size, 7, seed=9))}
        for edit in (KeepNeurons(first, tuple(range(width)), weight), DropBlock(3)):
            apply(model, edit)
            run.applied(edit)
        variants = [DENSE, frozenset({Part(1, "mlp", 7)}), frozenset({Part(1, "mlp", 7), Part(2, "attention")})]
        sweeper = sweeps(model, run, versions)
        metric = KLDivergence(sweeper.final_states(tokens))
        assert torch.equal(metric.reference, final_states(model, tokens))
        wanted = sample_sweep(model, tokens, variants, metric, versions=versions)
        assert torch.equal(sweeper.sums(tokens, variants, metric, "sweep"), wanted)


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


def test_work_is_split_about_evenly_and_neighbours_stay_together() -> None:
    """Of a greedy round over 30 blocks, in block-forwards."""
    variants = [frozenset({Part(number, "attention")}) for number in range(30)]
    halves = [[variants[place] for place in share.variants] for share in split(variants, 1, 2, range(30), 0.0)]
    work = [sum(30 - max(0, min(p.block for p in v) - 1) * (v != half[0]) for v in half) for half in halves]
    assert [variant for half in halves for variant in half] == variants
    assert max(work) < 1.1 * min(work)
    assert max(work) < 0.6 * sum(30 - number for number in range(30))


# --- refused ---


def test_what_cannot_be_reached_is_refused_at_once(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(WorkersError, match="no Ray cluster answers"), session(Workers(count=2, address=nobody)):
        pass


@pytest.mark.parametrize("wrong", [{"count": 0}, {"cpus": 0}, {"gpus": 1.5}, {"gpus": -1}, {"address": "ray://h:1"},
                                   {"address": "host"}])  # fmt: skip
def test_workers_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError):
        Workers(**{"count": 2, **wrong})


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"secateur\[ray\]"), session(TWO):
        pass


def test_room_and_folder_are_looked_at_before_any_work(ray: Any, tmp_path: Path) -> None:
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
