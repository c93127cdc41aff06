"""Optimal brain surgery on one map: the inverse Hessian down-dated, against one made anew in every iteration.

Half of the columns go, by SlimGPT's released schedule. Hessians are made up (correlated inputs, damped by 0.01);
seconds are this process's processor time; peak memory is above the level before, the Hessian as given apart. Above
`--whole` columns the inverses made anew are not run to the end: the first iteration and the last are timed, and those
between follow t = a n^3 + b n^2 of the n columns that are left.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=262144 python bench/obs.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import MEGA, Report, parser
from memory import resident
from torch import Tensor

from secateur.solvers.obs import group_sizes, prune_bytes, prune_groups

DAMPING = 0.01
SHAPES = {1536: 576, 4864: 896, 11008: 4096}  # columns, rows: SmolLM2-135M, Qwen2-0.5B, Llama-2-7B


def problem(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) and H = 2 E[x x^T] of inputs that share directions, some more than others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator)
    shared = torch.randn(tokens, 64, generator=generator) @ torch.randn(64, columns, generator=generator)
    x = (x + shared / 8) * torch.logspace(0, -1, columns)
    return torch.randn(rows, columns, generator=generator), (2 * x.T @ x / tokens).to(dtype)


def iteration(weight: Tensor, hessian: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """One iteration with an inverse of its own: the weight compensated, and which columns stay."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    order = torch.sort(weight.square().sum(dim=0) / inverse.diagonal(), stable=True).indices
    gone, rows = order[:count], inverse[order[:count]]
    solved = torch.cholesky_solve(weight[:, gone].T, torch.linalg.cholesky(rows[:, gone]))
    return weight - solved.T @ rows, order[count:].sort().values


def anew(weight: Tensor, hessian: Tensor, schedule: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What stays and its weight, by an inverse made anew in every iteration."""
    weight, hessian = weight.to(hessian.dtype), hessian.clone()
    hessian.diagonal().add_(DAMPING * float(hessian.diagonal().mean()))
    alive = torch.arange(len(hessian))
    for count in schedule:
        weight, stay = iteration(weight, hessian[alive][:, alive], count)
        weight, alive = weight[:, stay], alive[stay]
    return alive, weight


def extrapolated(weight: Tensor, hessian: Tensor, schedule: Sequence[int]) -> float:
    """Seconds of `anew`, from its first and its last iteration."""
    weight, hessian = weight.to(hessian.dtype), hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    left = [len(hessian) - sum(schedule[:place]) for place in range(len(schedule))]
    ends = {n: timed(lambda n=n, count=count: iteration(weight[:, :n], hessian[:n, :n].clone(), count))[1]
            for n, count in ((left[0], schedule[0]), (left[-1], schedule[-1]))}  # fmt: skip
    powers = torch.tensor([[float(n) ** 3, float(n) ** 2] for n in ends], dtype=torch.float64)
    a, b = torch.linalg.solve(powers, torch.tensor(list(ends.values()), dtype=torch.float64)).tolist()
    return sum(a * n**3 + b * n**2 for n in left)


def timed(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Its result, processor seconds and peak bytes."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is the level of now
    began = time.process_time()
    result = work()
    return result, time.process_time() - began, resident("VmHWM") - before


def row(columns: int, rows: int, dtype: torch.dtype, options: Any) -> dict[str, Any]:
    weight, hessian = problem(rows, columns, options.samples, dtype)
    schedule = group_sizes(columns // 2, "released")
    kept, seconds, peak = timed(lambda: prune_groups(weight, hessian.clone(), 1, schedule, damping=DAMPING))
    made = {"columns": columns, "rows": rows, "dtype": str(dtype).removeprefix("torch."), "iterations": len(schedule)}
    if columns > options.whole:
        before = extrapolated(weight, hessian, schedule)
        same, peak_before = {"same choices": "", "largest difference": ""}, ""
    else:
        (alive, other), before, bytes_before = timed(lambda: anew(weight, hessian, schedule))
        equal = torch.equal(alive, kept.index)
        apart = f"{float((other - kept.weight).abs().max() / other.abs().max()):.1e}" if equal else ""
        common = len(set(alive.tolist()) & set(kept.index.tolist()))
        same, peak_before = {"same choices": f"{common} of {len(alive)}", "largest difference": apart}, bytes_before
    return made | {
        "anew s": round(before, 2), "down-dated s": round(seconds, 2), "speed-up x": round(before / seconds, 1),
        "anew MB": round(peak_before / MEGA) if peak_before else "", "down-dated MB": round(peak / MEGA),
        "foretold MB": round((prune_bytes(rows, columns, dtype) - hessian.numel() * dtype.itemsize) / MEGA), **same,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--columns", type=int, nargs="+", default=list(SHAPES))
    made.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    made.add_argument("--samples", type=int, default=4096, help="tokens of the made-up inputs")
    made.add_argument("--whole", type=int, default=5000, help="columns up to which inverses anew are run to the end")
    options = made.parse_args(arguments)
    report = Report("Optimal brain surgery by down-dating, against an inverse per iteration", options)
    rows = [row(columns, SHAPES.get(columns, columns // 3), getattr(torch, dtype), options)
            for columns in options.columns for dtype in options.dtypes]  # fmt: skip
    report.table("Half of the columns, the released schedule", rows)
    report.close()


if __name__ == "__main__":
    main()
