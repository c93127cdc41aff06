"""The checks: each yields pairs of what is expected and what secateur gives, for one tiny model on one device.

What is expected comes the long way (`oracles`): whole forwards of transformers' own model, in the same dtype on the
same device. So a difference is the engines' or the device's, not the dtype's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from secateur.doctor.oracles import Removal, edited, logits, mean_nll, muted
from secateur.engine.moments import SecondMoment, matmul_precision
from secateur.engine.sweep import DENSE, Part, Variant, sweep
from secateur.engine.tokens import Tokens
from secateur.engine.walk import walk
from secateur.export import save
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.load import load
from secateur.model.tiny import BLOCKS, tiny
from secateur.run import Run
from secateur.solvers.ridge import ridge
from secateur.surgery.apply import predict
from secateur.surgery.edits import (
    DropAttention,
    DropBlock,
    DropMLP,
    Edit,
    FoldNorms,
    KeepHeads,
    KeepNeurons,
    Rebase,
)
from secateur.testing import TINY_OPTIONS, Contract

# The largest difference that rounding makes, as a share of the largest number expected. The same sums are taken in
# other groups (one window or several, a narrower matrix), so their last bits differ, and four blocks add these up.
# Twelve times the spacing of numbers in the half types (7.8e-3, 9.8e-4); more in float32 (1.2e-7), where it costs
# nothing. A wrong neuron, mask or position shows in the first digit.
TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-1, "float16": 1.2e-2}
STATISTICS_TOLERANCE = TOLERANCES["float32"]  # whatever the model's dtype: statistics are taken in float32 or better

_SAMPLES, _LENGTH = 2, 12  # longer than the sliding windows of tiny models
_PROMPT = 4


@dataclass(frozen=True)
class Pair:
    """What was expected and what came.

    Attributes:
        what: it is.
        expected, got: tensors of one shape, which may differ by the tolerance; or anything that must be equal.
        tolerance: another than the dtype's.
    """

    what: str
    expected: object
    got: object
    tolerance: float | None = None


@dataclass(frozen=True)
class Case:
    """What a check is tried on.

    Attributes:
        subject: a family of the table; for a pruning, a method.
        device: as torch names it.
        dtype: of the model.
    """

    subject: str
    device: str
    dtype: torch.dtype

    def model(self, family: str | None = None) -> Model:
        """A random model, the same each time."""
        model = tiny(family or self.subject)
        model.hf.to(self.device, self.dtype)
        return model

    @cached_property
    def tokens(self) -> Tokens:
        """Random windows, (2, 12)."""
        vocabulary, generator = self.model().vocab_size, torch.Generator().manual_seed(0)
        return Tokens.of(torch.randint(5, vocabulary, (_SAMPLES, _LENGTH), generator=generator))


Check = Callable[[Case], Iterator[Pair]]


def walk_equals_forward(case: Case) -> Iterator[Pair]:
    """What enters each block, as the walk shows it, is what enters it in the model's own forward."""
    model, seen = case.model(), dict[int, list[Tensor]]()
    with torch.no_grad():
        output = model.hf(input_ids=case.tokens.ids.to(model.device), use_cache=False, output_hidden_states=True)
    for visit in walk(model, case.tokens):
        visit.advance(block_in=partial(_keep, seen.setdefault(visit.block.number, [])))
    for number, states in seen.items():
        yield Pair(f"hidden states that enter block {number}", output.hidden_states[number], torch.cat(states))


def statistics_are_precise(case: Case) -> Iterator[Pair]:
    """Second moments and ridge regressions in float32 are those of float64, even where TF32 is allowed."""
    drawn = torch.randn(4, 128, 64, generator=torch.Generator().manual_seed(0))
    x, weights = drawn.to(case.device, case.dtype), torch.ones(drawn.shape[:2])
    moment, exact = SecondMoment(torch.float32), SecondMoment(torch.float64)
    exact.add(x.cpu(), weights)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    with matmul_precision("medium"):
        moment.add(x, weights)
        fitted = ridge(weight, moment.mean, range(40))
    yield Pair("second moments", exact.mean, moment.mean, STATISTICS_TOLERANCE)
    yield Pair("a refitted weight", ridge(weight.double(), exact.mean, range(40)), fitted, STATISTICS_TOLERANCE)


def sweep_equals_copies(case: Case) -> Iterator[Pair]:
    """The losses of variants in one sweep are those of copies that really lack these parts."""
    model = case.model()
    variants: dict[Variant, list[Edit]] = {
        DENSE: [],
        frozenset({Part(0, "attention")}): [DropAttention(0)],
        frozenset({Part(1, "mlp")}): [DropMLP(1)],
        frozenset({Part(2, "block")}): [DropBlock(2)],
        frozenset({Part(0, "attention"), Part(2, "block"), Part(3, "mlp")}): [
            DropAttention(0), DropBlock(2), DropMLP(3),
        ],
    }  # fmt: skip
    expected = [mean_nll(edited(model, *edits), case.tokens) for edits in variants.values()]
    got = sweep(model, case.tokens, list(variants))
    yield Pair("mean losses of five variants", torch.tensor(expected, dtype=torch.float64), got)


