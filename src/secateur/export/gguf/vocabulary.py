"""A tokenizer as llama.cpp has it: its tokens, merges or scores, special ids, and the name of how text is split.

llama.cpp knows ways to split text by name and code, not by the expressions of tokenizer.json: what it has no name for
is refused, since a guess would give other tokens without an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_BYTES = "the expression of byte-level BPE itself"
# How text is split before BPE -> llama.cpp's name, for tokenizers that take whole words from the vocabulary
# (`ignore_merges`) and for those that do not. An expression is looked for as it stands in tokenizer.json.
_SPLITS: dict[tuple[str, ...], dict[bool, str]] = {
    (_BY_BYTES,): {False: "gpt-2"},
    ("digits", _BY_BYTES): {False: "smollm"},
    (_WORDS + r"|\p{N}{1,3}" + _REST,): {True: "llama-bpe", False: "dbrx"},
    (_WORDS + r"|\p{N}" + _REST,): {False: "qwen2"},
    (_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", "{1,3}"),): {False: "gpt-4o"},
    (_CASED % ("", "", ""),): {True: "tekken"},
}


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file.

    Attributes:
        model: llama.cpp's name of the algorithm, "gpt2" (BPE over bytes) or "llama" (sentencepiece's).
        split: its name of how text is split before that; None where it is not.
        tokens, types: by id.
        scores: by id, for sentencepiece.
        merges: for BPE.
        special: ids by kind (bos, eos, unk, pad, eot).
        add_bos, add_eos: whether the tokenizer puts them around a text by itself.
        space_first: whether a text is read as if it began with a space.
        as_phi_3: added tokens take the spaces behind them along, which llama.cpp does for models of this name.
    """

    model: str
    split: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    space_first: bool | None
    chat_template: str | list[dict[str, str]] | None
    as_phi_3: bool


def vocabulary(tokenizer: PreTrainedTokenizerBase | None, size: int, ends: list[int]) -> Vocabulary | str:
    """What a tokenizer is in llama.cpp; or why it cannot be told, as the rest of a sentence.

    Args:
        size: rows of the embedding; ids that the tokenizer does not use are filled up.
        ends: ids that end a generation, by the generation's settings.
    """
    if tokenizer is None:
        return "keeps the tokenizer with the weights, and this model has none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "is told tokens and merges, which this tokenizer (without a tokenizer.json) does not show"
    told = json.loads(backend.to_str())
    model = told["model"]
    if model["type"] != "BPE":
        return f"is given BPE tokenizers here, and this one is of type {model['type']}"
    special = _special(tokenizer, ends)
    if "eos" not in special:
        return "ends a text at token 11 where no end-of-sequence token is named, and this tokenizer has none"
    if max(tokenizer.get_vocab().values()) >= size:
        return f"has a token for each row of the embedding, and the tokenizer has ids beyond its {size}"
    if isinstance(drops := _drops_spaces(told), str):
        return drops
    pieces = bool(model.get("byte_fallback"))
    if pieces and (changed := _more_than_spaces(told)):
        return f"marks spaces before sentencepiece's BPE and does no more, and this tokenizer does ({changed})"
    split = None if pieces else _split(told)
    if not pieces and split is None:
        return f"knows ways to split text by name, and none for this tokenizer's: {_way(told)[:300]}"
    tokens, types = _tokens(tokenizer, told, size)
    empty = [int(id_) for id_ in tokenizer("a")["input_ids"]]
    merges = [tuple(each) if isinstance(each, list) else tuple(each.split(" ", 1)) for each in model["merges"]]
    return Vocabulary(
        model="llama" if pieces else "gpt2", split=split, tokens=tokens, types=types,
        scores=_scores(tokens, merges) if pieces else None,
        merges=None if pieces else [" ".join(pair) for pair in merges],
        special=special, add_bos=empty[:1] == [special.get("bos")], add_eos=empty[-1:] == [special["eos"]],
        space_first=_begins_with_space(told) if pieces else None, chat_template=_template(tokenizer), as_phi_3=drops,
    )  # fmt: skip


