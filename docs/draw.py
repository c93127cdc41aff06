"""Draw the pages' pictures from what lies under docs/results (`make figures`): of a comparison perplexity against size,
of an ablation a picture per choice, of each method what it removed from the demo model at 37.5 %, block by block, and
SlimGPT's figures 2 to 5. Needs the extra `report`."""

import json
from collections.abc import Iterator
from itertools import cycle
from typing import TYPE_CHECKING

from figures import IMAGES, PERPLEXITY, RESULTS, folders, pictured, recovered_cells
from slimgpt_tables import ORDER, drift_by_share, relative_losses

from secateur.methods import methods
from secateur.report.ablation_figures import ablation_figures
from secateur.report.blocks import lanes, picture
from secateur.report.drawing import new_figure, set_ticks, styled, to_svg
from secateur.report.figures import size_figure
from secateur.report.looks import looks
from secateur.report.results import ABLATE, COMPARE, CellResult, Results
from secateur.solvers.ratios import ratios as shares

if TYPE_CHECKING:
    from secateur.report.drawing import Drawn

SPARSITY = 0.375  # of the pictures of blocks
SLIMGPT, WIDE = RESULTS / "slimgpt", (6.0, 3.2)
BLUE, ORANGE, GREEN, PINK, SKY, GREY = (
    look.colour for look in looks(["2ssp", "slimgpt", "slicegpt", "evopress", "shortgpt", "another"]).values()
)
SHAPES = {"log": BLUE, "linear": GREEN, "uniform": GREY, "log-decrease": ORANGE, "linear-decrease": PINK}


def grids() -> "Drawn":
    """Of comparisons of several sizes perplexity on the first text against what is left; of ablations every choice."""
    for results in [*folders(COMPARE), *folders(ABLATE)]:
        drawn = ablation_figures(results) if results.index.kind == ABLATE else sizes(results)
        for name, figure in drawn:
            if name in pictured(results):
                yield f"{results.folder.name}/{name}", figure


def sizes(results: Results) -> "Drawn":
    yield PERPLEXITY, size_figure(results, results.texts[0])


def blocks(results: Results, cell: CellResult) -> str:
    """What a cell lost of each block, as SVG."""
    share = cell.achieved.blocks if cell.achieved else None
    title = f"{cell.label}, {share:.1%} of the blocks' parameters removed"
    dense = results.dense.shape if results.dense else None
    return picture(title, lanes(cell.shape or [], dense or [], results.index.model.hidden_size))


def newest() -> dict[str, tuple[Results, CellResult]]:
    """Each of our methods' cell without filters, of the first comparison by name that has one."""
    return {
        cell.method: (results, cell)
        for results in reversed(folders(COMPARE))
        for cell in results.of_size(SPARSITY)
        if cell.method in methods()
    }


# --- SlimGPT's figures, of what bench/slimgpt.py and slimgpt_inside.py wrote ---


def drift() -> "Drawn":
    """Figure 2: how far an error of the first block travels."""
    figure, (axis,) = new_figure(1, WIDE)
    for (share, errors), colour in zip(drift_by_share().items(), (SKY, BLUE, ORANGE), strict=True):
        axis.plot(errors["relative"], label=f"{float(share):.0%}", color=colour, marker="o", markersize=3)
    axis.set(xlabel="block", ylabel="relative squared error\nof the FFN's output", yscale="log")
    set_ticks(axis.yaxis, [error for errors in drift_by_share().values() for error in errors["relative"]])
    figure.legend(title="taken from block 0", frameon=False, ncols=3, loc="outside lower center")
    yield "slimgpt-drift", figure


def calibration() -> "Drawn":
    """Figure 3: perplexity at 50 % by the number and by the length of the calibration windows."""
    cells = [json.loads(path.read_text()) for path in SLIMGPT.glob("log-0.5-*.json")]
    points = {(c["calibration"]["samples"], c["calibration"]["length"]): c["perplexity"].get("128") for c in cells}
    known = {place: told["perplexity"] for place, told in points.items() if told}
    figure, axes = new_figure(2, (3.5, 3.0))
    lines = (
        ("windows of 256 tokens", sorted((n, p) for (n, length), p in known.items() if length == 256)),
        ("tokens per window, 32 windows", sorted((m, p) for (n, m), p in known.items() if n == 32)),
    )
    for axis, (label, line) in zip(axes, lines, strict=True):
        axis.plot(*zip(*line, strict=True), color=BLUE, marker="o")
        axis.set_xscale("log", base=2)
        axis.set(xlabel=label, ylim=(0.9 * min(known.values()), 1.05 * max(known.values())))
        axis.set_xticks([x for x, _ in line], [f"{x:,}" for x, _ in line])
    axes[0].set_ylabel("WikiText-2 perplexity at 128")
    yield "slimgpt-calibration", figure


