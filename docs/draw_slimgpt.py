"""Draw SlimGPT's figures 2 to 5 as SVG, and what each block loses, from what bench/slimgpt.py and slimgpt_inside.py
wrote. Needs the extra `report`.

python docs/draw_slimgpt.py docs/results/slimgpt docs/images
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from slimgpt_tables import relative_losses

from secateur.solvers.ratios import ratios as shares

BLUE, ORANGE, GREEN, PINK, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
SHAPES = {"log": BLUE, "linear": GREEN, "uniform": "#555555", "log-decrease": ORANGE, "linear-decrease": PINK}


def drift(folder: Path, images: Path) -> None:
    """Figure 2: how far an error of the first block travels."""
    found = json.loads((folder / "drift.json").read_text())["share of the first block"]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for (share, errors), colour in zip(found.items(), (SKY, BLUE, ORANGE), strict=True):
        axes.plot(errors["relative"], label=f"{float(share):.0%}", color=colour, marker="o", markersize=3)
    axes.set(xlabel="block", ylabel="relative squared error\nof the FFN's output", yscale="log")
    axes.legend(title="taken from block 0", frameon=False, ncols=3, loc="lower center")
    figure.savefig(images / "slimgpt-drift.svg")


def calibration(folder: Path, images: Path) -> None:
    """Figure 3: perplexity at 50 % by the number and by the length of the calibration windows."""
    cells = [json.loads(path.read_text()) for path in folder.glob("log-0.5-*.json")]
    points = {(c["calibration"]["samples"], c["calibration"]["length"]): c["perplexity"]["128"] for c in cells}
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True, layout="constrained")
    lines = (
        ("windows of 256 tokens", sorted((n, p["perplexity"]) for (n, length), p in points.items() if length == 256)),
        ("tokens per window, 32 windows", sorted((m, p["perplexity"]) for (n, m), p in points.items() if n == 32)),
    )
    for axis, (label, line) in zip(axes, lines, strict=True):
        axis.plot(*zip(*line, strict=True), color=BLUE, marker="o")
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label)
    axes[0].set_ylabel("WikiText-2 perplexity at 128")
    figure.savefig(images / "slimgpt-calibration.svg")


def losses(images: Path) -> None:
    """What each block's FFN loses of its output at 50 %, by the solve's own account, as a share of the output's power:
    where a schedule saves and where it pays."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, colour in (("log", BLUE), ("linear", GREEN), ("uniform", "#555555"), ("no-compensation", ORANGE)):
        if lost := relative_losses(name):
            axes.plot(lost, label=name, color=colour, marker="o", markersize=3)
    axes.set(xlabel="block", ylabel="loss of the FFN's solve,\nof the dense output's square", yscale="log")
    axes.legend(frameon=False, ncols=2)
    figure.savefig(images / "slimgpt-losses.svg")


def ratios(images: Path, mean: float = 0.5, blocks: int = 30) -> None:
    """Figure 4: what each block loses, of the same in all."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for shape, colour in SHAPES.items():
        axes.plot(shares([1.0] * blocks, mean * blocks, shape), label=shape, color=colour)
    axes.set(xlabel="block", ylabel="share removed", ylim=(0, 1))
    axes.legend(frameon=False, ncols=2)
    figure.savefig(images / "slimgpt-ratios.svg")


def recovery(folder: Path, images: Path) -> None:
    """Figure 5: loss per counted token while training, on labels and on the dense model's predictions."""
    found = [json.loads(path.read_text())["recovery"] for path in sorted(folder.glob("recovered-*.json"))]
    figure, axes = plt.subplots(1, len(found), figsize=(3.5 * len(found), 3), layout="constrained", squeeze=False)
    for axis, told in zip(axes[0], found, strict=True):
        axis.plot(*zip(*told["training_loss"], strict=True), label="training", color=SKY)
        axis.plot(*zip(*told["held_out_loss"]["curve"], strict=True), label="held out", color=BLUE, marker="o")
        unit = "KL to dense" if told["objective"] == "distillation" else "cross-entropy"
        axis.set(xlabel="step", ylabel=f"{unit}, nats per token", title=told["objective"])
        axis.legend(frameon=False)
    figure.savefig(images / "slimgpt-recovery.svg")


if __name__ == "__main__":
    results, target = Path(sys.argv[1]), Path(sys.argv[2])
    plt.rcParams |= {"svg.hashsalt": "secateur", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ratios(target)
    calibration(results, target)
    drift(results, target)
    losses(target)
    if list(results.glob("recovered-*.json")):
        recovery(results, target)
