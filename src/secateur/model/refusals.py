"""What secateur cannot prune, reason by reason, each with the way out. Asked before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from secateur.errors import CheckpointError, SecateurError, UnsupportedModelError
from secateur.model.described import Description
from secateur.model.modeling_secateur import FAMILIES

# How configurations spell the number of experts, and blocks that are no attention.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MIXERS = ("layer_types", "layers_block_type", "block_types")
_MIXER = re.compile(r"linear|mamba|recurr|conv|ssm|hybrid|rwkv|delta")
_MODES = ("text", "vision", "audio", "thinker", "talker", "llm", "language")  # with "_config" behind
_STATE_SPACE = re.compile(r"mamba_|ssm_|linear_(num_(key|value)_heads|conv_kernel)|conv_L_cache$")
_EXPERT_TYPES = {"dbrx", "switch_transformers", "nllb-moe"}  # nothing in their own configuration's top level says so
_STATE_SPACE_TYPES = {"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "lfm2", "zamba"}
_COMPUTED = {torch.bfloat16, torch.float16, torch.float32, torch.float64}

Check = Callable[[Description], str | None]  # the rest of a sentence that begins with the model's name


# --- by its configuration --------------------------------------------------------------------------------------------


def _encoder_decoder(about: Description) -> str | None:
    if about.config.get("is_encoder_decoder") is not True:
        return None
    return f"is an encoder-decoder ({_type(about)}); secateur prunes decoder-only models: {_families()}"


def _multimodal(about: Description) -> str | None:
    config = about.config
    parts = [key for key in config if key.endswith("_config") and isinstance(config[key], Mapping)]
    modal = [key for key in parts if key.startswith(_MODES)]
    if not modal:
        return None
    texts = ("text_config", "llm_config", "language_config")
    kind = Description("", next((config[key] for key in texts if key in modal), {})).type
    says = f"is a multimodal model ({_type(about)} with {', '.join(sorted(modal))})"
    if kind not in FAMILIES:
        inner = f", of type '{kind}'," if kind else ""
        return f"{says}, and the text model inside{inner} is not supported either; supported: {_families()}"
    out = f"{Path(about.name).name}-text"
    return (
        f"{says}. The text model inside, a {kind}, can be saved alone and pruned: "
        f'python -c "from transformers import AutoModelForCausalLM as C, AutoModelForImageTextToText as M; '
        f"m = M.from_pretrained({about.name!r}); t = C.from_config(m.config.get_text_config(), dtype=m.dtype); "
        "t.model.load_state_dict(m.model.language_model.state_dict()); "
        f't.lm_head.load_state_dict(m.lm_head.state_dict()); t.save_pretrained({out!r})", and its tokenizer beside it'
    )


def _mixture_of_experts(about: Description) -> str | None:
    numbers = {key: about.config.get(key) for key in _EXPERTS}
    count = next((f"{key}={n}" for key, n in numbers.items() if isinstance(n, int) and n > 0), None)
    if count is None and about.type not in _EXPERT_TYPES:
        return None
    said = _type(about) + (f", {count}" if count else "")
    return f"is a mixture of experts ({said}), whose FFNs are not pruned yet; take a dense model: {_families()}"


def _state_space(about: Description) -> str | None:
    config = about.config
    kinds = {str(kind) for key in _MIXERS for kind in _list(config.get(key)) if _MIXER.search(str(kind))}
    keys = sorted(key for key in config if _STATE_SPACE.match(key) and config[key] is not None)
    if not (kinds or keys or about.type in _STATE_SPACE_TYPES):
        return None
    said = ", ".join([_type(about), *sorted(kinds)] if kinds else [_type(about), *keys[:1]])
    return (
        f"has blocks of linear attention, recurrence or state space ({said}), which are not pruned yet; "
        f"take a model whose blocks are all attention and MLP: {_families()}"
    )


def _quantised(about: Description) -> str | None:
    config = about.config
    settings = next(
        (config[key] for key in ("quantization_config", "compression_config", "quantization") if config.get(key)), None
    )
    method = None
    if settings is not None:
        stated = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
        method = str(getattr(stated.get("quant_method"), "value", stated.get("quant_method") or "unknown method"))
    elif about.has("quantize_config.json"):
        method = "gptq"
    elif about.has("quant_config.json"):
        method = "awq"
    if method is None:
        return None
    return (
        f"is quantised ({method}): packed weights have no rows to remove. Prune the base model"
        f"{_named(base_model(about))} and quantise the result"
    )


def unknown_type(about: Description) -> str | None:
    kind = about.type
    if kind in CONFIG_MAPPING:  # then transformers' own class is used, whatever lies in the checkpoint
        return None
    if about.config.get("auto_map"):
        return (
            f"brings its own code for a model type '{kind}' that transformers does not have. secateur never runs a "
            f"checkpoint's code; supported: {_families()}"
        )
    return (
        f"is of a type '{kind}' that this version of transformers does not know; supported: {_families()}. "
        "If it is a new one, update transformers"
    )


ARCHITECTURE: tuple[Check, ...] = (_encoder_decoder, _multimodal, _mixture_of_experts, _state_space, _quantised)


# --- by its files ----------------------------------------------------------------------------------------------------


def adapter(about: Description) -> str | None:
    settings = about.json("adapter_config.json")
    if settings is None:
        return None
    base, out = settings.get("base_model_name_or_path"), f"{Path(about.name).name}-merged"
    tokenizer = f"T.from_pretrained({base!r}).save_pretrained({out!r})" if base else ""
    return (
        f"is a PEFT adapter{f' of {base}' if base else ''}, no whole model. Merge it (pip install peft), then prune "
        f'{out}: python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as '
        f'T; M.from_pretrained({about.name!r}).merge_and_unload().save_pretrained({out!r}); {tokenizer}". '
        "If it is merged already, take adapter_config.json away"
    )


def _gguf(about: Description) -> str | None:
    if not about.has("*.gguf") or about.has("config.json"):
        return None
    return (
        "holds GGUF files, which are made for llama.cpp and mostly quantised. Prune the model that they were made "
        f"from{_named(base_model(about))}, in safetensors, and convert the result"
    )


def _no_config(about: Description) -> str | None:
    if about.file("config.json"):
        return None
    return "is no model: it has no config.json"


def _pickle(about: Description) -> str | None:
    if about.has("*.safetensors") or not (about.has("*.bin") or about.has("*.pt*")):
        return None
    out = f"{Path(about.name).name}-safetensors"
    return (
        "has its weights as pickles only, which can hold code, so secateur does not read them. If you trust their "
        f'maker, convert it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained({about.name!r}, use_safetensors=False).save_pretrained({out!r}); "
        f'T.from_pretrained({about.name!r}).save_pretrained({out!r})"'
    )


# --- by what was handed in, in memory ---------------------------------------------------------------------------------


def not_a_model(given: Any) -> str | None:
    """Why an object is no transformers model that can be pruned, and what would be right; None for one that may be."""
    if isinstance(given, nn.Module):
        return _wrapped(given) or _with_foreign_parts(given)
    if given is None:
        return f"no model was given (None); {_ACCEPTED}"
    if isinstance(given, type):
        return f"{given.__name__} is a class; give what its from_pretrained returns: {_ACCEPTED}"
    if isinstance(given, PreTrainedTokenizerBase):
        return f"{type(given).__name__} is a tokenizer, to be given as `tokenizer`; for the model {_ACCEPTED}"
    if isinstance(given, (PreTrainedConfig, Mapping)):
        return f"{type(given).__name__} is no model, only what belongs to one; {_ACCEPTED}"
    inside = getattr(given, "model", None)
    if isinstance(inside, nn.Module) or isinstance(getattr(inside, "hf", None), nn.Module):
        return f"{type(given).__name__} is no model but holds one; give its `model`"
    return f"{type(given).__name__} is no transformers model; {_ACCEPTED}"


_ACCEPTED = "give a folder, a hub id, `demo`, what `secateur.load` returns, or a model of AutoModelForCausalLM"


def _wrapped(given: nn.Module) -> str | None:
    is_a = f"{type(given).__name__} is"
    if "_orig_mod" in given._modules:
        return f"{is_a} compiled, and what is compiled cannot shrink; give its `_orig_mod`, and compile what comes out"
    if _of_peft(given):
        return f"{is_a} a PEFT adapter around a model; merge it (merge_and_unload), then prune what that returns"
    if isinstance(given, PreTrainedModel):
        return None
    for name in ("module", "pretrained_model"):
        if isinstance(given._modules.get(name), nn.Module):
            return f"{is_a} a wrapper; give the model inside, its `{name}`"
    return f"{is_a} no transformers model; {_ACCEPTED}"


def _with_foreign_parts(hf: Any) -> str | None:
    kind = f"this {type(hf).__name__}"
    if getattr(hf, "_hf_peft_config_loaded", False) or any(map(_of_peft, hf.modules())):
        return f"{kind} carries a PEFT adapter; merge it (its wrapper's merge_and_unload), then prune what that returns"
    if any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in hf.modules()):
        return f"{kind} is compiled, or parts of it are, and cannot shrink; load it again, prune it, then compile"
    if any(type(parameter).__name__ == "DTensor" for parameter in hf.parameters()):
        return f"{kind} is spread over processes (FSDP, tensor parallelism); load it whole, in one process"
    packed = {parameter.dtype for parameter in hf.parameters()} - _COMPUTED
    if packed and not getattr(hf.config, "quantization_config", None):  # of which more can be said
        return f"{kind} has weights in {min(map(str, packed))[6:]}; give it in bfloat16, float16 or float32"
    mixed = {str(parameter.dtype)[6:] for parameter in hf.parameters() if parameter.dim() > 1}
    if len(mixed) > 1 and not packed:  # norms may be kept in float32
        return f"{kind} has matrices in {' and '.join(sorted(mixed))}; cast it to one of them, as .to(torch.float32)"
    return None


def _of_peft(part: object) -> bool:
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(part).__mro__)


def require_weights(hf: Any, name: str = "this model") -> None:
    """Raise UnsupportedModelError for a model whose weights, or some of them, are not there."""
    if not any(parameter.is_meta for parameter in hf.parameters()):
        return
    if hasattr(hf, "hf_device_map"):
        raise UnsupportedModelError(
            f"{name} does not fit on the devices, so parts of it were put aside (offloaded), where they cannot be "
            "pruned; use more or larger devices, a smaller dtype, or the device cpu"
        )
    raise UnsupportedModelError(f"{name} lies on `meta`, without weights; load it by from_pretrained")


# --- asked -----------------------------------------------------------------------------------------------------------


def refuse(about: Description, *checks: Check, error: type[SecateurError] = UnsupportedModelError) -> None:
    """Raise the error where one of the checks has something against the model, with the reason and the way out."""
    for check in checks:
        if says := check(about):
            raise error(f"{about.name} {says}")


def refuse_files(about: Description) -> None:
    """Raise where the files of a folder, or those listed of a hub model, are no model that can be read.

    Raises:
        UnsupportedModelError, CheckpointError.
    """
    refuse(about, adapter, _gguf)
    refuse(about, _no_config, _pickle, error=CheckpointError)


def base_model(about: Description) -> str | None:
    """The model that a checkpoint was made from, as far as its card or configuration tells."""
    candidates: list[Any] = []
    try:
        if card := about.file("README.md"):
            candidates += _list((metadata_load(card) or {}).get("base_model"))
    except Exception:  # a card is free text: whatever hub and YAML make of it only serves a better message
        candidates = []
    candidates += [about.config.get(key) for key in ("base_model_name_or_path", "_name_or_path")]
    found = (str(each) for each in candidates if isinstance(each, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", each))
    return next((each for each in found if each != about.name), None)


def _named(base: str | None) -> str:
    return f" ({base})" if base else ""


def _type(about: Description) -> str:
    return f"type '{about.type}'"


def _families() -> str:
    return ", ".join(sorted(FAMILIES))


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else [value] if value is not None else []
