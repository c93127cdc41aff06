"""What lies beside the weights comes along: the tokenizer's files as they are, licences always, nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from models import apply_all, layouts, tiny_hf, tiny_tokenizer
from tokenizers import models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from secateur import load
from secateur.export import save
from secateur.model.handle import Model

LICENCES = (
    "LICENSE", "license.txt", "LICENCE.MD", "NOTICE", "Notice.txt", "USE_POLICY.md", "Usage-Policy.pdf", "COPYING",
    "MODEL_LICENSE_AGREEMENT.html", "Responsible-Use-Guide.pdf", "licenses/apache.txt", "original/NOTICE",
    "EULA.txt", "Model-EULA.md", "ACCEPTABLE_USE.md", "RAIL.md", "BigScience-RAIL-1.0.txt", "THIRD_PARTY.txt",
    "THIRD-PARTY-1.md", "ATTRIBUTION.md", "AUTHORS", "CREDITS.txt", "LICENSES/sub/MIT.txt", "LICENSES/sub/deeper/BSD",
)  # fmt: skip
OF_THE_TOKENIZER = (
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "qwen.tiktoken",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
LEFT = (
    "modeling_llama.py", "license_check.py", "LICENSE.bin", "notice.safetensors", "README.md", "original/params.json",
    ".git/LICENSE", "a/b/LICENSE", "training_args.bin", "guardrails.json",
    "licenses/.cache/MIT", "LICENSES/sub/check.py",
)  # fmt: skip
VOCABULARY = ("tokenizer.model", "vocab.json", "merges.txt", "qwen.tiktoken")
UNCHANGED = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A folder as downloads are: more than a model and its tokenizer, some of it binary."""
    folder = tmp_path / "dense"
    tiny_hf("llama").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "a_note": "of the model's authors",
        "padding_side": "right",
    }
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in (*LICENCES, *OF_THE_TOKENIZER, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() + b"\x00\xff")
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "added_tokens.json").write_text("{}")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["blocks dropped", "everything"])
def test_files_come_along_as_they_are(layout: str, dense: Path, tmp_path: Path) -> None:
    model = load(str(dense))
    save(apply_all(model, layouts(model)[layout]), tmp_path / "pruned")
    before, after = contents(dense), contents(tmp_path / "pruned")
    same = {name for name in before if after.get(name) == before[name]}
    assert same - {"generation_config.json"} == {*LICENCES, *OF_THE_TOKENIZER, *UNCHANGED}
    assert not set(LEFT) & after.keys()


def test_what_a_pruned_folder_holds_is_handed_on(dense: Path, tmp_path: Path) -> None:
    save(load(str(dense)), tmp_path / "once", files={"README.md": "ours", "NOTICE": "ours"})
    save(load(str(tmp_path / "once")), tmp_path / "twice")
    once, twice = contents(tmp_path / "once"), contents(tmp_path / "twice")
    assert once.keys() - twice.keys() == {"README.md"}
    assert once["NOTICE"] == twice["NOTICE"] == b"ours"


def use(tokenizer: PreTrainedTokenizerBase) -> None:
    """As a calibration does; a fast tokenizer remembers the last call's options, and would save them."""
    tokenizer(["some text", "text"], truncation=True, max_length=3, padding="max_length")


def test_using_a_tokenizer_does_not_change_it(dense: Path, tmp_path: Path) -> None:
    model = load(str(dense))
    assert model.tokenizer is not None
    use(model.tokenizer)
    save(model, tmp_path / "pruned")
    before, after = contents(dense), contents(tmp_path / "pruned")
    assert {name for name in OF_THE_TOKENIZER if after.get(name) == before[name]} == set(OF_THE_TOKENIZER)