def add_vocabulary(writer: Any, words: Vocabulary) -> None:
    """Add the tokenizer's keys to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.split or "default")
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    for kind, number in words.special.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.space_first is not None:
        writer.add_add_space_prefix(words.space_first)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def _special(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> dict[str, int]:
    """Ids of special tokens by llama.cpp's names. It takes id 11 for what is not named, so nothing is left open."""
    kinds = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id}
    found = {kind: number for kind, number in (kinds | {"pad": tokenizer.pad_token_id}).items() if number is not None}
    if "eos" not in found and ends:
        found["eos"] = ends[0]
    if "bos" not in found and "eos" in found:
        found["bos"] = found["eos"]  # never put before a text, as `add_bos` says
    if others := [number for number in ends if number != found["eos"]]:
        found["eot"] = others[0]
    return found


def _drops_spaces(told: Mapping[str, Any]) -> bool | str:
    """Whether added tokens take the spaces behind them along, as Phi-3's do; or why llama.cpp has it otherwise. A file
    does not say it: llama.cpp knows Phi-3 by the model's name."""
    added = {each["content"]: each for each in told["added_tokens"]}
    before = [token for token, each in added.items() if each["lstrip"]]
    behind = [token for token, each in added.items() if each["rstrip"]]
    if not (before or behind):
        return False
    kept = ("<unk>", "<s>", "<|endoftext|>")  # llama.cpp looks for these and </s>
    if not before and {*kept, "</s>"} <= added.keys() and added.keys() - behind == {*kept}:
        return True
    return (
        f"drops spaces beside all added tokens as Phi-3 does, or beside none, and here {(before or behind)[0]} does it"
    )


def _split(told: Mapping[str, Any]) -> str | None:
    """llama.cpp's name; None where it has none, as for tokenizers that change text first (but by NFC, which it leaves
    out: plain text is NFC)."""
    if (told.get("normalizer") or {}).get("type", "NFC") != "NFC":
        return None
    names = _SPLITS.get(tuple(_steps(told["pre_tokenizer"] or {})), {})
    return names.get(bool(told["model"].get("ignore_merges")))


def _way(told: Mapping[str, Any]) -> str:
    """How text is changed and split before BPE, in words."""
    changed = [told["normalizer"]["type"]] if told.get("normalizer") else []
    return " then ".join([*changed, *_steps(told["pre_tokenizer"] or {})])


def _more_than_spaces(told: Mapping[str, Any]) -> str | None:
    """The first step before BPE that is none of those by which sentencepiece marks spaces."""
    steps = [told.get("normalizer"), told.get("pre_tokenizer")]
    while steps:
        if (step := steps.pop()) is None:
            continue
        kind, spaces = step["type"], step.get("pattern", {}).get("String") == " "
        if kind == "Sequence":
            steps += step.get("normalizers", []) + step.get("pretokenizers", [])
        elif kind not in ("Prepend", "Metaspace") and not (kind in ("Replace", "Split") and spaces):
            return str(kind)
    return None


def _steps(step: Mapping[str, Any]) -> list[str]:
    """What is split off, one after another."""
    kind = step.get("type")
    if kind == "Sequence":
        return [each for part in step["pretokenizers"] for each in _steps(part)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [_BY_BYTES] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and step.get("behavior") in ("Isolated", "Removed") and "Regex" in step.get("pattern", {}):
        return [step["pattern"]["Regex"]]
    return [f"{kind} {json.dumps({name: value for name, value in step.items() if name != 'type'})}"]


def _tokens(tokenizer: PreTrainedTokenizerBase, told: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {each["id"]: each for each in told["added_tokens"]}
    unknown, pieces = told["model"].get("unk_token"), bool(told["model"].get("byte_fallback"))
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            types.append(_UNUSED)
            continue
        tokens.append(token)
        if pieces and token == unknown:
            types.append(_UNKNOWN)
        elif number in added:
            types.append(_CONTROL if added[number]["special"] else _USER)
        else:
            types.append(_BYTE if pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else _NORMAL)
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores by which llama.cpp joins pieces in the order of the merges: the negative rank of a token's first merge;
    what no merge makes comes last."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _begins_with_space(told: Mapping[str, Any]) -> bool:
    return '"Prepend"' in json.dumps(told.get("normalizer")) or (
        '"Metaspace"' in (text := json.dumps(told.get("pre_tokenizer"))) and '"never"' not in text
    )


def _template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
