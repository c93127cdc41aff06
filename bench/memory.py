"""Peak memory above the weights of 2SSP's first stage, in both orders, against what `--dry-run` foretells.

Each measurement is a process of its own: it loads the model, copies every weight (what safetensors maps counts as
resident while the file is mapped, although the kernel may drop it, and would hide what narrowing frees), runs one
forward of a few tokens (libraries), notes its resident memory, sets the kernel's high-water mark back, works, and reads
the mark. Linux only.

    python bench/memory.py --samples 8 64 --length 512
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import MEGA, Report, calibration, load_model, made_up_config, parser

from secateur.driver import run_method
from secateur.methods import get_method
from secateur.model.budget import Budget
from secateur.model.load import Source
from secateur.planning import Request, plan
from secateur.run import Run

STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(job: dict[str, Any]) -> dict[str, float]:
    """In this process: bytes that a run takes at its peak, above what the loaded model takes; its processor time."""
    model = load_model(job["model"])
    tokens = calibration(model, job["samples"], job["length"])
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.data = parameter.data.clone()
        model.hf(input_ids=tokens.ids[:1, :8], use_cache=False)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is the level of now
    began = time.process_time()
    run_method(model, get_method(job["method"]), tokens, Budget(job["sparsity"]), Run(), **job["options"])
    return {"bytes": resident("VmHWM") - before, "cpu_s": time.process_time() - began}


def measure_afresh(job: dict[str, Any]) -> dict[str, float]:
    """`measure` in a new process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def foretell(job: dict[str, Any]) -> int:
    """What `--dry-run` says for the same, less the weights."""
    with tempfile.TemporaryDirectory() as folder:
        name = job["model"]
        if name.startswith("random"):
            made_up_config(name).save_pretrained(folder)
            name = folder
        model = Source(name=name).hollow()
        request = Request(**{key: job[key] for key in ("method", "sparsity", "samples", "length", "options")})
        return int(plan(request, model, device=torch.device("cpu")).held_bytes)


def compare(model: str, samples: int, length: int, order: str, *, sparsity: float = 0.25, stage1_only: bool = True
            ) -> dict[str, Any]:  # fmt: skip
    """One row: measured and foretold, in MB (10^6 bytes)."""
    options = {"order": order, "stage1_only": stage1_only}
    job = {"model": model, "method": "2ssp", "samples": samples, "length": length, "sparsity": sparsity}
    job["options"] = options
    took, told = measure_afresh(job)["bytes"], foretell(job)
    return {
        "run": "stage 1" if stage1_only else "both stages",
        "order": order,
        "samples": samples,
        "measured MB": round(took / MEGA, 1),
        "foretold MB": round(told / MEGA, 1),
        "measured / foretold": round(took / told, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--samples", type=int, nargs="+", default=[8, 64])
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--sparsity", type=float, default=0.25)
    made.add_argument("--both-stages", action="store_true", help="measure a whole run too, with the fewest samples")
    made.add_argument("--worker", type=json.loads, help="used by the bench itself")
    options = made.parse_args(arguments)
    if options.worker:
        print(json.dumps(measure(options.worker)))
        return
    report = Report("Peak memory above the weights, against the forecast", options)
    cases = [(count, order, True) for count in options.samples for order in ("samples", "blocks")]
    if options.both_stages:
        cases.append((min(options.samples), "samples", False))
    rows = [
        compare(options.model, count, options.length, order, sparsity=options.sparsity, stage1_only=alone)
        for count, order, alone in cases
    ]
    report.table(f"{options.model}, windows of {options.length} tokens", rows)
    report.close()


if __name__ == "__main__":
    main()