CHANGES: dict[str, Callable[[PreTrainedTokenizerBase], object]] = {
    "a token": lambda tokenizer: tokenizer.add_tokens(["ab"]),
    "a special token": lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|im_end|>"}),
    "another padding token": lambda tokenizer: setattr(tokenizer, "pad_token", "<unk>"),
    "another template": lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}"),
    "another side": lambda tokenizer: setattr(tokenizer, "padding_side", "left"),
    "a shorter limit": lambda tokenizer: setattr(tokenizer, "model_max_length", 32),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tokenizer_is_saved_as_it_is_now(change: str, dense: Path, tmp_path: Path) -> None:
    model = load(str(dense))
    assert model.tokenizer is not None
    CHANGES[change](model.tokenizer)
    save(model, tmp_path / "pruned")
    after = contents(tmp_path / "pruned")
    assert {name: after.get(name) for name in VOCABULARY} == {name: contents(dense)[name] for name in VOCABULARY}
    assert not {"special_tokens_map.json", "added_tokens.json"} & after.keys()  # of the tokenizer that it was
    assert set(LICENCES) <= after.keys()
    saved = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    for name in ("pad_token", "eos_token", "chat_template", "padding_side", "model_max_length"):
        assert getattr(saved, name) == getattr(model.tokenizer, name)
    assert saved("abc <|im_end|>")["input_ids"] == model.tokenizer("abc <|im_end|>")["input_ids"]
    settings = json.loads((tmp_path / "pruned" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # as transformers 4 knows it too
    assert not isinstance(settings.get("extra_special_tokens"), list)


def swap_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")


def lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize("change", [swap_ids, lower_case])
def test_vocabulary_files_of_another_vocabulary_stay_behind(
    change: Callable[[PreTrainedTokenizerBase], None], dense: Path, tmp_path: Path
) -> None:
    model = load(str(dense))
    assert model.tokenizer is not None
    change(model.tokenizer)
    save(model, tmp_path / "pruned")
    assert not set(VOCABULARY) & contents(tmp_path / "pruned").keys()
    ids = [
        model.tokenizer("abAB")["input_ids"],
        AutoTokenizer.from_pretrained(tmp_path / "pruned")("abAB")["input_ids"],
    ]
    assert ids[0] == ids[1] != tiny_tokenizer()("abAB")["input_ids"]


def test_a_tokenizer_of_another_folder_is_taken_from_there(dense: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(dense, other, ignore=shutil.ignore_patterns("LICENSE"))
    (other / "NOTICE").write_text("of the other")
    model = Model(AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(other))
    save(model, tmp_path / "pruned")
    after = contents(tmp_path / "pruned")
    assert after["tokenizer.model"] == b"tokenizer.model\x00\xff"
    assert (after["LICENSE"], after["NOTICE"]) == (b"LICENSE\x00\xff", b"NOTICE\x00\xff")  # of the weights


def test_without_a_folder_the_tokenizer_is_written(dense: Path, tmp_path: Path) -> None:
    moved, built = load(str(dense)), Model(tiny_hf("llama"), tiny_tokenizer())
    dense.rename(tmp_path / "elsewhere")
    for name, model in (("moved", moved), ("built", built)):
        save(model, tmp_path / name)
        assert not set(LICENCES) & contents(tmp_path / name).keys()
        saved = AutoTokenizer.from_pretrained(tmp_path / name)
        assert model.tokenizer is not None
        assert saved.get_vocab() == model.tokenizer.get_vocab()
        assert saved.chat_template == model.tokenizer.chat_template


@pytest.fixture
def hub(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dense folder as the hub's cache has `org/m`; nothing else can be had."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--org--m"
    shutil.copytree(dense, place / "snapshots" / ("1" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1" * 40)
    return place / "snapshots" / ("1" * 40)


def test_of_a_hub_model_the_cache_is_enough(hub: Path, tmp_path: Path) -> None:
    save(load("org/m"), tmp_path / "pruned")
    before, after = contents(hub), contents(tmp_path / "pruned")
    assert {name for name in before if after.get(name) == before[name]} >= {*LICENCES, *OF_THE_TOKENIZER, *UNCHANGED}


def test_of_a_hub_model_licences_are_asked_for(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fetches none: what the repository lists is fetched at the commit that the weights are of."""
    asked = []

    def listed(self: object, name: str, revision: str | None = None) -> list[str]:
        asked.append((name, revision))
        return [*LICENCES, *LEFT, *UNCHANGED, *OF_THE_TOKENIZER, "NOTICE.not-there", "config.json"]

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    save(load("org/m"), tmp_path / "pruned")
    assert set(asked) == {("org/m", "1" * 40)}
    after = contents(tmp_path / "pruned").keys()
    assert after >= {*LICENCES, *UNCHANGED, *OF_THE_TOKENIZER}
    assert not after & {*LEFT, "NOTICE.not-there"}
