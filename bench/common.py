"""What the benches share: models by name or made up, the machine in words, tables as Markdown and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import secateur
from secateur.engine import loss
from secateur.engine.sweep import Variant, altered
from secateur.engine.tokens import Tokens, read_tokens
from secateur.model.handle import Model
from secateur.run import Run

MEGA = 1e6
_MADE_UP = {"blocks": 8, "hidden": 256, "heads": 4, "kv_heads": 2, "width": 0, "vocab": 8192, "seed": 0}
MODEL = "a name that secateur knows, or random:blocks=8,hidden=256,..."


def made_up_config(name: str) -> LlamaConfig:
    """The Llama configuration that `random:blocks=8,hidden=256,...` describes; width 0 is 8/3 of hidden, as Llama's."""
    given = dict(pair.split("=") for pair in name.partition(":")[2].split(",") if pair)
    if unknown := given.keys() - _MADE_UP.keys():
        raise SystemExit(f"{name}: unknown {', '.join(sorted(unknown))}; known: {', '.join(_MADE_UP)}")
    sizes = _MADE_UP | {key: int(value) for key, value in given.items()}
    config = LlamaConfig(
        num_hidden_layers=sizes["blocks"],
        hidden_size=sizes["hidden"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["width"] or round(8 * sizes["hidden"] / 3),
        vocab_size=sizes["vocab"],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    return config


def load_model(name: str, dtype: str = "auto") -> Model:
    """A model by any name that secateur knows, or `random:...`: made up from a configuration, without a tokenizer."""
    if not name.startswith("random"):
        return secateur.load(name, device="cpu", dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return Model(AutoModelForCausalLM.from_config(made_up_config(name), dtype=kind), source={"name": name})


def calibration(model: Model, samples: int, length: int, text: str = "demo") -> Tokens:
    """Calibration windows; random ids where the model has no tokenizer."""
    if model.tokenizer is not None:
        return read_tokens(model, text, purpose="calibration", samples=samples, length=length)
    generator = torch.Generator().manual_seed(0)
    return Tokens.of(torch.randint(5, model.vocab_size, (samples, length), generator=generator))


def windows(model: Model, text: str, samples: int, length: int, options: argparse.Namespace, *, purpose: Any) -> Tokens:
    """So many windows of a text; random ids where the model has no tokenizer."""
    if model.tokenizer is None:
        return calibration(model, samples, min(length, options.length))
    return read_tokens(model, text, purpose=purpose, samples=samples, length=length, data=options.data)


@torch.no_grad()
def whole(model: Model, tokens: Tokens, variant: Variant, metric: loss.Metric, run: Run) -> float:
    """The mean loss without these parts, where every token counts: mute them, run the whole model, a window at a time,
    its logits in chunks."""
    inner = model.hf.get_submodule(model.family.blocks.rpartition(".")[0])
    head = model.hf.get_output_embeddings()
    chunk = max(1, loss.LOGIT_BYTES // (4 * model.vocab_size))
    total = 0.0
    with ExitStack() as stack:
        for number in sorted({part.block for part in variant}):
            block = stack.enter_context(model.open(number))
            stack.enter_context(altered(block, [part for part in variant if part.block == number]))
        for sample, ids in enumerate(tokens.ids.split(1)):
            states = inner(input_ids=ids, use_cache=False).last_hidden_state[0]  # (length, hidden), normed
            run.meter.block_tokens += tokens.length * len(model.numbers)
            for start in range(0, tokens.length - 1, chunk):
                positions = slice(start, min(start + chunk, tokens.length - 1))
                targets = ids[0, positions.start + 1 : positions.stop + 1]
                prepared = metric.prepare(model, sample, positions)
                total += float(metric.loss(head(states[positions]).float(), targets, prepared).double().sum())
                run.meter.head_tokens += len(targets)
    return total / (tokens.samples * (tokens.length - 1))


@dataclass(frozen=True)
class Seconds:
    """What a piece of work took: by the clock, and of processor time, which other programs on the machine disturb less
    (it counts all threads, waiting ones too: compare it between runs of one thread only)."""

    wall: float
    cpu: float


def alternate(works: Mapping[str, Callable[[], Any]], *, turn: int) -> tuple[dict[str, Any], dict[str, Seconds]]:
    """Run each work once, in an order that changes with `turn`; their results and what they took, by name."""
    names = list(works)
    results, took = {}, {}
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        wall, cpu = time.perf_counter(), time.process_time()
        results[name] = works[name]()
        took[name] = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
    return results, took


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> str:
    """Processor, cores, threads and versions, in one line."""
    cpu = platform.processor() or platform.machine()
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        cpu = cpu.partition(":")[2].strip()
    except (OSError, StopIteration):
        pass  # not Linux
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s); Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


@dataclass
class Report:
    """A bench's tables: printed as Markdown as they are added, written as JSON at the end if asked."""

    title: str
    options: argparse.Namespace
    content: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.content["command"] = " ".join(["python", *sys.argv])
        self.content["machine"] = machine()
        self.content["load"] = [round(load, 2) for load in os.getloadavg()]
        print(f"## {self.title}\n\n`{self.content['command']}`  ")
        print(f"{self.content['machine']}; load {os.getloadavg()[0]:.1f}")

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of one table; the keys of the first are its columns."""
        self.content[name] = [dict(row) for row in rows]
        columns = list(rows[0])
        print(f"\n{name}\n")
        print("| " + " | ".join(columns) + " |")
        print("|" + "---|" * len(columns))
        for row in rows:
            print("| " + " | ".join(_cell(row.get(column)) for column in columns) + " |")
        print(flush=True)

    def say(self, name: str, value: Any, words: str) -> None:
        """A figure outside the tables."""
        self.content[name] = value
        print(words, flush=True)

    def close(self) -> None:
        if self.options.json:
            self.options.json.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benches have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo", help=MODEL)
    made.add_argument("--json", type=Path, help="write the figures to this file too")
    return made


def folder_parser(description: str | None, *, out: str, samples: int, length: str) -> argparse.ArgumentParser:
    """A parser with the options of the benches that write a folder of results, a JSON file each."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="demo", help=MODEL)
    made.add_argument("--data", type=Path, help="folder with the named texts")
    made.add_argument("--out", type=Path, default=Path("docs/results") / out)
    made.add_argument("--samples", type=int, default=samples)
    made.add_argument("--length", type=int, default=2048, help=length)
    return made


def write(path: Path, found: Mapping[str, Any]) -> None:
    """A result, with the machine that it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)