def edits_equal_muting(case: Case) -> Iterator[Pair]:
    """An edited model computes what the whole one does with the same parts muted; its layout is the predicted one."""
    model, ids = case.model(), case.tokens.ids
    for edit in _edits(model):
        smaller, name = edited(model, edit), type(edit).__name__
        yield Pair(f"the layout after {name}", predict(model.layout(), edit), smaller.layout())
        yield Pair(f"logits after {name}", logits(muted(model, edit), ids), logits(smaller, ids))


def rotation_changes_nothing(case: Case) -> Iterator[Pair]:
    """The residual stream in other coordinates gives the same logits; in families whose stream can be rebased."""
    model = case.model()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(model.hidden_size, model.hidden_size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn).Q
    rotated = edited(model, FoldNorms(), *(Rebase(site, basis) for site in range(2 * BLOCKS + 1)))
    yield Pair("logits", logits(model, case.tokens.ids), logits(rotated, case.tokens.ids))


def cache_equals_forward(case: Case) -> Iterator[Pair]:
    """Greedy generation with the KV cache gives at each token the logits of a forward without one."""
    dense = case.model()
    prompt = case.tokens.ids[:, :_PROMPT].to(dense.device)
    for name, model in {"dense": dense, "edited": _lopsided(dense)}.items():
        with torch.no_grad():
            made = model.hf.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=_LENGTH,
                use_cache=True, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        whole = logits(model, made.sequences)[:, _PROMPT - 1 : -1]
        yield Pair(f"logits of the {name} model", whole, torch.stack(made.logits, dim=1))


def checkpoint_is_the_model(case: Case) -> Iterator[Pair]:
    """What is saved loads with the same weights, bit for bit, and computes the same."""
    model = _lopsided(case.model())
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model")
        loaded = load(f"{folder}/model", device=case.device)
        yield Pair("the sha256 of all weights", model.fingerprint(), loaded.fingerprint())
        yield Pair("the layout", model.layout(), loaded.layout())
        yield Pair("logits", logits(model, case.tokens.ids), logits(loaded, case.tokens.ids))


def streamed_is_resident(case: Case) -> Iterator[Pair]:
    """A model whose blocks come in from their files one by one computes, and is edited, as one in memory is."""
    variants, edit = [DENSE, frozenset({Part(3, "mlp")})], KeepNeurons(3, (0, 2, 3))
    with tempfile.TemporaryDirectory() as folder:
        save(_lopsided(case.model()), Path(folder) / "model")
        resident, streamed = (load(f"{folder}/model", device=case.device, stream=stream) for stream in (False, True))
        expected, got = (sweep(model, case.tokens, variants) for model in (resident, streamed))
        yield Pair("mean losses of two variants", expected, got)
        whole, again = (edited(model, edit).fingerprint() for model in (resident, streamed))
        yield Pair("the sha256 of all weights once it is edited", whole, again)


def method_keeps_its_contract(case: Case) -> Iterator[Pair]:
    """A method prunes to the budget, repeats itself, and its checkpoint is the model that it left."""
    model = Case("llama", case.device, case.dtype).model
    contract = Contract(
        method=case.subject, options=TINY_OPTIONS.get(case.subject, {}), model=model, budget=Budget(0.5)
    )
    for owed in ("meets_the_budget", "replays", "survives_saving"):
        kept = "kept"
        try:
            getattr(contract, owed)()
        except AssertionError as error:
            kept = str(error)
        yield Pair(owed.replace("_", " "), "kept", kept)
    pruned = model()
    contract.prune(pruned, Run())
    yield Pair("logits that are numbers", True, bool(logits(pruned, contract.tokens.ids).isfinite().all()))


def _keep(states: list[Tensor], x: Tensor, weights: Tensor) -> None:
    states.append(x.clone())


def _edits(model: Model) -> list[Removal]:
    """One of each kind, as far as the family can; all but the last go together."""
    shape = model.layout().blocks[0].shape
    edits: list[Removal] = [
        DropAttention(0), KeepNeurons(1, tuple(range(1, shape.width, 2))), DropMLP(2),
        KeepHeads(3, tuple(range(1, shape.kv_heads))), DropBlock(0),
    ]  # fmt: skip
    return [edit for edit in edits if type(edit).__name__ not in model.family.cannot]


def _lopsided(model: Model) -> Model:
    """A copy with blocks of all sorts; the first, by whose cache transformers counts tokens, has no attention."""
    return edited(model, *_edits(model)[:-1])


# What each check is tried on: nothing, families, or methods.
OF_DEVICES: Mapping[str, Check] = {"statistics": statistics_are_precise}
OF_FAMILIES: Mapping[str, Check] = {
    "walk": walk_equals_forward,
    "sweep": sweep_equals_copies,
    "edits": edits_equal_muting,
    "rotation": rotation_changes_nothing,
    "cache": cache_equals_forward,
    "checkpoint": checkpoint_is_the_model,
    "streamed": streamed_is_resident,
}
OF_METHODS: Mapping[str, Check] = {"pruning": method_keeps_its_contract}
CHECKS: Mapping[str, Check] = {**OF_DEVICES, **OF_FAMILIES, **OF_METHODS}
