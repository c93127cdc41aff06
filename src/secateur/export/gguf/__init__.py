"""GGUF: one file with weights, sizes and tokenizer, for llama.cpp and what is built on it.

architectures   which of llama.cpp's architectures can hold which family: the table
choice          the one that is taken, or why none can be
tensors         the weights by its names, with stubs where llama.cpp cannot do without a module
metadata        sizes, positions, origin
vocabulary      the tokenizer
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.assets.cache import sha256_of
from secateur.errors import NumericalError, UnknownNameError
from secateur.export.gguf.architectures import ROUND, Architecture
from secateur.export.gguf.choice import choose
from secateur.export.gguf.metadata import FILE_TYPES, add_origin, add_sizes
from secateur.export.gguf.tensors import tensors
from secateur.export.gguf.vocabulary import Vocabulary, add_vocabulary, vocabulary
from secateur.model.handle import Model

TYPES = tuple(FILE_TYPES)
FILE = "model.gguf"
NEEDS = "gguf"  # the package that writes; its extra has the same name
LIBRARY = "gguf"  # as the hub calls it
USAGE = """```
secateur run DIR --prompt "Once upon a time"
llama-cli -m DIR/model.gguf -p "Once upon a time"
llama-server -m DIR/model.gguf
```

llama.cpp was run with this form as `secateur run` runs it; the other two commands are written, not run."""
_QUANTISED = ("q4_0", "q8_0")
ROWS = 32  # numbers that share a scale: rows of quantised types are a multiple of it
_LARGEST_HALF = 65504.0


def refuses(model: Model, *, type: str = "f16") -> str | None:
    """Why llama.cpp cannot hold the model exactly, its weights' type aside: the rest of a sentence that begins with its
    name.

    Args:
        type: how weights are kept, one of `TYPES`; quantised types want rows of a multiple of 32.

    Raises:
        UnknownNameError: no such type.
    """
    if type not in TYPES:
        raise UnknownNameError.of("type", type, TYPES)
    words, architecture = _words(model), choose(model)
    if isinstance(architecture, str):
        return architecture
    return words if isinstance(words, str) else _refuses_type(model, architecture, type)


def write(model: Model, folder: Path, *, type: str = "f16") -> dict[str, str]:
    """Write the model and its tokenizer into `model.gguf`, one file of any size.

    Matrices are kept in `type`; norms, biases and frequencies in float32; embedding and head in q8_0 where the others
    are in q4_0. Blocks are opened one after another.

    Raises:
        NumericalError: a weight is too large for float16.
    """
    architecture, words = choose(model), _words(model)
    assert not isinstance(architecture, str)  # `refuses` was asked
    assert not isinstance(words, str)
    _write(model, architecture, words, folder / FILE, type)
    return {FILE: sha256_of(folder / FILE)}


def nbytes(model: Model, *, type: str = "f16") -> int:
    architecture = choose(model)
    assert not isinstance(architecture, str)
    return sum(_stored(name, tensor, type)[1] for name, tensor in tensors(model.hollow(), architecture))


def loads_in(model: Model) -> str:
    return "llama.cpp (`secateur run`) and what is built on it"


def _write(model: Model, architecture: Architecture, words: Vocabulary, file: Path, type: str) -> None:
    import gguf
    import numpy

    with closing(gguf.GGUFWriter(file, architecture.name)) as writer:
        add_origin(writer, model, type, as_phi_3=words.as_phi_3)
        add_sizes(writer, model, architecture)
        add_vocabulary(writer, words)
        for name, tensor in tensors(model.hollow(), architecture):
            kept, size = _stored(name, tensor, type)
            writer.add_tensor_info(name, tuple(tensor.shape), numpy.dtype(numpy.float32), size, raw_dtype=kept)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors(model, architecture):
            writer.write_tensor_data(packed(name, tensor.cpu(), type_of(name, tensor, type)))


def type_of(name: str, tensor: Tensor, type: str) -> str:
    """How one tensor is kept where matrices are kept in `type`."""
    if tensor.dim() < 2 or name.startswith("position_embd"):
        return "f32"
    return "q8_0" if type == "q4_0" and name in ("token_embd.weight", "output.weight") else type


def _stored(name: str, tensor: Tensor, type: str) -> tuple[Any, int]:
    """gguf's own type of a tensor, and the bytes that it takes."""
    import gguf

    kept = gguf.GGMLQuantizationType[type_of(name, tensor, type).upper()]
    group, size = gguf.GGML_QUANT_SIZES[kept]  # numbers, and the bytes that they take
    return kept, tensor.numel() // group * size


def packed(name: str, tensor: Tensor, kept: str) -> Any:
    """A float32 tensor's numbers as they lie in the file: numpy, of one byte where they are packed.

    Raises:
        NumericalError: float16 cannot hold it.
    """
    import gguf

    if kept == "f16" and tensor.numel() and tensor.abs().max() > _LARGEST_HALF:
        raise NumericalError(f"{name} has numbers beyond float16's {_LARGEST_HALF:.0f}: write bf16 or f32")
    return gguf.quantize(tensor.contiguous().numpy(), gguf.GGMLQuantizationType[kept.upper()])


def _refuses_type(model: Model, architecture: Architecture, type: str) -> str | None:
    if type not in _QUANTISED:
        return None
    odd = {
        name.split(".")[-2]: tensor.shape[1]
        for name, tensor in tensors(model.hollow(), architecture)
        if type_of(name, tensor, type) in _QUANTISED and tensor.shape[1] % ROWS
    }
    if not odd:
        return None
    named = ", ".join(f"{name} {size}" for name, size in sorted(odd.items()))
    way = ROUND if odd.keys() == {"ffn_down"} else "write f16"
    return f"quantises rows of a multiple of {ROWS} numbers, and some are of others ({named}): {way}"


def _words(model: Model) -> Vocabulary | str:
    ends = getattr(model.hf.generation_config, "eos_token_id", None)
    return vocabulary(model.tokenizer, model.vocab_size, [ends] if isinstance(ends, int) else list(ends or []))
