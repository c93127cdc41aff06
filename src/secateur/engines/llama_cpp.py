"""llama.cpp, through the package xllamacpp, in a process of its own: a failed assertion in it ends the process.

What it computes is asked for by token ids, so that it can be compared with what transformers computes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event, Timer
from typing import IO, Any

from secateur.errors import CheckpointError, EngineError, MissingExtraError

_WORKER = Path(__file__).with_name("llama_cpp_worker.py")
_LAST_WORDS = 1500  # characters of its log that an error shows
PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Generated:
    """A greedy continuation.

    Attributes:
        tokens_per_second: of the tokens after the first; None where there were none.
    """

    text: str
    tokens_per_second: float | None


class LlamaCpp:
    """A model in llama.cpp; see `running`."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str], patience_s: float) -> None:
        self._process, self._log, self._patience_s = process, log, patience_s

    def log_probabilities(self, ids: Sequence[int], top: int) -> dict[int, float]:
        """Natural log-probabilities of the `top` likeliest tokens after `ids`, by id."""
        return {int(number): value for number, value in self._ask("next_tokens", ids=list(ids), top=top)}

    def greedy(self, prompt: str | Sequence[int], max_tokens: int) -> Generated:
        """The likeliest token, again and again."""
        answer = self._ask("greedy", prompt=prompt if isinstance(prompt, str) else [list(prompt)], tokens=max_tokens)
        timings = answer["timings"] or {}
        return Generated(answer["text"], timings.get("predicted_per_second"))

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            special: put what the tokenizer puts around a text.
        """
        return [int(number) for number in self._ask("tokenize", text=text, special=special)]

    def losses(self, ids: Sequence[int], vocabulary: int) -> list[float]:
        """-ln of the probability of each token after the first, given those before it; a call per token.

        Args:
            vocabulary: how many ids there are.
        """
        return [self._loss(ids[:place], ids[place], vocabulary) for place in range(1, len(ids))]

    def _loss(self, ids: Sequence[int], then: int, vocabulary: int) -> float:
        found: float | None = self._ask("log_probability", ids=list(ids), then=then)
        return -(self.log_probabilities(ids, vocabulary)[then] if found is None else found)

    def _ask(self, what: str, **job: Any) -> Any:
        return self._send({"ask": what, **job})

    def _send(self, job: dict[str, Any]) -> Any:
        """Raises EngineError: it died, gave no answer in time, or said that something is wrong."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = Timer(self._patience_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line and late.is_set():
            raise EngineError(f"llama.cpp gave no answer in {self._patience_s:g} s and was ended: {self._last_words()}")
        if not line:
            raise EngineError(f"llama.cpp ended by itself (exit code {self._process.wait()}): {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"llama.cpp: {answer['error']}. Its log ends: {self._last_words()}")
        return answer["result"]

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-_LAST_WORDS:].strip()


@contextmanager
def running(file: Path, *, context: int = 512, threads: int = 1, patience_s: float = PATIENCE_S) -> Iterator[LlamaCpp]:
    """Start llama.cpp on a GGUF file, and end it with the context. Computes on the CPU.

    Args:
        context: tokens that a text may have.
        patience_s: seconds in which it must have loaded the file, and then given each answer.

    Raises:
        MissingExtraError: xllamacpp is not installed.
        CheckpointError: there is no such file.
        EngineError: llama.cpp cannot load it, died, or gave no answer in time; with the end of its log.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingExtraError.of("xllamacpp", "llama-cpp", "running llama.cpp")
    if not file.is_file():
        raise CheckpointError(f"{file} is not there; `secateur export MODEL --to gguf --out DIR` writes such a file")
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            encoding="utf-8", env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        try:
            engine = LlamaCpp(process, log, patience_s)
            engine._send({"file": str(file), "context": context, "threads": threads})
            yield engine
        finally:
            process.kill()  # it has nothing to save
            process.communicate()


def generate(
    gguf: Path, prompt: str, max_tokens: int, *, context: int = 2048, threads: int = 1, patience_s: float = PATIENCE_S
) -> Generated:
    """Greedy continuation of a text by a GGUF file. Raises what `running` raises."""
    with running(gguf, context=context, threads=threads, patience_s=patience_s) as engine:
        return engine.greedy(prompt, max_tokens)
