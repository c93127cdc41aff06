"""What engines run unpatched, and how a pruning keeps within it: `prune --for`.

`ENGINES` is the one table: of each engine why it does not run a model, by what the exports refuse. `_KEEPING` has the
options by which a method leaves all blocks alike, for engines that take no other. What no option keeps within an
engine's layouts is refused: by the rehearsal, where that knows what is left, else before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from secateur.errors import InvalidOptionError, UnknownNameError, UnsupportedExportError
from secateur.export import FORMATS, gguf, refusal, vllm
from secateur.export.gguf.choice import choose, may_differ
from secateur.methods import Method, Options
from secateur.model.handle import Model

ANY = "any"

# By method: options by which what was alike in all blocks stays so. Whole blocks go by shortgpt and window anyway.
_KEEPING: Mapping[str, tuple[str, Options]] = {
    "secateur": ("widths", {"allocation": "equal"}),
    "2ssp": ("heads", {"attentions": 0}),
    "evopress": ("heads", {"units": "blocks"}),
}
_BOTH = frozenset({"heads", "widths"})
_ALIKE = (
    "secateur and 2ssp narrow all FFNs alike here and keep every block; shortgpt, window and evopress remove whole "
    "blocks"
)
_ONE_WIDTH = "any method but slicegpt and slimgpt leaves what runs there"
_MOST = "any method but slicegpt leaves what runs there"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What an engine runs: a row.

    Attributes:
        refuses: why it does not run a model, which may be hollow: the rest of a sentence that begins with the engine;
            None if it does.
        alike: what must be alike in all blocks of a model of this family: their heads, the widths of their FFNs.
        rows: FFN widths that are multiples of this stay so, where no `round_to` is given: for quantisation.
    """

    refuses: Callable[[Model], str | None]
    alike: Callable[[Model], frozenset[str]]
    rows: int = 1


def _stock(model: Model) -> str | None:
    return FORMATS["A"].refuses(model)


def _llama_cpp(model: Model) -> str | None:
    if model.tokenizer is None:  # a forecast loads none; then the layout decides
        return chosen if isinstance(chosen := choose(model), str) else None
    return refusal(model, "gguf")


def _vllm(model: Model) -> str | None:
    """By an export, or as the stock checkpoint that `prune` writes where it can."""
    runs = _stock(model) is None or refusal(model, "nemotron-nas") is None
    return None if runs else refusal(model, "vllm")


def _alike_in_vllm(model: Model) -> frozenset[str]:
    return _BOTH if model.family.model_type in vllm.NOT_SERVED else frozenset()


ENGINES: Mapping[str, Engine] = {
    ANY: Engine(refuses=lambda model: None, alike=lambda model: frozenset()),
    "stock": Engine(refuses=_stock, alike=lambda model: _BOTH),
    "llama.cpp": Engine(refuses=_llama_cpp, alike=lambda model: _BOTH - may_differ(model), rows=gguf.ROWS),
    "vllm": Engine(refuses=_vllm, alike=_alike_in_vllm),
}


def within(name: str, method: Method, options: Options, round_to: int | None, model: Model) -> tuple[Options, int]:
    """A pruning's options and FFN rounding, with those that keep the model within what an engine runs.

    Args:
        name: of the engine.
        options: those that were given; they stay.
        round_to: None where none is given.
        model: as it is before; it may be hollow.

    Raises:
        UnknownNameError: there is no such engine.
        InvalidOptionError: an option that was given leads to layouts that it does not run.
    """
    if name not in ENGINES:
        raise UnknownNameError.of("engine", name, ENGINES)
    engine = ENGINES[name]
    alike = engine.alike(model)
    part, keeping = _KEEPING.get(method.name, ("", {}))
    keeping = keeping if part in alike else {}
    for option, value in keeping.items():
        if options.get(option, value) != value:
            raise InvalidOptionError(
                f"--for {name} runs blocks of equal {' and '.join(sorted(alike))} only, for which {method.name} has "
                f"{option} {value}, and {option} {options[option]} is asked for: leave out the one or the other"
            )
    widths = [block.shape.width for block in model.layout().blocks.values()]
    if round_to is None:
        round_to = 1 if any(width % engine.rows for width in widths) else engine.rows
    return {**options, **keeping}, round_to


def require_served(name: str, model: Model, method: Method, before: Model | None = None) -> None:
    """
    Args:
        name: of the engine.
        model: the pruned one; it may be hollow.
        before: the same before the pruning, where it is still there.

    Raises:
        UnsupportedExportError: the engine does not run it; says how to prune for it.
    """
    engine = ENGINES[name]
    if (reason := engine.refuses(model)) is None:
        return
    alike = engine.alike(before or model)
    instead = _ALIKE if alike == _BOTH else _ONE_WIDTH if alike else _MOST
    if before is not None and engine.refuses(before) is not None:
        instead = "nor does the model run there as it is"
    raise UnsupportedExportError(f"what {method.name} leaves here does not run there: {name} {reason} ({instead})")
