"""The other side of bench/vllm_parity.py: reads each checkpoint of a folder by vLLM, in vLLM's own environment.

    .venv-vllm/bin/python bench/vllm_side.py FOLDER

FOLDER/job.json lists checkpoints, for each the dtype and which of vLLM's models is to read it (`model_impl`), and token
ids. Beside each checkpoint NAME, `NAME.json` gets the log-probability of every token after the first, those that are
generated greedily, or the error. vLLM is imported once; each checkpoint is
read in a process of its own, which may die. Nothing of secateur is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
    "VLLM_TARGET_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def read(folder: Path, settings: dict[str, str], ids: list[int], new: int) -> dict[str, Any]:
    """What vLLM makes of a checkpoint: log-probabilities of `ids`, then `new` greedy tokens and theirs."""
    import torch
    import vllm

    torch.compiler.set_stance("force_eager")  # the sampler's compilation takes longer than all the rest
    model = vllm.LLM(
        model=str(folder), skip_tokenizer_init=True, trust_remote_code=True, enforce_eager=True,
        max_model_len=64, max_num_seqs=2, disable_log_stats=True, **settings,
    )  # fmt: skip
    asked = vllm.SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, prompt_logprobs=0, logprobs=0, detokenize=False
    )
    (answer,) = model.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    given = [each[token].logprob for token, each in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)]
    (out,) = answer.outputs
    drawn = [each[token].logprob for token, each in zip(out.token_ids, out.logprobs, strict=True)]
    return {"prompt": given, "new": list(out.token_ids), "new_logprobs": drawn}


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    import torch
    import transformers
    import vllm

    versions = {each.__name__: str(each.__version__) for each in (vllm, torch, transformers)}
    (folder / "versions.json").write_text(json.dumps(versions))
    for name, settings in job["checkpoints"].items():
        began, child = time.perf_counter(), os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            found = read(folder / name, settings, job["ids"], job["new"])
        except BaseException as error:  # whatever vLLM says is a result
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        found["seconds"] = round(time.perf_counter() - began, 1)
        (folder / f"{name}.json").write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # vLLM's threads end with it


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    main(Path(sys.argv[1]))
