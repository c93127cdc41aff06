"""The variants of one sweep, spread over actors that each hold the model once.

An actor loads the model by its name and follows the edits of the run: each call says all that were made, and the actor
makes those that it has not made yet. So one that was killed is started afresh by Ray, loads, follows, and does again
what it was asked, to the same bits: nothing of the search is lost, and nobody has to know.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.engine.loss import Metric
from secateur.engine.sweep import Part, Sweeper, Variant, Versions, final_states, sample_sweep
from secateur.engine.tokens import Tokens
from secateur.errors import InvalidOptionError, WorkersError
from secateur.model.coerce import Loaded
from secateur.model.handle import Model
from secateur.model.load import Source
from secateur.run import Meter, Run
from secateur.surgery.apply import apply
from secateur.surgery.edits import Edit
from secateur.workers.session import Workers, begin_work, caused, ray_module, require_workers, session

Ref = Any  # of something in Ray's object store


@dataclass(frozen=True)
class Share:
    """What one actor does of a sweep: these variants over these samples, both by their places."""

    variants: range
    samples: range


class SpreadSweeps:
    """Makes the sweepers of a run (`Run(sweeper=...)`) whose sweeps are spread over actors; the first one starts these.

    Args:
        source: of the model as the run begins with it.
        device: the kind that the model is on.
        fingerprint: of its weights; every actor's are compared with it.
    """

    def __init__(self, workers: Workers, source: Source, device: str, fingerprint: str) -> None:
        self.workers, self.fingerprint = workers, fingerprint
        # of "cuda:1" a worker sees its own GPUs, the first as "cuda:0"; a folder for scratch need not be its own
        named = "auto" if source.device == "auto" else device
        self.source = replace(source, device=named, tokenizer=None, scratch=None)
        self.device, self._actors = device, list[Any]()

    def __call__(self, model: Model, run: Run, versions: Versions | None = None) -> SpreadSweeper:
        return SpreadSweeper(self, model, run, versions)

    def publish(self, edit: Edit) -> Ref:
        """Put an edit where actors can follow it."""
        return ray_module().put(edit)

    @property
    def actors(self) -> list[Any]:
        if not self._actors:
            holder = ray_module().remote(Holder).options(
                max_restarts=self.workers.retries, max_task_retries=self.workers.retries,
                **self.workers.options(self.device),
            )  # fmt: skip
            given = self.source, self.workers.threads, self.fingerprint, Path.cwd()
            self._actors = [holder.remote(*given) for _ in range(self.workers.count)]
        return self._actors


@contextmanager
def spreading(workers: Workers | None, source: Source | Loaded) -> Iterator[Callable[[str], SpreadSweeps | None]]:
    """Gives what makes the `sweeper` of a run, from the model's fingerprint: None where there are no workers. Ray is
    there from then on to the end of the context.

    Raises:
        InvalidOptionError: the model is in memory, where no worker can load it.
        MissingExtraError: Ray is not installed.
        WorkersError, when a sweeper is made: as `session` and `require_workers` say.
    """
    if workers is None:
        yield lambda fingerprint: None
        return
    if not isinstance(source, Source):
        raise InvalidOptionError("workers load the model by its name; give that, not a model in memory")
    given, asked = source, workers
    ray_module()
    with ExitStack() as stack:

        def sweeps(fingerprint: str) -> SpreadSweeps:
            device = given.main_device.type
            stack.enter_context(session(asked))
            require_workers(asked, device)
            return SpreadSweeps(asked, given, device, fingerprint)

        yield sweeps


class SpreadSweeper(Sweeper):
    """Sweeps of one model by one run, over the actors. Each variant's losses are those of `Sweeper`; the meter counts
    what was really run, which is more where variants of one prefix went to several actors."""

    def __init__(self, sweeps: SpreadSweeps, model: Model, run: Run, versions: Versions | None) -> None:
        super().__init__(model, run, versions)
        self._sweeps, self._stored = sweeps, (-1, None)  # how many versions there were when they were stored

    def sums(self, tokens: Tokens, variants: Sequence[Variant], metric: Metric, label: str) -> Tensor:
        model, run = self.model, self.run
        if not variants:
            return torch.zeros(0, tokens.samples, dtype=torch.float64)
        run.meter.asked_tokens += len(variants) * tokens.ids.numel() * len(model.numbers)
        ordered = sorted(set(variants), key=_by_prefix)
        count = len(self._sweeps.actors)
        shares = list(split(ordered, tokens.samples, count, model.numbers, model.head_cost))
        given = ray_module().put((tokens, ordered, metric))
        versions = self._versions()
        calls = [("sums", (given, versions, share)) for share in shares]
        sums = torch.zeros(len(ordered), tokens.samples, dtype=torch.float64)
        for place, some in self._results(calls, label):
            share = shares[place]
            sums[share.variants.start : share.variants.stop, share.samples.start : share.samples.stop] = some
        places = {variant: place for place, variant in enumerate(ordered)}
        return sums[[places[variant] for variant in variants]]

    def final_states(self, tokens: Tokens) -> Tensor:
        self.run.meter.asked_tokens += tokens.ids.numel() * len(self.model.numbers)
        samples = _parts(tokens.samples, len(self._sweeps.actors))
        cut = [replace(tokens, ids=tokens.ids[some], weights=tokens.weights[some]) for some in map(_slice, samples)]
        states = dict(self._results([("final_states", (some,)) for some in cut], "dense states"))
        return torch.cat([states[place] for place in range(len(cut))]).to(self.model.device)

    def _results(self, calls: Sequence[tuple[str, tuple[Any, ...]]], label: str) -> Iterator[tuple[int, Tensor]]:
        """What the actors give, as it comes, with the call's place: the calls go round them in turn."""
        ray, run, actors = ray_module(), self.run, self._sweeps.actors
        edits = list(run.root.edits)
        waiting = {}
        for place, (name, given) in enumerate(calls):
            waiting[getattr(actors[place % len(actors)], name).remote(edits, *given)] = place
        with run.progress(label, len(calls)) as done:
            while waiting:
                (first, *_), _ = ray.wait(list(waiting), num_returns=1)
                try:
                    result, meter = ray.get(first)
                except ray.exceptions.RayError as error:
                    raise caused(error) from error
                run.meter.block_tokens += meter.block_tokens
                run.meter.head_tokens += meter.head_tokens
                done(1)
                yield waiting.pop(first), result.clone()  # which may be written to

    def _versions(self) -> list[Ref]:
        """The versions' edits in the store, in a list: what is in one is fetched by the actor, and once."""
        if self.versions is None:
            return []
        if self._stored[0] != len(self.versions):
            self._stored = len(self.versions), ray_module().put(dict(self.versions))
        return [self._stored[1]]


