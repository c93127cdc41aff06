"""Tiny random models of every family, a tiny tokenizer, and a model whose closed blocks have no weights."""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.doctor.oracles import logits as logits
from secateur.engine.tokens import Tokens
from secateur.hf import quiet_transformers
from secateur.model.handle import Model
from secateur.model.layout import Ends
from secateur.model.modeling_secateur import FAMILIES
from secateur.model.stored import TensorFile
from secateur.model.streamed import StreamedModel
from secateur.model.tiny import BLOCKS, VOCABULARY
from secateur.model.tiny import HIDDEN as HIDDEN
from secateur.model.tiny import WINDOW as WINDOW
from secateur.model.tiny import tiny_config as tiny_config
from secateur.model.tiny import tiny_hf as build_tiny_hf
from secateur.model.views import Block
from secateur.record import Facts
from secateur.surgery.apply import apply
from secateur.surgery.edits import (
    DropAttention,
    DropBlock,
    DropMLP,
    Edit,
    FoldNorms,
    KeepHeads,
    KeepNeurons,
    Rebase,
    SetWeight,
)

FAMILY_NAMES: tuple[str, ...] = tuple(FAMILIES)
REBASABLE: tuple[str, ...] = tuple(name for name, row in FAMILIES.items() if row.no_rebase is None)
NO_ENDS = Ends(0, 0, False, 0, 0)  # for layouts that are made up: nothing outside the blocks
_BUILT: dict[str, Any] = {}


def _fills_no_meta(kind: Any) -> None:
    """What has no weights is not filled: torch draws them all the same, for half of the time of a hollow model."""
    own = kind.reset_parameters
    kind.reset_parameters = lambda module: None if module.weight.is_meta else own(module)


_fills_no_meta(nn.Linear)
_fills_no_meta(nn.Embedding)


def tiny_hf(family: str, seed: int = 0, **overrides: Any) -> Any:
    """secateur's own tiny stock model; one that was asked for before is copied, which takes half as long."""
    asked = repr((family, seed, sorted(overrides.items())))
    if asked not in _BUILT:
        _BUILT[asked] = build_tiny_hf(family, seed, **overrides)
    return copy.deepcopy(_BUILT[asked])


def tiny(family: str, seed: int = 0, **overrides: Any) -> Model:
    """`tiny_hf` as secateur sees it."""
    return Model(tiny_hf(family, seed, **overrides), source={"name": f"tiny-{family}"})


def tiny_closed(family: str, seed: int = 0, **overrides: Any) -> ClosedModel:
    """The same model as `tiny`, with the weights of a block there only while it is open."""
    return ClosedModel(tiny_hf(family, seed, **overrides), source={"name": f"tiny-{family}"})


def tiny_tokens(model: Model, samples: int, length: int, seed: int = 0) -> Tokens:
    """Random windows, without the ids that a tiny tokenizer or a padding index would treat as special."""
    generator = torch.Generator().manual_seed(seed)
    return Tokens.of(torch.randint(5, model.vocab_size, (samples, length), generator=generator))


