"""The other side of bench/peers.py: prunes by another project's code, in that project's environment.

    python bench/peer_side.py optipfair JOB

JOB is a folder with `calibration.safetensors` (`ids`, samples x length) and `job.json`, which names the dense
checkpoint. `pruned.safetensors` gets the state dict that is left, by the dense model's names, and `pruned.json` what
was done and what it took. Nothing of secateur is imported.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

Done = tuple[nn.Module, str, dict[str, Any]]  # the pruned model, the peer's version, the options that it got


def optipfair(model: nn.Module, ids: Tensor, job: dict[str, Any]) -> Done:
    """Its data-driven score: activation norms times peak-to-peak magnitudes; one window a batch."""
    import optipfair

    options = {
        "pruning_type": "MLP_GLU", "neuron_selection_method": "MAW", "pruning_percentage": job["neurons_percent"]
    }  # fmt: skip
    batches = [{"input_ids": row} for row in ids.split(1)]
    pruned = optipfair.prune_model(model, **options, dataloader=batches, show_progress=False)
    return pruned, optipfair.__version__, options


def two_ssp(model: nn.Module, ids: Tensor, job: dict[str, Any]) -> Done:
    """The authors' function as it is. Its perplexity is fixed to CUDA and to windows of 2,048: both follow the job."""
    folder = Path(job["reference"])
    sys.path.insert(0, str(folder))
    sys.modules.setdefault("lm_eval", types.ModuleType("lm_eval"))  # its evaluation imports it; pruning needs none
    from src import pruning, utilities

    evaluate = utilities.evaluate_perplexity

    def perplexity(model: nn.Module, ids: Tensor, **_: Any) -> float:
        return evaluate(model, ids, seq_len=job["length"], enable_tqdm=False, device=ids.device)

    utilities.evaluate_perplexity = perplexity
    model.config.use_cache = False  # as the authors load it
    pruned = pruning.two_stage_2ssp(model, list(ids.split(1)), job["sparsity"])
    if pruned is False:
        raise SystemExit("the authors' code found the sparsity infeasible")
    return pruned, job["reference_sha256"], {"sparsity": job["sparsity"]}


PEERS = {"optipfair": optipfair, "2ssp-authors": two_ssp}


def main(name: str, folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    model = AutoModelForCausalLM.from_pretrained(job["dense"]).to(device, getattr(torch, job["dtype"])).eval()
    ids = load_file(folder / "calibration.safetensors")["ids"].to(device)
    tokens = 0

    def count(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += (named["input_ids"] if "input_ids" in named else given[0]).numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wall, cpu = time.perf_counter(), time.process_time()
    pruned, version, options = PEERS[name](model, ids, job)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, tensor in pruned.state_dict().items():
        if tensor.data_ptr() not in places:  # of tied tensors the first
            places.add(tensor.data_ptr())
            tensors[key] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "pruned.safetensors")
    cost = {
        "wall_s": wall, "cpu_s": cpu, "forwards": tokens / ids.shape[1],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }  # fmt: skip
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts = {"version": version, "options": options, "cost": cost, "versions": versions}
    (folder / "pruned.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
