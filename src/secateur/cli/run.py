"""`secateur run`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.guard import note, say


def run(
    file: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `secateur export --to gguf` wrote, or any GGUF file.")
    ],
    prompt: Annotated[str, typer.Option(help="What is continued.")],
    threads: Annotated[int | None, typer.Option(help="Of the processor; all of them if not given.", min=1)] = None,
    max_tokens: Annotated[int, typer.Option(help="How many tokens at most.", min=1)] = 64,
    context: Annotated[int, typer.Option(help="Room for the prompt and what follows it, in tokens.", min=1)] = 2048,
    timeout: Annotated[float, typer.Option(help="Seconds after which an engine without an answer is ended.")] = 3600,
) -> None:
    """Continue a text, greedily, in llama.cpp."""
    from secateur.engines.llama_cpp import generate
    from secateur.export.gguf import FILE

    generated = generate(
        file / FILE if file.is_dir() else file, prompt, max_tokens, context=context,
        threads=threads or os.cpu_count() or 1, patience_s=timeout,
    )  # fmt: skip
    say(generated.text)
    if generated.tokens_per_second:
        note(f"{generated.tokens_per_second:.1f} tokens per second")
