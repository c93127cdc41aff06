"""The other side of bench/engine_speed.py: times checkpoints in vLLM in turn, in vLLM's own environment.

    .venv-vllm/bin/python bench/vllm_speed_side.py FOLDER

FOLDER/job.json names the checkpoints, vLLM's model to read them with, the lengths and the rounds; FOLDER/speeds.json
gets for each the tokens per second of processor time by round, or the error. Each lives in a process of its own, as
long as the rest; one works at a time. Nothing of secateur is imported.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from vllm_side import SETTINGS

CACHE = 256 << 20  # bytes


def serve(folder: Path, model_impl: str, job: dict[str, Any], pipe: Any) -> None:
    """Answer each number of a round with (prompt tokens per second, new tokens per second); then end."""
    import torch
    import vllm

    torch.compiler.set_stance("force_eager")
    torch.set_num_threads(1)
    try:
        model = vllm.LLM(
            model=str(folder), skip_tokenizer_init=True, trust_remote_code=True, dtype="float32", enforce_eager=True,
            max_model_len=job["prompt"] + 8, max_num_seqs=1, model_impl=model_impl, disable_log_stats=True,
            enable_prefix_caching=False, kv_cache_memory_bytes=CACHE,
        )  # fmt: skip

        def seconds(length: int, new: int, seed: int) -> float:
            ids = [random.Random(seed).randrange(5, job["vocabulary"]) for _ in range(length)]
            asked = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
            began = time.process_time()
            model.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
            return time.process_time() - began

        pipe.send({"threads": torch.get_num_threads()})
        while (number := pipe.recv()) is not None:
            first = seconds(8, 1, number)
            rest = seconds(8, 1 + job["new"], number) - first
            pipe.send((job["prompt"] / seconds(job["prompt"], 1, number), job["new"] / rest))
    except BaseException as error:  # whatever vLLM says is a result
        pipe.send({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # vLLM's threads end with it


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    import vllm

    fork = multiprocessing.get_context("fork")
    speeds: dict[str, Any] = {}
    pipes: dict[str, Any] = {}
    for name, model_impl in job["checkpoints"].items():
        here, there = fork.Pipe()
        fork.Process(target=serve, args=(folder / name, model_impl, job, there), daemon=True).start()
        there.close()
        speeds[name] = here.recv()
        if "error" not in speeds[name]:
            pipes[name] = here
            speeds[name] |= {"prompt": [], "new": []}
    for number in range(-1, job["rounds"]):  # the first warms up
        names = list(pipes)
        for name in reversed(names) if number % 2 else names:
            pipes[name].send(number)
            prompt, new = pipes[name].recv()
            if number >= 0:
                speeds[name]["prompt"].append(prompt)
                speeds[name]["new"].append(new)
    for pipe in pipes.values():
        pipe.send(None)
    (folder / "speeds.json").write_text(json.dumps({"version": vllm.__version__, "speeds": speeds}))


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    del os.environ["VLLM_CPU_KVCACHE_SPACE"]  # in whole GiB, for each of the models
    main(Path(sys.argv[1]))
