"""Tables of what bench/vllm_parity.py, vllm_serve.py and engine_speed.py measured, for figures.py."""

import json
import statistics
from collections.abc import Iterator, Mapping
from os.path import relpath
from pathlib import Path
from typing import Any

from secateur.report.table import Column, Table, markdown

RESULTS = Path(__file__).parent / "results"
PARITY, SERVED = RESULTS / "vllm" / "parity.json", RESULTS / "vllm" / "served.json"
SPEED = RESULTS / "engine-speed" / "speed.json"


def parity(kind: str, page: Path) -> Iterator[str]:
    """Tiny models in vLLM, of one form and dtype: `parity vllm/float32`."""
    form, dtype = kind.split("/")
    found = json.loads(PARITY.read_text(encoding="utf-8"))
    columns = [
        Column("family", "family"), Column("layout", "layout"), Column("prompt", "prompt", form=".1e"),
        Column("new_logprobs", "on the cache", form=".1e"), Column("same", "same tokens"),
    ]  # fmt: skip
    if dtype != "float32":
        columns += [
            Column("vllm", "vLLM to float32, mean", form=".1e"),
            Column("transformers", "transformers to float32, mean", form=".1e"),
        ]
    cells = [cell for cell in found["cells"] if (cell["form"], cell["dtype"]) == (form, dtype)]
    cells.sort(key=lambda cell: (cell["family"] != "llama", cell["family"], cell["layout"]))
    rows = [
        {
            **cell,
            "same": "yes" if cell["same_tokens"] else "no",
            **{name: cell[f"{name}_to_float32"]["mean"] for name in ("vllm", "transformers") if dtype != "float32"},
        }
        for cell in cells
        if "same_tokens" in cell
    ]
    yield _shown(columns, rows)
    for cell in cells:
        if reason := cell.get("refused") or cell.get("error"):
            yield f"{cell['family']}, {cell['layout']}: {reason.partition('. ')[0]}."
    versions = ", ".join(f"{name} {version}" for name, version in found["read_by"].items())
    yield f"{versions}, on a CPU ([figures]({relpath(PARITY, page.parent)}))."


def served(_: str, page: Path) -> Iterator[str]:
    """What `vllm serve` answered."""
    found = json.loads(SERVED.read_text(encoding="utf-8"))
    columns = [
        Column("model", "model"), Column("command", "command"), Column("prompt", "prompt", form=".1e"),
        Column("new_logprobs", "on the cache", form=".1e"), Column("same", "same tokens"), Column("text", "same text"),
        Column("seconds_until_it_answers", "s until it answers", form=".0f"),
    ]  # fmt: skip
    rows, refusals = [], []
    for cell in found["cells"]:
        if "prompt" in cell:
            words = {"same": cell["same_tokens"], "text": cell["same_text"]}
            words = {name: "yes" if value else "no" for name, value in words.items()}
            rows.append({**cell, "command": f"`{cell['command']}`", **words})
        else:
            refusals.append(f"- {cell['model']}, `{cell['command']}`: {cell['error']}")
    yield _shown(columns, rows)
    if refusals:
        yield "Did not come up:\n\n" + "\n".join(refusals)
    yield f"vllm {found['read_by']['vllm']}; {found['machine']} ([figures]({relpath(SERVED, page.parent)}))."


def speeds(what: str, page: Path) -> Iterator[str]:
    """Ratios to the dense model within a round, by engine: `speeds new` or `speeds prompt`."""
    found = json.loads(SPEED.read_text(encoding="utf-8"))
    counted = {name: each[what] for name, each in found["parameters"].items()}
    columns = [Column("shape", "shape"), Column("count", "by count", form=".2f")]
    columns += [Column(name, f"{name} ({each['version']})") for name, each in found["engines"].items()]
    rows = [
        {
            "shape": shape,
            "count": counted["dense"] / count,
            **{name: _ratio(each["speeds"], shape, what) for name, each in found["engines"].items()},
        }
        for shape, count in counted.items()
    ]
    yield _shown(columns, rows)
    rounds = len(next(iter(found["engines"].values()))["speeds"]["dense"][what])
    lengths = ", ".join(f"{each['new']} ({name})" for name, each in found["engines"].items() if "new" in each)
    amount = f"new tokens behind 8, so many: {lengths}" if what == "new" else f"a prompt of {found['prompt']} tokens"
    yield (
        f"Tokens per second of processor time, of {amount}, over the dense model's of the same round: the median, and "
        f"the lowest and highest of {rounds} rounds. In the dense row: its tokens per second. {found['machine']} "
        f"([figures]({relpath(SPEED, page.parent)}))."
    )


def _ratio(speeds: Mapping[str, Any], shape: str, what: str) -> str:
    mine, dense = speeds[shape], speeds["dense"]
    if what not in mine:
        return "refused" if "refused" in mine else "error"
    if shape == "dense":
        return f"{statistics.median(dense[what]):.0f} tokens/s"
    ratios = [one / other for one, other in zip(mine[what], dense[what], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _shown(columns: list[Column], rows: list[dict[str, Any]]) -> str:
    return markdown(Table(columns, rows)).strip()


ENGINES = (parity, served, speeds)
