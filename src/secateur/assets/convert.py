"""A GGUF file turned, once, into the safetensors checkpoint that everything else works on."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.errors import FetchError, MissingExtraError
from secateur.folders import disk_full_as_oserror

_PROBE_TOKENS = 16


def require_gguf() -> None:
    """Raise MissingExtraError unless the packages that read GGUF are here (asked before a long download)."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError.of(package, "demo", "converting the demo model")


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the model and tokenizer of `gguf` as a float32 checkpoint into the new folder `out`.

    Raises FetchError if the reloaded copy does not give the very same logits.
    """
    require_gguf()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

    folder, name = str(gguf.parent), gguf.name
    with _quiet():
        # Each parse of the vocabulary costs 6 s: hence the configuration is read once and handed on, and the
        # tokenizer class is named (AutoTokenizer would read the configuration again, and arrive at this one).
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            config=config,
            # Without this the weights can stay packed, and save_pretrained refuses.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=name)
        _tidy(model, tokenizer)
        with disk_full_as_oserror():
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
        _share_mode(out)
        expected = _probe(model)
        del model  # one copy in memory at a time
        copy = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
        actual = _probe(copy)
    if not torch.equal(expected, actual):
        difference = (expected - actual).abs().max().item()
        raise FetchError(
            f"the converted copy of {name} does not give the model's logits (off by {difference:.3g}); "
            "nothing was cached. Please report this with your versions of transformers, torch and gguf."
        )


def _tidy(model: Any, tokenizer: Any) -> None:
    """Drop what only tells of the conversion: names and paths that mean nothing to a later reader."""
    # GGUF's `general.name`, "Smollm2 135M 8k Lc100K Mix1 Ep2", under a key that transformers does not know.
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path
    for key in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(key, None)
    # GGUF has no such field, and the default, 1e30, hides overlong inputs.
    tokenizer.model_max_length = model.config.max_position_embeddings


def _probe(model: Any) -> Any:
    import torch

    ids = torch.arange(_PROBE_TOKENS).unsqueeze(0) % model.config.vocab_size  # (1, tokens)
    with torch.inference_mode():
        return model(ids).logits  # (1, tokens, vocabulary)


def _share_mode(folder: Path) -> None:
    """Give the weights the mode of the other files: safetensors writes 0600, and a cache may be shared."""
    mode = (folder / "config.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """As `quiet_transformers`, and the GGUF loader's own tqdm, which goes past transformers' switch.

    (Redirecting stderr instead would swallow the caller's progress display.)
    """
    import transformers.modeling_gguf_pytorch_utils as loader

    from secateur.hf import quiet_transformers

    tqdm = getattr(loader, "tqdm", None)
    if tqdm is not None:
        loader.tqdm = functools.partial(tqdm, disable=True)
    try:
        with quiet_transformers():
            yield
    finally:
        if tqdm is not None:
            loader.tqdm = tqdm
