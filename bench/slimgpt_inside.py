"""What SlimGPT's parts do inside a model: drift of errors (Fig. 2), choice of heads, growth with width.

Each result is a JSON file; those of drift and heads are not made again. The texts are as in bench/slimgpt.py, and `make
figures` writes the tables into the docs.

    python bench/slimgpt_inside.py drift --data ../shared/data
    python bench/slimgpt_inside.py heads --samples 8 --data ../shared/data      (which error finds the cheapest heads)
    python bench/slimgpt_inside.py growth
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from common import MEGA, folder_parser, load_model, median, windows, write
from memory import foretell, measure_afresh
from torch import Tensor, nn

from secateur.engine.moments import SecondMoment
from secateur.engine.walk import walk
from secateur.methods import get_method
from secateur.model.budget import Budget
from secateur.model.handle import Model
from secateur.run import Run
from secateur.solvers.obs import GroupError, prune_groups
from secateur.surgery.apply import apply

METHOD = get_method("slimgpt")
DRIFT = (0.25, 0.5, 0.75)
ERRORS: tuple[GroupError, ...] = ("exact", "grouped", "ordinary")
HIDDEN = (128, 256, 512, 1024)


def outputs(model: Model, ids: Tensor) -> dict[int, Tensor]:
    """What each FFN adds to the stream, by block, (tokens, hidden)."""
    seen: dict[int, Tensor] = {}

    def look(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[number] = output[0].float()

        return hook

    handles = []
    for number in model.numbers:
        with model.open(number) as block:
            handles.append(block.mlp_out.register_forward_hook(look(number)))
    with torch.no_grad():
        model.hf.get_submodule(model.family.blocks.rpartition(".")[0])(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def drift(options: argparse.Namespace) -> None:
    """Fig. 2: mean squared change of every block's FFN output when the first block alone was pruned."""
    path = options.out / "drift.json"
    if path.exists():
        return
    dense = load_model(options.model)
    tokens = windows(dense, "c4", options.samples, options.length, options, purpose="calibration")
    held = windows(dense, "wikitext2", 4, options.length, options, purpose="evaluation")
    found: dict[str, Any] = {"share of the first block": {}}
    power = {number: 0.0 for number in dense.numbers}
    models = {}
    for share in DRIFT:
        models[share] = load_model(options.model)
        stream = METHOD.prune(
            models[share], tokens, Budget(share), Run(), **METHOD.complete({"ratio": "uniform"})
        )  # fmt: skip
        for edit in itertools.takewhile(lambda edit: edit.block == 0, stream):
            apply(models[share], edit)
        stream.close()
    errors = {share: dict.fromkeys(dense.numbers, 0.0) for share in DRIFT}
    for ids in held.ids.split(1):
        right = outputs(dense, ids)
        for number, y in right.items():
            power[number] += float(y.double().square().mean())
        for share, model in models.items():
            for number, y in outputs(model, ids).items():
                errors[share][number] += float((y - right[number]).double().square().mean())
    for share in DRIFT:
        found["share of the first block"][str(share)] = {
            "error": [errors[share][n] / held.samples for n in dense.numbers],
            "relative": [errors[share][n] / power[n] for n in dense.numbers],
        }
    write(path, found)


def heads(options: argparse.Namespace) -> None:
    """What taking heads by each of the three errors costs in the dense model's blocks, each block for itself.

    Once by KV groups, which is what a model with grouped queries can lose, and once by query heads, as if it had no
    groups: the paper's models have none, and more heads to choose from.
    """
    if (options.out / "heads.json").exists():
        return
    model = load_model(options.model)
    tokens = windows(model, "c4", options.samples, options.length, options, purpose="calibration")
    rows: list[dict[str, Any]] = []
    for visit in walk(model, tokens, order="blocks", run=Run(), label="heads"):
        moment, shape = SecondMoment(torch.float32), visit.block.shape
        visit.observe(attention_hidden=moment.add)
        weight, hessian = visit.block.weight("attention_out"), 2 * moment.mean
        for unit, groups in (("KV groups", shape.kv_heads), ("query heads", shape.query_heads)):
            for gone in sorted({round(groups / 3), round(groups * 2 / 3)}):
                made = {
                    e: prune_groups(weight, hessian.clone(), weight.shape[1] // groups, [1] * gone, error=e)
                    for e in ERRORS
                }
                rows.append(
                    {"block": visit.block.number, "unit": unit, "gone": gone, "of": groups}
                    | {e: {"loss": each.error, "stay": each.index.tolist()} for e, each in made.items()}
                )
    write(options.out / "heads.json", {"samples": tokens.samples, "length": tokens.length, "rows": rows})


def growth(options: argparse.Namespace) -> None:
    """Peak memory above the weights and processor time per block, by width, on made-up models, each in a process."""
    rows = []
    for hidden in HIDDEN:
        name = f"random:blocks=4,hidden={hidden},heads={hidden // 64},kv_heads={hidden // 64}"
        job = {"model": name, "method": "slimgpt", "samples": 8, "length": 256, "sparsity": 0.5, "options": {}}
        took = [measure_afresh(job) for _ in range(3)]
        rows.append(
            {
                "hidden": hidden,
                "width": round(8 * hidden / 3),
                "peak_mb": median([each["bytes"] for each in took]) / MEGA,
                "foretold_mb": foretell(job) / MEGA,
                "cpu_s_per_block": median([each["cpu_s"] for each in took]) / 4,
            }
        )
    write(options.out / "growth.json", {"rows": rows})


def main(arguments: Sequence[str] | None = None) -> None:
    works = {each.__name__: each for each in (drift, heads, growth)}
    parser = folder_parser(__doc__, out="slimgpt", samples=32, length="tokens per calibration window")
    parser.add_argument("work", choices=works)
    options = parser.parse_args(arguments)
    works[options.work](options)


if __name__ == "__main__":
    main()
