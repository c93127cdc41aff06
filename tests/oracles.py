"""What the engines must equal, the long way: edit a copy, run the whole model, loop over the tokens in float64."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import settings
from models import NO_ENDS, logits, possible, tiny, tiny_hf, tiny_tokenizer
from torch import Tensor

from secateur.doctor.oracles import edited
from secateur.doctor.oracles import mean_nll as mean_nll
from secateur.driver import Pruning, run_method
from secateur.engine.sweep import Part
from secateur.engine.tokens import Tokens
from secateur.hf import quiet_transformers
from secateur.methods import Method, get_method, methods
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.model.layout import BlockLayout, Layout
from secateur.model.modeling_secateur import Shape
from secateur.planning import Plan, Request, plan
from secateur.pruning import Job, calibration_of
from secateur.run import Advance, Run, Silent
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, DropBlock, DropMLP, Edit, KeepHeads, KeepNeurons
from secateur.testing import edit_facts as edit_facts

# One that searches, one that turns the stream, and the default, which keeps statistics; all others are slow there.
KINDS_OF_METHOD = ("2ssp", "slicegpt", "secateur")
EACH_METHOD = [pytest.param(name, marks=[pytest.mark.slow] * (name not in KINDS_OF_METHOD)) for name in methods()]
PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=12)


@functools.cache
def standing(family: str, shape: Literal["dense", "lopsided"] = "dense") -> Model:
    """A model for tests that only look; made once."""
    return tiny(family) if shape == "dense" else lopsided(tiny(family))


def lopsided(model: Model) -> Model:
    """A copy with blocks of all sorts: narrow, without attention, without MLP, with one KV group."""
    width, groups = model.layout().blocks[0].shape.width, model.layout().blocks[0].shape.kv_heads
    edits = [
        KeepNeurons(0, tuple(range(0, width, 2))),
        DropAttention(1),
        DropMLP(2),
        KeepHeads(3, (groups - 1,)),
        KeepNeurons(3, (1, 2, 5, 7, 11)),
    ]
    return edited(model, *possible(model, edits))


def still(model: Model, *parts: Part) -> Model:
    """A copy in which these parts leave the residual stream as it is, their weights still there."""
    model = edited(model)
    for part in parts:
        with model.open(part.block) as block, torch.no_grad():
            linears = [block.attention_out] * (part.kind != "mlp") + [block.mlp_out] * (part.kind != "attention")
            for parameter in [each for linear in linears for each in linear.parameters()]:
                parameter.zero_()
    return model


def weighted(tokens: Tokens, seed: int = 0) -> Tokens:
    """The same windows with weights of zero, one and others."""
    choices = torch.tensor([0.0, 0.5, 1.0, 2.0])
    drawn = torch.randint(4, tokens.ids.shape, generator=torch.Generator().manual_seed(seed))
    return Tokens.of(tokens.ids, choices[drawn])


def without(model: Model, parts: Iterable[Part]) -> Model:
    """A copy that really lacks these parts."""
    other, blocks = copy.deepcopy(model), model.layout().blocks
    kinds = {number: {part.kind for part in parts if part.block == number} for number in model.numbers}
    for number, gone in kinds.items():
        block = blocks[number]
        if "block" in gone and len(other.numbers) > 1:
            apply(other, DropBlock(number))
            continue
        if gone & {"attention", "block"} and block.attention:  # a model keeps its last block, if empty
            apply(other, DropAttention(number))
        if gone & {"mlp", "block"} and block.mlp:
            apply(other, DropMLP(number))
    return other


def mean_kl(dense: Model, model: Model, tokens: Tokens) -> float:
    """KL(dense || model) of the prediction of every token but a window's first, weighed by that token's weight."""
    total = count = 0.0
    p_all = torch.softmax(logits(dense, tokens.ids).double(), dim=-1)  # (samples, length, vocabulary)
    q_all = torch.softmax(logits(model, tokens.ids).double(), dim=-1)
    for sample, weights in enumerate(tokens.weights.tolist()):
        for place in range(1, tokens.length):
            p, q = p_all[sample, place - 1], q_all[sample, place - 1]
            total += weights[place] * float((p * (p / q).log()).sum())
            count += weights[place]
    return total / count


def activations(model: Model, ids: Tensor) -> dict[int, dict[str, Tensor]]:
    """By block number and tap, what plain hooks see while the whole model runs: ids (samples, length)."""
    seen: dict[int, dict[str, Tensor]] = {number: {} for number in model.numbers}
    handles = []

    def keep(number: int, name: str, value: Tensor) -> None:
        seen[number][name] = value.detach().reshape(*ids.shape, -1).clone()

    for number in model.numbers:
        with model.open(number) as block:
            module = block.module
            places = [(module, "block_in")]
            if block.has_attention:
                places.append((block.attention_out, "attention_hidden"))
            if block.has_mlp:
                places.append((block.mlp_out, "mlp_hidden"))
            if model.family.no_rebase is None:
                places.append((block.mlp_norm, "block_mid"))
            for place, name in places:
                handles.append(
                    place.register_forward_pre_hook(lambda _, args, n=number, name=name: keep(n, name, args[0]))
                )
            handles.append(
                module.register_forward_hook(
                    lambda _, args, out, n=number: keep(n, "block_out", out[0] if isinstance(out, tuple) else out)
                )
            )
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


class Watcher(Silent):
    """An observer that notes (label, total, done) of every bar, `done` being what it began with and was advanced by."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, float, float]] = []

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0.0) -> Iterator[Advance]:
        steps = [done]
        yield steps.append
        self.shown.append((label, total, sum(steps)))


