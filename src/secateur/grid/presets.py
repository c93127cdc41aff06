"""The grids of the papers, everything as published, for those who have the models and a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from secateur.assets import Bos
from secateur.errors import UnknownNameError
from secateur.judge.generation import REFERENCE_DECODING, REFERENCE_PROMPTS
from secateur.judge.judging import Judging
from secateur.methods import Options
from secateur.model.budget import Convention

BySparsity = Callable[[str, float, int], Options]  # (method, sparsity, hidden size)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published comparison.

    Attributes:
        options: by method; `samples` and `length` are those of its calibration.
        by_sparsity: further options that depend on the sparsity and on the model.
        seed: 0 takes the calibration text's first windows, any other draws.
        bos: of the calibration. No paper's windows begin with the begin-of-sequence token, nor do its tasks'.
    """

    methods: tuple[str, ...]
    sparsities: tuple[str, ...]
    of: Convention
    judging: Judging
    options: Mapping[str, Options] = field(default_factory=dict)
    by_sparsity: BySparsity = lambda method, sparsity, hidden: {}
    calibration: str = "c4"
    seed: int = 0
    bos: Bos = "never"


def _two_ssp(method: str, sparsity: float, hidden: int) -> Options:
    """SliceGPT's constant width: (1 - s) D, rounded to 8."""
    return {"dimension": round((1 - sparsity) * hidden / 8) * 8} if method == "slicegpt" else {}


def _slimgpt(method: str, sparsity: float, hidden: int) -> Options:
    """The first and last block's ratios, where they are known: 20 % from the authors' command, 50 % read off the
    paper's figure 4. For other sizes they are solved from the target."""
    known = {0.2: (0.0625, 0.25), 0.5: (0.125, 0.656)}
    if method != "slimgpt" or sparsity not in known:
        return {}
    first, last = known[sparsity]
    return {"first_ratio": first, "last_ratio": last}


PRESETS: dict[str, Preset] = {
    # The 2SSP repository: 32 windows for 2SSP, 256 for the depth and width methods, one for BlockPruner.
    "2ssp-paper": Preset(
        methods=("2ssp", "shortgpt", "window", "blockpruner", "evopress", "slicegpt"),
        sparsities=("paper",),
        of="blocks",
        options={
            "shortgpt": {"positions": "last", "samples": 256},
            "window": {"samples": 256},
            "blockpruner": {"alternate": True, "samples": 1},
            "slicegpt": {"mean_centre": True, "samples": 256},
        },
        by_sparsity=_two_ssp,
        judging=Judging(
            texts=("wikitext2", "c4", "fineweb-edu"), length=2048, samples=None, bos="never", tasks=("2ssp",),
            inference=True, prompts=REFERENCE_PROMPTS, decodings=(REFERENCE_DECODING,),
        ),
    ),
    # SlimGPT: a share of all parameters; 256 random windows; perplexity over windows of 128 tokens. The paper does not
    # say its damping; the authors' command has none.
    "slimgpt-paper": Preset(
        methods=("slimgpt",), sparsities=("0.2", "0.25", "0.33", "0.5"), of="model",
        options={"slimgpt": {"damping": 0.0, "samples": 256, "length": 2048}}, by_sparsity=_slimgpt,
        judging=Judging(
            texts=("wikitext2",), length=128, samples=None, bos="never", tasks=("slimgpt",), inference=True
        ),
        seed=1,
    ),
}  # fmt: skip


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in PRESETS:
        raise UnknownNameError.of("preset", name, PRESETS)
    return PRESETS[name]