def whole_load(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """As a user loads it, but every key must be there and none too many."""
    with quiet_transformers():
        hf, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return hf


def parameters(model: Model) -> int:
    return sum(p.numel() for p in model.hf.parameters())


def apply_all(model: Model, edits: Iterable[Edit]) -> Model:
    for edit in edits:
        apply(model, edit)
    return model


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.15 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A random basis (rows, columns) in float64."""
    drawn = torch.randn(rows, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q[:, :columns].contiguous()


def layouts(model: Model) -> dict[str, list[Edit]]:
    """Edits that lead a dense tiny model to every kind of layout, by name."""
    every = range(BLOCKS)
    shape = model.layout().blocks[0].shape
    width, groups = shape.width, shape.kv_heads
    with model.open(2) as block:
        hidden, columns = block.weight("attention_out").shape
    columns //= groups
    odd = tuple(range(1, width, 2))
    made: dict[str, list[Edit]] = {
        "dense": [],
        "block 0 without attention": [DropAttention(0)],
        "one KV group fewer": [KeepHeads(1, tuple(range(1, groups)))],
        "one neuron fewer": [KeepNeurons(3, tuple(range(1, width)))],
        "one MLP missing": [DropMLP(1)],
        "several attentions missing": [DropAttention(0), DropAttention(3)],
        "only block 2 has an attention": [DropAttention(k) for k in (0, 1, 3)],
        "all attentions missing": [DropAttention(k) for k in every],
        "all MLPs missing": [DropMLP(k) for k in every],
        "nothing left but norms": [edit(k) for k in every for edit in (DropAttention, DropMLP)],
        "mixed widths": [KeepNeurons(0, odd), KeepNeurons(2, (0, width - 1)), KeepNeurons(3, (5,))],
        "mixed KV groups": [KeepHeads(0, (groups - 1,)), KeepHeads(2, (0,))],
        "blocks dropped": [DropBlock(0), DropBlock(2)],
        "one block left": [DropBlock(k) for k in (0, 1, 3)],
        "blocks dropped, block 2 without attention": [DropBlock(0), DropAttention(2), DropBlock(1)],
        "one width": [KeepNeurons(k, tuple(range(k, k + 9))) for k in every],
        "one KV group each": [KeepHeads(k, (k % groups,)) for k in every],
        "everything": [
            KeepNeurons(2, odd, out_weight=random(hidden, len(odd), seed=1)), DropBlock(1),
            KeepHeads(2, (groups - 1,), out_weight=random(hidden, columns, seed=2)), DropAttention(0),
            KeepNeurons(0, (3, 4, 7)), SetWeight(3, "attention_out", random(hidden, columns * groups, seed=3)),
            DropMLP(3),
        ],
    }  # fmt: skip
    return {name: possible(model, edits) for name, edits in made.items()}


def possible(model: Model, edits: Iterable[Edit]) -> list[Edit]:
    """Those that the model's family can do."""
    return [edit for edit in edits if type(edit).__name__ not in model.family.cannot]


LAYOUTS = tuple(layouts(tiny("llama")))
STOCK_LAYOUTS = ("dense", "blocks dropped", "one block left", "one width", "one KV group each")  # but the last on OPT


def stream_layouts(model: Model) -> dict[str, list[Edit]]:
    """Edits that give a dense tiny model of a family that can a residual stream in other coordinates, by name."""
    hidden, sites = model.hidden_size, range(2 * BLOCKS + 1)
    sliced: list[Edit] = [FoldNorms(), *(Rebase(site, orthonormal(hidden, hidden - 3 - site, site)) for site in sites)]
    return {
        "rotated stream": [FoldNorms(), *(Rebase(site, orthonormal(hidden, hidden, site)) for site in sites)],
        "sliced stream": sliced,
        "sliced stream and more": [
            DropMLP(1), *sliced, KeepNeurons(0, (1, 2, 5, 7, 11)), DropAttention(0), KeepHeads(3, (0,)),
            DropAttention(1), DropBlock(2),
        ],
    }  # fmt: skip


STREAM_LAYOUTS = tuple(stream_layouts(tiny("llama")))
# These have every kind of edit, and all that a stock architecture holds; where all layouts are slow.
COVERING = (
    "dense", "nothing left but norms", "mixed widths", "mixed KV groups", "blocks dropped", "one width",
    "one KV group each", "everything", "sliced stream and more",
)  # fmt: skip


def tiny_in(layout: str, family: str, seed: int = 0, **overrides: Any) -> Model:
    """A tiny model pruned to one of `LAYOUTS` or, where the family can, of `STREAM_LAYOUTS`."""
    model = tiny(family, seed, **overrides)
    return apply_all(model, (stream_layouts if layout in STREAM_LAYOUTS else layouts)(model)[layout])


SPECIAL = ("<unk>", "<pad>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:;!?'\"()-_"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


BOS = "<bos>"


def tiny_tokenizer(*, chat: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per character, with offsets and (unless `chat` is off) a chat template; fits the tiny vocabulary.

    Args:
        bos: it has a begin-of-sequence token, which it puts nowhere by itself.
    """
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS, *([BOS] if bos else [])])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], clean_up_tokenization_spaces=False,
        **({"bos_token": BOS} if bos else {}),
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) <= VOCABULARY
    return tokenizer


class ClosedModel(StreamedModel):
    """A streamed model of a transformers model in memory, which is used up; it is strict about what is open.

    At most two blocks are open at a time, and only neighbours: between them the residual stream may change its basis.

    Attributes:
        fetched: numbers of blocks in the order in which weights came in; None stands for the ends.
    """

    def __init__(self, hf: Any, source: Facts | None = None) -> None:
        folder = Path(mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder)
        stored = {}
        for place, tensor in enumerate({id(each): each for each in hf.parameters()}.values()):
            with closing(TensorFile(folder / f"{place}.safetensors", {"": tensor})) as file:
                file.put("", tensor)
                stored[id(tensor)] = file.stored("", tensor)
        named = {name: stored[id(tensor)] for name, tensor in hf.state_dict(keep_vars=True).items()}
        self.fetched: list[int | None] = []
        super().__init__(hf, named, device=torch.device("cpu"), source=source)
        for part in (None, *self.numbers):
            self._fill(part, [torch.empty_like(parameter, device="meta") for parameter, _ in self._parameters(part)])

    @property
    def opened(self) -> set[int | None]:
        return {part for part, times in self._entered.items() if times}

    @property
    def block_openings(self) -> list[int]:
        return [number for number in self.fetched if number is not None]

    @contextmanager
    def open(self, number: int, *, write: bool = False) -> Iterator[Block]:
        opened = {number, *(part for part in self.opened if part is not None)}
        places = {self.position(each) for each in opened & set(self.numbers)}
        assert max(places) - min(places) < 2, f"block {number} is opened while {list(self.opened)} are"
        with super().open(number, write=write) as block:
            yield block

    def _bring(self, part: int | None) -> None:
        super()._bring(part)
        self.fetched.append(part)

    def whole(self) -> Model:
        """The same model with all weights present, as a plain `Model`; this one is used up."""
        for part in (None, *self.numbers):
            self._fill(part, self._shelf.fetch(self._homes[part]))
        model = Model(self.hf, self.tokenizer, self.source)
        model.numbers = list(self.numbers)
        return model