class Impatient(Silent):
    """An observer that interrupts after so much of the work."""

    def __init__(self, share: float = 0.7) -> None:
        self.share = share

    @contextmanager
    def progress(self, label: str, total: float, done: float = 0.0) -> Iterator[Advance]:
        worked = [done]

        def advance(amount: float) -> None:
            worked.append(amount)
            if sum(worked) > self.share * total:
                raise KeyboardInterrupt

        yield advance


def write_model(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A stock checkpoint of a tiny model, with its tokenizer."""
    with quiet_transformers():
        tiny_hf(family, **overrides).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def write_texts(folder: Path) -> tuple[Path, Path]:
    """A plain text of 6,000 tokens, and chat data."""
    words = re.findall(
        r"\w+", "and then the old dog saw a small red bird in that tall tree by the wide river as it flew away"
    )
    plain, chat = folder / "plain.txt", folder / "chat.jsonl"
    plain.write_text(" ".join(words[(i * i + 3 * i) % len(words)] for i in range(1500))[:6000])
    talks = [(f"Which {words[i % 20]}?", words[-i % 20]) for i in range(60)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in talks
    ]
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return plain, chat


def arithmetic(
    blocks: int, hidden: int, width: int, query: int, kv: int, head_dim: int, *, qkv_bias: bool = False,
    qk_norm: bool = False, other: int = 0,
) -> Layout:  # fmt: skip
    """The layout of a Llama-like model, from its configuration's numbers."""
    attention = 2 * hidden * head_dim * (query + kv)
    attention += qkv_bias * head_dim * (query + 2 * kv) + qk_norm * 2 * head_dim
    block = BlockLayout(
        shape=Shape(width, query, kv), head_dim=head_dim, attention=attention, attention_norms=hidden,
        mlp=3 * hidden * width, mlp_norms=hidden, neuron=3 * hidden, kv_group=attention // kv, rest=0,
    )  # fmt: skip
    return Layout(dict.fromkeys(range(blocks), block), other, NO_ENDS)


def planned(model: Model, method: str, budget: Budget, samples: int, length: int, **options: Any) -> Plan:
    """The plan of a pruning on so many windows."""
    return plan(
        Request(
            method=method, sparsity=budget.sparsity, of=budget.of, round_to=budget.round_to, options=options,
            samples=samples, length=length,
        ),
        model,
    )  # fmt: skip


def job_of(request: Request, model: Model) -> Job:
    planned = plan(request, model)
    return Job.of(planned, model, calibration_of(planned, model))


def prepared(model: Model, method: str = "2ssp", **request: Any) -> Job:
    """A pruning that is fully specified and not yet run."""
    return job_of(Request.given(method, request), model)


def pruner(name: str, **defaults: Any) -> Callable[..., Pruning]:
    """Prunes by a method: model, tokens, budget, perhaps a run, and options."""

    def prune(
        model: Model, tokens: Tokens, budget: Budget | None = None, run: Run | None = None, **options: Any
    ) -> Pruning:
        chosen = {**defaults, **options}
        return run_method(model, get_method(name), tokens, budget or Budget(0.25), run or Run(), **chosen)

    return prune


def edits_of(model: Model, method: Method, tokens: Tokens, budget: Budget, **options: Any) -> list[Edit]:
    """A method's edits with their tensors, each made real before the method resumes."""
    edits = []
    for edit in method.prune(model, tokens, budget, Run(), **method.complete(options)):
        apply(model, edit)
        edits.append(edit)
    return edits
