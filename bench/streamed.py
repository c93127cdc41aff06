"""Models larger than memory: what a streamed pruning takes of memory, of time and of the disk; and of a 70B model.

A checkpoint of random weights in bfloat16 is written block by block, and pruned by `prune_to` from its files in float32
in a process of its own, under a limit of its memory cgroup (version 1, as root; else without a limit, and the peak of
resident memory is what counts). Then times of streamed against resident runs, in turn, in one process; and an estimate
for a model of Llama-3-70B's shape from counted passes and tokens.

    python bench/streamed.py                                    # 62 blocks of 50 MB, 3.1 GB; about half an hour
    python bench/streamed.py --blocks 8 --hidden 256 --width 704 --vocab 4096 --samples 2 --length 64 --model ""

Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from common import MEGA, Report, alternate, calibration, median, parser
from memory import resident
from transformers import LlamaConfig

from secateur.engine.sweep import DENSE, Part, sweep
from secateur.engine.tokens import Tokens
from secateur.judge.perplexity import perplexity
from secateur.methods import methods
from secateur.model.handle import Model, hollow
from secateur.model.load import Source, load
from secateur.model.stored import TensorFile
from secateur.model.streamed import StreamedModel
from secateur.planning import Plan, Request, plan
from secateur.run import Run
from secateur.running import prune, prune_to
from secateur.solvers.obs import group_sizes

GROUP = Path("/sys/fs/cgroup/memory")
GIGA = 1e9


# --- a checkpoint, block by block ---


def config_of(blocks: int, hidden: int, width: int, vocab: int) -> LlamaConfig:
    heads = hidden // 64
    return LlamaConfig(
        num_hidden_layers=blocks, hidden_size=hidden, intermediate_size=width, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), vocab_size=vocab, max_position_embeddings=4096,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def write_checkpoint(folder: Path, config: LlamaConfig) -> int:
    """Random weights, a file per block; returns their bytes."""
    model = hollow(config, torch.bfloat16, {})
    folder.mkdir(parents=True, exist_ok=True)
    model.hf.config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator, where, total = torch.Generator().manual_seed(0), dict[str, str](), 0
    for part in (None, *model.numbers):
        state = {name: tensor for name, tensor in model.state(part).items() if name != "lm_head.weight"}
        name = f"model-{'ends' if part is None else f'{part:03d}'}.safetensors"
        with closing(TensorFile(folder / name, state, digested=False)) as file:
            for tensor_name, tensor in state.items():
                drawn = torch.ones(tensor.shape)
                if tensor.dim() > 1:
                    drawn = 0.02 * torch.randn(tensor.shape, generator=generator)
                file.put(tensor_name, drawn.to(torch.bfloat16))
                total += tensor.nbytes
        where |= dict.fromkeys(state, name)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


# --- memory ---


def pruned_in_here(job: dict[str, Any]) -> dict[str, float]:
    """In this process: prune the checkpoint to a folder; resident memory at most and before, seconds, bytes read."""
    tokens = Tokens.of(torch.randint(5, job["vocab"], job["windows"], generator=torch.Generator().manual_seed(0)))
    request = Request(method=job["method"], sparsity=job["sparsity"], calibration=tokens)
    torch.linalg.cholesky(torch.eye(64, dtype=torch.float64))  # libraries
    before, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    source = Source(name=job["model"], dtype="float32", device="cpu", stream=True)
    prune_to(request, source, Path(job["model"]).with_name(f"out-{job['method']}"))
    return {
        "peak": resident("VmHWM"), "before": before, "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }  # fmt: skip


def pruned(folder: Path, method: str, options: Namespace, limit: int | None) -> dict[str, Any]:
    """`pruned_in_here` in a new process, within a limit of memory where the machine allows one."""
    windows = options.samples, options.length
    job = {"model": str(folder), "method": method, "sparsity": options.sparsity, "windows": windows}
    job["vocab"] = options.vocab
    group = GROUP / f"secateur-bench-{os.getpid()}"
    enter: Callable[[], None] | None = None
    try:
        if limit is not None:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(limit))

            def enter() -> None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        enter = None
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    environment = os.environ | {"TMPDIR": str(folder.parent)}
    done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, env=environment)
    if group.exists():
        group.rmdir()
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {"limited": enter is not None, "failed": f"exit code {done.returncode}"}
    return {**json.loads(done.stdout.splitlines()[-1]), "limited": enter is not None}


def _limit(total: int) -> int | None:
    """A third of the model, unless Python and torch alone take as much."""
    return total // 3 if total // 3 > resident("VmRSS") else None


def memory_row(folder: Path, total: int, method: str, options: Namespace, limit: int | None) -> dict[str, Any]:
    got = pruned(folder, method, options, limit)
    hollow_model = Source(name=str(folder), dtype="float32", stream=True).hollow()
    layout = hollow_model.layout()
    block = max(each.parameters for each in layout.blocks.values())
    row: dict[str, Any] = {
        "method": method, "blocks": len(layout.blocks), "MB a block": round(2 * block / MEGA, 1),
        "model GB": round(total / GIGA, 3), "limit GB": limit and got["limited"] and round(limit / GIGA, 3),
    }  # fmt: skip
    if "failed" in got:
        return {**row, "peak GB": got["failed"]}
    return {
        **row, "peak GB": round(got["peak"] / GIGA, 3), "above Python and torch GB":
        round((got["peak"] - got["before"]) / GIGA, 3), "CPU s": round(got["cpu_s"]), "wall s": round(got["wall_s"]),
    }  # fmt: skip


# --- time, and what is read ---


def times(name: str, options: Namespace) -> list[dict[str, Any]]:
    """Streamed against resident, in pairs: perplexity, and prunings of fresh models."""

    def work(stream: bool, method: str | None) -> Callable[[], Any]:
        def run() -> Any:
            model = load(name, device="cpu", stream=stream)
            tokens = calibration(model, options.samples, options.length)
            if method is None:
                return perplexity(model, tokens).nll
            prune(model, method, sparsity=options.sparsity, calibration=tokens)
            return model.fingerprint()

        return run

    rows = []
    for method in (None, *options.methods):
        ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
        same = True
        for turn in range(options.pairs):
            works = {"streamed": work(True, method), "resident": work(False, method)}
            results, took = alternate(works, turn=turn)
            same &= results["streamed"] == results["resident"]
            for clock in ratios:
                ratios[clock].append(getattr(took["streamed"], clock) / getattr(took["resident"], clock))
        rows.append({
            "work": method or "perplexity", "pairs": options.pairs, "CPU time, streamed / resident":
            median(ratios["cpu"]), "wall time, streamed / resident": median(ratios["wall"]), "same to the bit": same,
        })  # fmt: skip
    return rows


def reads(name: str, options: Namespace) -> list[dict[str, Any]]:
    """Bytes read per pass over the model's bytes."""
    model = load(name, device="cpu", stream=True)
    assert isinstance(model, StreamedModel)
    tokens, total = calibration(model, options.samples, options.length), model.layout().parameters
    total *= model.dtype.itemsize
    variants = [DENSE, *(frozenset({Part(number, "attention")}) for number in model.numbers)]
    works: dict[str, Callable[[], Any]] = {
        "fingerprint": model.fingerprint,
        "perplexity": lambda: perplexity(model, tokens),
        f"a round of {len(variants)} variants": lambda: sweep(model, tokens.first(1), variants),
        f"the same, states of {1} MB in memory": lambda: sweep(model, tokens.first(1), variants, memory_bytes=10**6),
    }
    rows = []
    for what, work in works.items():
        before = model.bytes_read
        work()
        rows.append({"pass": what, "bytes read / the model's": (model.bytes_read - before) / total})
    return rows