class Holder:
    """An actor: the model as the run's edits have made it so far."""

    def __init__(self, source: Source, threads: int, fingerprint: str, folder: Path) -> None:
        begin_work(threads, folder)
        self._source, self._fingerprint = source, fingerprint
        self._model: Model | None = None
        self._made: list[Ref] = []
        self._versions: tuple[list[Ref], Versions | None] = [], None

    def sums(self, edits: list[Ref], given: Any, versions: list[Ref], share: Share) -> tuple[Tensor, Meter]:
        tokens, ordered, metric = given
        model, run = self._followed(edits), Run()
        if self._versions[0] != versions:
            self._versions = versions, ray_module().get(versions[0]) if versions else None
        some = _slice(share.samples)
        cut = replace(tokens, ids=tokens.ids[some], weights=tokens.weights[some])
        shifted = Shifted(metric, share.samples.start)
        variants = [ordered[place] for place in share.variants]
        return sample_sweep(model, cut, variants, shifted, run=run, versions=self._versions[1]), run.meter

    def final_states(self, edits: list[Ref], tokens: Tokens) -> tuple[Tensor, Meter]:
        model, run = self._followed(edits), Run()
        return final_states(model, tokens, run=run).cpu(), run.meter

    def _followed(self, edits: list[Ref]) -> Model:
        """The model with these edits; afresh where it has others, as after another run's."""
        if self._model is None or self._made != edits[: len(self._made)]:
            self._model, self._made = None, []  # before another one is loaded
            model = self._source.load()
            if model.fingerprint() != self._fingerprint:
                raise WorkersError(
                    f"{self._source.name} has other weights for a worker than for this command; all machines must see "
                    "the same model"
                )
            self._model = model
        for edit in edits[len(self._made) :]:
            apply(self._model, ray_module().get(edit))
            self._made.append(edit)
        return self._model


