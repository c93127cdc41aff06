"""A run on disk: what it keeps, what of it counts, whose it is, and that an interrupted pruning goes on from it."""

from __future__ import annotations

import errno
import json
import math
import shutil
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from models import tiny, tiny_tokens
from oracles import Impatient, write_model
from torch import Tensor

import secateur.disk_room
import secateur.folders
import secateur.journal
import secateur.planning
import secateur.running
from secateur import Output, load, prune_to
from secateur.engine import stream as engine_stream
from secateur.engine import sweep as engine_sweep
from secateur.engine.spill import MappedRoom, room_for
from secateur.errors import Interrupted, JournalError, OutputBusyError, OutputError
from secateur.goals import Goal
from secateur.journal import Journal, Journaled, claimed_run, forget, run_folder, taken_bytes
from secateur.judge.judging import Judging
from secateur.methods import methods
from secateur.model.load import Source
from secateur.model.shelf import Shelf
from secateur.planning import Plan, Request
from secateur.sharing import SharingRun

JOB = {"model": "abc", "method": "2ssp", "size": {"sparsity": 0.5}}
RESULTS: dict[str, Any] = {
    "numbers": [1, -0.1, 1e300, True, None, "é\n", math.inf],
    "tensors": {"w": torch.arange(6.0).reshape(2, 3).T, "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)},
    "a dict like a tensor's name": {"tensor": "0", "device": "cpu", "dict": {"dict": []}},
    "nothing": [[], {}, torch.zeros(0, 3), torch.tensor(7)],
}


def equal(one: Any, two: Any) -> bool:
    match one:
        case Tensor():
            return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
        case list():
            return len(one) == len(two) and all(map(equal, one, two))
        case dict():
            return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return type(one) is type(two) and bool(one == two)


def store_of(folder: Path, job: str = "job", beginning: str | None = None) -> Journaled:
    store = Journaled(Journal(folder), beginning)
    store.open(job)
    return store


def filled(folder: Path) -> Path:
    run = SharingRun(0, store_of(folder))
    for key, value in RESULTS.items():
        assert equal(run.step(key, lambda value=value: value), value)  # type: ignore[misc]  # bound now
    return folder / "journal.jsonl"


def recalled(folder: Path) -> list[str]:
    """The keys that a run need not compute again, all of which are as they were put."""
    store, keys = store_of(folder), []
    for key, value in RESULTS.items():
        try:
            assert equal(store.get(key), value)
        except KeyError:
            continue
        keys.append(key)
    return keys


def test_results_come_back_to_the_bit_with_what_they_took(tmp_path: Path) -> None:
    filled(tmp_path)
    assert recalled(tmp_path) == list(RESULTS)
    assert set(store_of(tmp_path).spent) == set(RESULTS)
    other = store_of(tmp_path, "another job", beginning="n")
    assert equal(other.get("numbers"), RESULTS["numbers"])  # holds for all jobs
    with pytest.raises(KeyError):
        other.get("tensors")


def test_whatever_is_torn_or_flipped_is_computed_again_with_all_that_came_after(tmp_path: Path) -> None:
    whole = filled(tmp_path).read_bytes()
    lines = whole.splitlines(keepends=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        place = int(torch.randint(len(whole), (), generator=generator))
        before = next(n for n in range(len(lines)) if place < sum(map(len, lines[: n + 1])))
        torn, flipped = whole[:place], bytearray(whole)
        flipped[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        for content in (torn, bytes(flipped)):
            (tmp_path / "journal.jsonl").write_bytes(content)
            assert recalled(tmp_path) == list(RESULTS)[:before]
            assert (tmp_path / "journal.jsonl").read_bytes() == b"".join(lines[:before])
    filled(tmp_path)
    assert (tmp_path / "journal.jsonl").read_bytes().count(b"\n") == len(RESULTS)


@pytest.mark.parametrize("harm", ["cut", "flip", "lose"])
def test_damaged_tensors_are_computed_again(tmp_path: Path, harm: str) -> None:
    filled(tmp_path)
    journal = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[1])
    path = tmp_path / "tensors" / f"{journal['step']['tensors']}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content) if harm == "flip" else bytes(content[:-3]))
    if harm == "lose":
        path.unlink()
    assert recalled(tmp_path) == ["numbers"]
    filled(tmp_path)
    assert recalled(tmp_path) == list(RESULTS)


def test_a_disk_that_is_full_loses_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    whole, store = (tmp_path / "journal.jsonl").read_bytes(), store_of(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(secateur.journal.os, "fsync", full)
        for value in (3, torch.zeros(3)):
            with pytest.raises(OutputError, match=r"free some room.*4 steps"):
                store.put("more", value)
    store.put("more", 4)
    assert (tmp_path / "journal.jsonl").read_bytes().startswith(whole)
    assert store_of(tmp_path).get("more") == 4


def test_a_folder_is_one_job_s_and_one_process_s(tmp_path: Path) -> None:
    folder = tmp_path / "out.run"
    with claimed_run(folder, JOB), pytest.raises(OutputBusyError), claimed_run(folder, JOB):
        pass
    changed = {**JOB, "method": "slimgpt", "filter": ["refit"]}
    with claimed_run(folder, changed):  # nothing is lost
        store_of(folder).put("a", 1)
    with pytest.raises(JournalError, match=r"changed: method \(slimgpt, now 2ssp\), filter"), claimed_run(folder, JOB):
        pass
    assert store_of(folder).get("a") == 1
    with claimed_run(folder, JOB, overwrite=True):
        assert not Journal(folder).entries
    forget(folder)
    assert not folder.exists()
    (folder / "mine").mkdir(parents=True)
    forget(folder)
    with pytest.raises(JournalError, match="something else"), claimed_run(folder, JOB, overwrite=True):
        pass
    assert (folder / "mine").is_dir()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # who is killed closes no file
def test_a_done_job_s_own_steps_go_as_a_whole_whenever_it_is_killed(tmp_path: Path) -> None:
    """Those that hold for other jobs stay, others' too; tensors that somebody names stay, and no others."""
    begun = tmp_path / "begun"
    store, shared = store_of(begun, "done", beginning="for all"), torch.arange(5.0)
    for key, value in {"for all": torch.ones(3), "alike": shared, "own": torch.zeros(4), "number": 3}.items():
        store.put(key, value)
    store.put_states("walk", torch.rand(7))
    other = store_of(begun, "other")
    other.put("alike", shared)
    other.put_states("walk", torch.full((2,), 2.0))
    there = Journal(begun).entries.keys()
    left = [("done", "for all"), ("other", "alike"), ("other", "states/walk")]
    seen, ends = [], 0
    while not seen or seen[-1] is not None:
        ends, folder = ends + 1, tmp_path / str(ends)
        shutil.copytree(begun, folder)
        store = store_of(folder, "done", beginning="for all")
        seen.append(ended_at_line(ends, store.drop))
        journal = Journal(folder)
        assert list(journal.entries) in (list(there), left)
        for place in left:
            assert equal(journal.get(*place), Journal(begun).get(*place))
        store = store_of(folder, "done", beginning="for all")  # of the next process
        store.drop()
        assert list(Journal(folder).entries) == left
        assert len(list((folder / "tensors").iterdir())) == len(left)
        store.put("more", 4)
        assert list(Journal(folder).entries) == [*left, ("done", "more")]
        with claimed_run(folder, JOB, overwrite=True):  # nothing lies there that is taken for something else
            pass
    assert len(seen) > 20


def ended_at_line(count: int, work: Callable[[], None]) -> str | None:
    """Do something, and end it before so many lines of the journal's code; gives the line, None where it was over."""
    lines, before = 0, sys.gettrace()

    class Killed(BaseException):
        pass

    def watch(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if Path(frame.f_code.co_filename) not in (Path(secateur.journal.__file__), Path(secateur.folders.__file__)):
            return None
        lines += event == "line"
        if lines == count:
            raise Killed(f"{frame.f_code.co_name}, line {frame.f_lineno}")
        return watch

    sys.settrace(watch)
    try:
        work()
    except Killed as killed:
        return str(killed)
    finally:
        sys.settrace(before)
    return None


# --- prunings ---

# A search, the default, and states that are kept; of the other methods it is slow.
FEW = (("2ssp", 0), ("secateur", 0), ("slimgpt", 3), ("slicegpt", 1))


def steps(journal: Journal) -> set[str]:
    return {key for _, key in journal.entries if not key.startswith("states/")}


def pruned(
    out: Path, model: Path, observer: Any = None, keep_states: int = 0, stream: bool = False, **more: Any
) -> Any:
    tokens = tiny_tokens(tiny("llama"), 4, 16)
    options = {"initial_tokens": 16, "selection_tokens": "32,64", "generations": 4}
    more = {"sparsity": 0.5, **more}
    if more.get("method") == "evopress":
        more["options"] = options
    request = Request(calibration=tokens, **more)
    output = Output(out, keep_run=True, keep_states=keep_states)
    return prune_to(request, Source(name=str(model), stream=stream), output, observer=observer)


@pytest.mark.parametrize(
    ("method", "keep_states"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each not in FEW)) for each in
     (*((name, 0) for name in methods()), ("slimgpt", 1), ("slimgpt", 3), ("slicegpt", 1))],
)  # fmt: skip
def test_an_interrupted_pruning_goes_on_and_ends_the_same(tmp_path: Path, method: str, keep_states: int) -> None:
    model = write_model(tmp_path / "dense")
    whole = pruned(tmp_path / "whole", model, method=method).record
    with pytest.raises(Interrupted, match=r"steps are kept.*goes on"):
        pruned(tmp_path / "out", model, Impatient(0.5), method=method, keep_states=keep_states)
    assert not (tmp_path / "out").exists()
    begun = Journal(run_folder(tmp_path / "out"))
    outcome = pruned(tmp_path / "out", model, method=method, keep_states=keep_states)
    ended = Journal(run_folder(tmp_path / "out"))
    assert list(ended.entries)[: len(begun.entries)] == list(begun.entries)
    assert steps(ended) == steps(Journal(run_folder(tmp_path / "whole")))
    record = outcome.record
    assert record.fingerprint == whole.fingerprint
    assert record.edits == whole.edits
    assert record.cost.forwards == whole.cost.forwards  # as if it had not been interrupted
    assert load(str(tmp_path / "out")).fingerprint() == load(str(tmp_path / "whole")).fingerprint()
    shutil.rmtree(tmp_path / "out")  # a kill just before it was there
    replayed = pruned(tmp_path / "out", model, method=method, keep_states=keep_states).record
    assert replayed.cost.forwards == whole.cost.forwards


def test_two_kills_count_no_pass_twice(tmp_path: Path) -> None:
    model = write_model(tmp_path / "dense", num_hidden_layers=8)
    whole = pruned(tmp_path / "whole", model, method="slimgpt").record
    for share in (0.4, 0.8):
        with pytest.raises(Interrupted):
            pruned(tmp_path / "out", model, Impatient(share), method="slimgpt")
    assert pruned(tmp_path / "out", model, method="slimgpt").record.cost.forwards == whole.cost.forwards


def test_a_streamed_run_beside_the_dense_model_goes_on(tmp_path: Path) -> None:
    """Its edits are made again before anybody looks: each block is then read as it was, not held."""
    model = write_model(tmp_path / "dense")
    whole = pruned(tmp_path / "whole", model).record
    with pytest.raises(Interrupted):
        pruned(tmp_path / "out", model, Impatient(0.6), stream=True)
    assert pruned(tmp_path / "out", model, stream=True).record.edits == whole.edits


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("method", methods())
def test_a_run_folder_takes_at_most_what_is_asked_for(
    tmp_path: Path, method: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's room is asked for before any work, and by a run that goes on, what it lacks."""
    model, out = write_model(tmp_path / "dense"), tmp_path / "out"
    asked, foretold, taken = list[int](), list[int](), list[int]()

    def watched(of: type, name: str, look: Callable[[Any], None]) -> None:
        real = getattr(of, name)

        def called(*given: Any, **more: Any) -> Any:
            result = real(*given, **more)
            look(result)
            return result

        monkeypatch.setattr(of, name, called)

    mapped = Counter[str]()  # bytes of states in files, which have no names

    def map_states(states: Tensor) -> None:
        mapped["now"] += states.nbytes
        weakref.finalize(states, mapped.subtract, {"now": states.nbytes})
        taken.append(taken_bytes(run_folder(out)) + mapped["now"])

    monkeypatch.setattr(secateur.running, "require_space", lambda folder, needs: asked.append(needs))
    for module in (engine_stream, engine_sweep):
        monkeypatch.setattr(module, "room_for", lambda model, states, budget: room_for(model, states, 0))
    monkeypatch.setattr(secateur.disk_room, "STATE_BYTES", 0)
    watched(Plan, "run_bytes", foretold.append)
    watched(MappedRoom, "empty", map_states)
    for store in (Journal, Shelf):
        watched(store, "put", lambda result: taken.append(taken_bytes(run_folder(out)) + mapped["now"]))
    how = {"method": method, "stream": stream, "keep_states": 1}
    with pytest.raises(Interrupted):
        pruned(out, model, Impatient(0.5), **how)
    there = taken_bytes(run_folder(out))
    pruned(out, model, **how)
    assert 0 < there <= max(taken) <= foretold[0]
    assert asked[0] > foretold[0]
    assert asked[1] == asked[0] - there
    assert bool(mapped) == stream


def test_what_changed_is_refused_and_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "dense"), tmp_path / "out"
    with pytest.raises(Interrupted):
        pruned(out, model, Impatient(0.5), method="blockpruner")
    with pytest.raises(JournalError, match=r"changed: size sparsity \(0.5, now 0.25\)"):
        pruned(out, model, method="blockpruner", sparsity=0.25)
    pruned(out, model, method="blockpruner")
    shutil.rmtree(out)
    journal = run_folder(out) / "journal.jsonl"
    before = journal.read_bytes()
    pruned(out, model, method="blockpruner")
    assert journal.read_bytes() == before  # nothing was computed


def test_the_run_folder_goes_when_the_output_is_there(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "dense"), tmp_path / "out"
    tokens = tiny_tokens(load(str(model)), 2, 8)
    prune_to(Request(sparsity=0.5, calibration=tokens), str(model), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


def test_the_run_folder_of_a_goal_goes_after_a_kill_between_output_and_end(tmp_path: Path) -> None:
    """Although the second command takes the sparsity that the first one searched for."""
    model, out = write_model(tmp_path / "dense"), tmp_path / "out"
    dense = load(str(model))
    tokens, size = tiny_tokens(dense, 2, 8), dense.layout().parameters * dense.dtype.itemsize
    request = Request(goal=Goal(target_bytes=size * 4 // 5), calibration=tokens, method="2ssp")
    for keep_run in (True, False):
        prune_to(request, str(model), Output(out, keep_run=keep_run))
        assert run_folder(out).exists() == keep_run


def test_a_killed_run_for_a_speed_keeps_the_sparsity_that_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the layouts are timed again, and are slower now."""
    model, out = write_model(tmp_path / "dense"), tmp_path / "out"
    tokens = tiny_tokens(load(str(model)), 2, 8)
    request = Request(goal=Goal(target_speedup=1.4), calibration=tokens, method="secateur")

    def timed(by: float) -> None:
        def speedup(dense: Any, smaller: Any, **how: Any) -> float:
            return by * dense.layout().parameters / smaller.layout().parameters

        monkeypatch.setattr(secateur.planning, "speedup", speedup)

    timed(1.0)
    whole = prune_to(request, str(model), Output(tmp_path / "whole")).record
    with pytest.raises(Interrupted):
        prune_to(request, str(model), Output(out), observer=Impatient(0.6))
    begun = set(Journal(run_folder(out)).entries)
    assert len(begun) > 1
    timed(0.9)
    record = prune_to(request, str(model), Output(out, keep_run=True)).record
    assert (record.fingerprint, record.sparsity) == (whole.fingerprint, whole.sparsity)
    assert (record.goal.got, record.goal.tried) == (whole.goal.got, whole.goal.tried)
    after = Journal(run_folder(out)).entries
    assert begun <= set(after)
    assert {job for job, _ in after} == {job for job, _ in begun}  # nothing was begun at another sparsity


@pytest.mark.slow
def test_a_search_for_a_goal_goes_on(tmp_path: Path) -> None:
    model = write_model(tmp_path / "dense")
    text = tmp_path / "text.txt"
    judging = Judging(texts=(str(text),), samples=4, length=16)
    goal = Goal(max_perplexity_increase=0.05, tolerance=0.1, judging=judging)
    text.write_text("a plain line of text\n" * 80)

    def searched(out: Path, observer: Any = None, keep_run: bool = True, **size: Any) -> Any:
        request = Request(goal=goal, calibration=str(text), samples=4, length=16, method="2ssp", **size)
        return prune_to(request, str(model), Output(out, keep_run=keep_run), observer=observer).record

    whole = searched(tmp_path / "whole")

    class Third(Impatient):
        bars = 0

        def progress(self, label: str, total: float, done: float = 0.0) -> Any:
            self.bars += 1
            self.share = 0.5 if self.bars > 12 else 2.0
            return super().progress(label, total, done)

    with pytest.raises(Interrupted):
        searched(tmp_path / "out", Third())
    begun = len(Journal(run_folder(tmp_path / "out")).entries)
    for size in ({"of": "model"}, {"round_to": 4}):  # the same sparsities are other prunings then
        with pytest.raises(JournalError):
            searched(tmp_path / "out", **size)
    ended = searched(tmp_path / "out")
    assert 0 < begun < len(Journal(run_folder(tmp_path / "out")).entries)
    assert (ended.goal.tried, ended.goal.got, ended.edits) == (whole.goal.tried, whole.goal.got, whole.edits)
    searched(tmp_path / "out", keep_run=False)  # as after a kill between the output and the run folder's end
    assert not run_folder(tmp_path / "out").exists()