def variants() -> "Drawn":
    """Schedules, groups of columns and errors of heads, each against `log` of the same calibration; 50 %. What goes
    without compensation is off the scale."""
    figure, (axis,) = new_figure(1, WIDE)
    names = [name for name in reversed(ORDER) if name not in ("dense", "no-compensation")]
    drawn: list[float] = []
    for length, colour, marker in ((2048, BLUE, "o"), (512, ORANGE, "s")):
        files = {name: SLIMGPT / f"{name}-0.5-32x{length}.json" for name in names}
        known = {
            n: json.loads(f.read_text())["perplexity"]["128"]["perplexity"] for n, f in files.items() if f.exists()
        }
        rows = [names.index(name) for name in known]
        axis.plot(list(known.values()), rows, marker, color=colour, label=f"calibrated on 32 x {length:,}")
        axis.axvline(known["log"], color=colour, linewidth=1, linestyle=":")
        drawn += known.values()
    axis.set(xscale="log", xlabel="WikiText-2 perplexity at 128")
    axis.set_yticks(range(len(names)), names)
    set_ticks(axis.xaxis, drawn)
    figure.legend(frameon=False, ncols=2, loc="outside lower center")
    yield "slimgpt-variants", figure


def losses() -> "Drawn":
    """What each block's FFN loses of its output at 50 %, by the solve's own account, as a share of the output's power:
    where a schedule saves and where it pays."""
    figure, (axis,) = new_figure(1, WIDE)
    drawn: list[float] = []
    for name, colour in (("log", BLUE), ("linear", GREEN), ("uniform", GREY), ("no-compensation", ORANGE)):
        if lost := relative_losses(name):
            axis.plot(lost, label=name, color=colour, marker="o", markersize=3)
            drawn += lost
    axis.set(xlabel="block", ylabel="loss of the FFN's solve,\nof the dense output's square", yscale="log")
    set_ticks(axis.yaxis, drawn)
    figure.legend(frameon=False, ncols=4, loc="outside lower center")
    yield "slimgpt-losses", figure


def ratios(mean: float = 0.5, number: int = 30) -> "Drawn":
    """Figure 4: what each block loses, of the same in all."""
    figure, (axis,) = new_figure(1, WIDE)
    for shape, colour in SHAPES.items():
        axis.plot(shares([1.0] * number, mean * number, shape), label=shape, color=colour)
    axis.set(xlabel="block", ylabel="share removed", ylim=(0, 1))
    figure.legend(frameon=False, ncols=5, loc="outside lower center")
    yield "slimgpt-ratios", figure


def recovery() -> "Drawn":
    """Figure 5: loss per counted token while training, on labels and on the dense model's predictions."""
    found = [json.loads(path.read_text())["recovery"] for path in sorted(SLIMGPT.glob("recovered-*.json"))]
    figure, axes = new_figure(len(found), (3.5, 3.0))
    for axis, told in zip(axes, found, strict=True):
        axis.plot(*zip(*told["training_loss"], strict=True), label="training", color=SKY)
        axis.plot(*zip(*told["held_out_loss"]["curve"], strict=True), label="held out", color=BLUE, marker="o")
        unit = "KL to dense" if told["objective"] == "distillation" else "cross-entropy"
        axis.set(xlabel="step", ylabel=f"{unit}, nats", title=told["objective"])
        axis.legend(frameon=False)
    yield "slimgpt-recovery", figure


def tokens_seen() -> "Drawn":
    """Held-out loss against the tokens that were trained on; what learns from labels apart from what learns from the
    dense model."""
    cells = [cell for cell in recovered_cells("recovery").values() if "recovery" in cell]
    if not cells:
        return
    objectives = sorted({cell["recovery"]["objective"] for cell in cells}, reverse=True)
    figure, axes = new_figure(len(objectives), (3.5, 3.0))
    for objective, axis in zip(objectives, axes, strict=True):
        own = [cell for cell in cells if cell["recovery"]["objective"] == objective]
        for cell, colour in zip(own, cycle((BLUE, ORANGE, GREEN, PINK, SKY, GREY))):
            seen = dict(cell["recovery"]["tokens_seen"])
            steps, losses = zip(*cell["recovery"]["held_out_loss"]["curve"], strict=True)
            label = f"{cell['model']}, {cell['way']}"
            axis.plot([seen[step] / 1000 for step in steps], losses, label=label, color=colour, marker="o")
        unit = "cross-entropy" if objective == "labels" else "KL to dense"
        axis.set(xlabel="thousand tokens seen", ylabel=f"held-out {unit}, nats", title=objective)
        axis.legend(frameon=False)
    yield "recovery", figure


def drawn() -> "Iterator[tuple[str, str]]":
    """Every picture as SVG, by its place under docs/images."""
    with styled():
        for draw in (grids, drift, calibration, variants, losses, ratios, recovery, tokens_seen):
            for name, figure in draw():
                yield name, to_svg(figure)
    for method, found in newest().items():
        yield f"methods/{method}", blocks(*found)


if __name__ == "__main__":
    for name, svg in drawn():
        file = IMAGES / f"{name}.svg"
        file.parent.mkdir(exist_ok=True)
        file.write_text(svg, encoding="utf-8")