@dataclass(frozen=True)
class Shifted:
    """A metric for samples from one of them on, counted from 0."""

    metric: Metric
    first: int

    @property
    def heads(self) -> int:
        return self.metric.heads

    def prepare(self, model: Model, sample: int, positions: slice) -> Tensor | None:
        return self.metric.prepare(model, sample + self.first, positions)

    def loss(self, logits: Tensor, targets: Tensor, prepared: Tensor | None) -> Tensor:
        return self.metric.loss(logits, targets, prepared)


# --- which actor does what ---


def split(ordered: Sequence[Variant], samples: int, count: int, numbers: Sequence[int], head: float) -> Iterator[Share]:
    """Shares of a sweep, about equal work for each of `count` actors in turn.

    As many whole samples as go evenly: of these every actor has all variants, so that no prefix is computed twice. Of
    the samples that are left over, neighbouring variants.

    Args:
        ordered: by prefix.
        numbers: of the blocks.
        head: what a token costs in the head, in blocks.
    """
    each = samples // count
    if each:
        yield from (Share(range(len(ordered)), range(k * each, (k + 1) * each)) for k in range(count))
    if rest := range(each * count, samples):
        yield from (Share(some, rest) for some in _neighbours(ordered, count, numbers, head))


def _by_prefix(variant: Variant) -> list[tuple[float, str, int]]:
    """In this order variants that agree up to a block are neighbours: what differs first decides, none comes last."""
    return [*((float(part.block), part.kind, part.version) for part in sorted(variant)), (float("inf"), "", 0)]


def _neighbours(ordered: Sequence[Variant], count: int, numbers: Sequence[int], head: float) -> Iterator[range]:
    """At most `count` runs of variants, such that the dearest is as cheap as can be."""
    whole = len(numbers) + head
    after = [whole, *(whole - _common(one, two, numbers) for one, two in pairwise(ordered))]

    def runs(limit: float) -> list[range]:
        starts, cost = [0], 0.0
        for place, more in enumerate(after):
            if cost and cost + more > limit:
                starts.append(place)
                cost = whole
            else:
                cost = cost + more if cost else whole
        return [range(*pair) for pair in zip(starts, [*starts[1:], len(ordered)], strict=True)]

    limits = range(1, round(sum(after)) + len(after) + 1)
    found = bisect_left(limits, True, key=lambda limit: len(runs(max(limit, whole))) <= count)
    yield from runs(max(limits[min(found, len(limits) - 1)], whole))


def _common(one: Variant, two: Variant, numbers: Sequence[int]) -> int:
    """Blocks that two variants have in common before the first that differs."""
    first: Part | None = min(one ^ two, default=None)
    return len(numbers) if first is None else sum(number < first.block for number in numbers)


def _parts(samples: int, count: int) -> list[range]:
    bounds = [samples * k // count for k in range(count + 1)]
    return [range(*pair) for pair in pairwise(bounds) if pair[0] < pair[1]]


def _slice(some: range) -> slice:
    return slice(some.start, some.stop)