# --- a model of 70B ---

LLAMA_70B = {
    "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
DISK, BUS = 3e9, 20e9  # bytes per second: an NVMe, PCIe 4
RATE = 60e12  # a 24 GB GPU's sustained operations per second in bfloat16
SOLVING_RATE = 25e12  # and in float32 without TF32, in which second moments are taken and maps are solved
SOLVING = ("slimgpt", "secateur")


def passes_of(method: str, blocks: int) -> float:
    """How often a method brings each block of a model of so many blocks in, counted on a tiny one."""
    sizes = {"num_hidden_layers": blocks, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config)
        model = load(folder, device="cpu", stream=True)
        assert isinstance(model, StreamedModel)
        tokens = Tokens.of(torch.randint(5, 64, (4, 16), generator=torch.Generator().manual_seed(0)))
        prune(model, method, sparsity=0.25, calibration=tokens, run=Run(0))
        return sum(times for part, times in model.openings.items() if part is not None) / blocks


def solving(planned: Plan, hidden: int) -> float:
    """Float32 operations of the FFNs' second moments (with a target, for two of them) and of optimal brain surgery."""
    if planned.method.name not in SOLVING:
        return 0.0
    total, tokens = 0.0, planned.samples * planned.length
    for number, before in planned.before.blocks.items():
        width = before.shape.width
        gone = width - planned.after.blocks[number].shape.width
        total += 2 * tokens * width * (width + hidden) + width**3  # an inverse by Cholesky
        for count in group_sizes(gone, "released"):
            width -= count
            total += count**3 / 3 + count**2 * width + 2 * count * width * (width + hidden)
    return total


def estimate(options: Namespace) -> list[dict[str, Any]]:
    """Hours for Llama-3-70B's shape at 25 %, each method's default calibration. Reading goes on beside computing."""
    config = LlamaConfig(**LLAMA_70B, architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False)
    model: Model = hollow(config, torch.bfloat16, {})
    model.is_streamed = True
    layout = model.layout()
    total = layout.parameters * 2
    rows = []
    for method in options.estimate_methods:
        planned = plan(Request(method=method, sparsity=0.25), model, device=torch.device("cuda"))
        operations = 2 * planned.meter.block_tokens * layout.block_parameters / len(layout.blocks)
        operations += 2 * planned.meter.head_tokens * model.vocab_size * model.hidden_size
        passes, forwards_h = passes_of(method, len(layout.blocks)), operations / RATE / 3600
        solves_h = solving(planned, model.hidden_size) / SOLVING_RATE / 3600
        read_h = passes * total / min(DISK, BUS) / 3600
        once_h = total / DISK / 3600
        compute_h = forwards_h + solves_h
        rows.append({
            "method": method, "passes over the model": round(passes, 1), "TB read": round(passes * total / 1e12, 1),
            "reading, h": round(read_h, 2), "forwards, h": round(forwards_h, 2), "moments and solves, h":
            round(solves_h, 2) if method in SOLVING else "", "one 24 GB GPU, h": round(max(read_h, compute_h), 2),
            "8 GPUs that hold it, h": round(once_h + compute_h, 2),
        })  # fmt: skip
    return rows


# --- all of it ---


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--blocks", type=int, default=62)
    made.add_argument("--hidden", type=int, default=1536)
    made.add_argument("--width", type=int, default=4096)
    made.add_argument("--vocab", type=int, default=8192)
    made.add_argument("--samples", type=int, default=4)
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--sparsity", type=float, default=0.1)
    made.add_argument("--methods", nargs="*", default=["2ssp", "slimgpt", "secateur"])
    made.add_argument("--estimate-methods", nargs="*", default=[], choices=list(methods()))
    made.add_argument("--growth", action="store_true", help="memory of small models by number and size of blocks")
    made.add_argument("--pairs", type=int, default=3)
    made.add_argument("--folder", type=Path, help="of the checkpoint, which is removed; of temporary files if none")
    made.add_argument("--worker", type=json.loads, help="used by the bench itself")
    options = made.parse_args(arguments)
    if options.worker:
        print(json.dumps(pruned_in_here(options.worker)))
        return
    report = Report("Streamed models", options)
    if options.blocks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            model = Path(folder) / "model"
            total = write_checkpoint(model, config_of(options.blocks, options.hidden, options.width, options.vocab))
            rows = [memory_row(model, total, method, options, _limit(total)) for method in options.methods]
        report.table(f"Peak memory, {options.samples} x {options.length} tokens, computed in float32", rows)
    if options.growth:
        report.table(f"Growth, {options.samples} x {options.length} tokens, no limit", growth(options))
    if options.model:
        rows = times(options.model, options)
        report.table(f"Time on {options.model}, {options.samples} x {options.length} tokens", rows)
        report.table("What is read", reads(options.model, options))
    if options.estimate_methods:
        report.table("A model of Llama-3-70B's shape: an estimate, not a measurement", estimate(options))
    report.close()


def growth(options: Namespace) -> list[dict[str, Any]]:
    """The same method on models with twice and four times the blocks, then on wider ones."""
    rows = []
    for blocks, hidden in ((8, 512), (16, 512), (32, 512), (8, 1024), (8, 1536)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            model = Path(folder) / "model"
            total = write_checkpoint(model, config_of(blocks, hidden, 11 * hidden // 4, 4096))
            small = Namespace(**{**vars(options), "vocab": 4096})
            rows += [memory_row(model, total, method, small, None) for method in options.methods]
    return rows


if __name__ == "__main__":
    main()
