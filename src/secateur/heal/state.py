"""A recovery's checkpoints in its run folder, from which an interrupted one goes on: safetensors and JSON, no pickle.

It holds a folder `checkpoint-N` with `training.safetensors` (the weights that are trained, AdamW's moments, the
generators' states; in its header, as JSON, the optimizer's groups and the schedule), Trainer's own
`trainer_state.json`, and the sums of both: a damaged one is refused.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from secateur.assets.cache import sha256_of
from secateur.errors import CheckpointError
from secateur.folders import disk_full_as_oserror, new_folder
from secateur.journal import Identity, claimed_run
from secateur.model.described import SUMS, Description, verify_weights, write_sums

_TENSORS, _STATE = "training.safetensors", "trainer_state.json"
_PREFIX = "checkpoint-"


@contextmanager
def opened(folder: Path | None, identity: Identity, *, overwrite: bool) -> Iterator[Path]:
    """The run folder of this job, made or taken up again; one that vanishes if None.

    Args:
        overwrite: another job's checkpoints there are thrown away.

    Raises:
        What `claimed_run` raises.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place)
        return
    with claimed_run(folder, identity, overwrite=overwrite):
        yield folder


def newest(folder: Path) -> Path | None:
    """The last checkpoint in it.

    Raises:
        CheckpointError: it is damaged.
    """
    last = get_last_checkpoint(folder)
    if not last:
        return None
    try:
        whole = verify_weights(Description(last, {}, Path(last)))
    except CheckpointError as error:
        raise CheckpointError(f"{last} is damaged ({error}); remove it") from error
    if not whole:
        raise CheckpointError(f"{last} is damaged (it has no {SUMS}); remove it")
    return Path(last)


# --- its checkpoints ---


def write(run: Path, model: nn.Module, optimizer: Any, scheduler: Any, state: TrainerState) -> None:
    """Write a checkpoint of this step into `run`, whole or not at all; older ones go."""
    moments = optimizer.state_dict()
    tensors = {f"trained/{name}": weight.detach() for name, weight in _trained(model).items()}
    for number, values in moments["state"].items():
        tensors |= {f"optimizer/{number}/{name}": value for name, value in values.items()}
    tensors |= {f"rng/{device}": value for device, value in _generators().items()}
    header = {"optimizer": json.dumps(moments["param_groups"]), "scheduler": json.dumps(scheduler.state_dict())}
    folder = run / f"{_PREFIX}{state.global_step}"
    with new_folder(folder, overwrite=True) as partial, disk_full_as_oserror():
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial / _TENSORS, metadata=header)
        state.save_to_json(str(partial / _STATE))
        write_sums(partial, {name: sha256_of(partial / name) for name in (_TENSORS, _STATE)})
    for other in run.glob(f"{_PREFIX}*"):
        if other != folder:
            shutil.rmtree(other)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def read_history(checkpoint: Path) -> TrainerState:
    """Trainer's own state.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return TrainerState.load_from_json(str(checkpoint / _STATE))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} is damaged ({error}); remove it") from error


def read_trained(checkpoint: Path, model: nn.Module) -> None:
    """Give what is trained of the model the stored values.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    stored, _ = _read(checkpoint)
    trained = _trained(model)
    weights = _under("trained/", stored)
    if weights.keys() != trained.keys() or any(weights[name].shape != trained[name].shape for name in trained):
        raise CheckpointError(f"{checkpoint} is of another model; remove it")
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(weights[name])


def read_optimizer(checkpoint: Path, optimizer: Any, scheduler: Any) -> None:
    """Give optimizer and schedule the stored state."""
    stored, header = _read(checkpoint)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _under("optimizer/", stored).items():
        number, _, moment = name.partition("/")
        moments.setdefault(int(number), {})[moment] = value
    groups = json.loads(header["optimizer"])
    for group in groups:
        group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    scheduler.load_state_dict(json.loads(header["scheduler"]))


def read_generators(checkpoint: Path) -> None:
    """Set torch's shared generators, from which dropout draws."""
    for device, state in _under("rng/", _read(checkpoint)[0]).items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(device) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(device))


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {str(number): state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(checkpoint / _TENSORS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint} is damaged ({error}); remove it") from error
