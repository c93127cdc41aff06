"""What lies beside the weights comes along: the tokenizer's files as they are, licences always, nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from models import apply_all, layouts, tiny_hf, tiny_tokenizer, tiny_tokens
from transformers import AutoTokenizer

from secateur import load, prune
from secateur.card import card
from secateur.export import save
from secateur.model.handle import Model
from secateur.output import save as save_result

LICENCES = (
    "LICENSE", "license.txt", "LICENCE.MD", "NOTICE", "Notice.txt", "USE_POLICY.md", "Usage-Policy.pdf", "COPYING",
    "MODEL_LICENSE_AGREEMENT.html", "Responsible-Use-Guide.pdf", "licenses/apache.txt", "original/NOTICE",
)  # fmt: skip
OF_THE_TOKENIZER = (
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
LEFT = (
    "modeling_llama.py", "license_check.py", "LICENSE.bin", "notice.safetensors", "README.md", "secateur.json", "original/params.json",
    ".git/LICENSE", "a/b/LICENSE", "model-00001-of-00002.safetensors.bak", "training_args.bin",
)  # fmt: skip


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A folder as downloads are: more than a model and its tokenizer, some of it binary."""
    folder = tmp_path / "dense"
    tiny_hf("llama").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "a_note": "of the model's authors"}
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
    unchanged = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert same - {"generation_config.json"} == {*LICENCES, *OF_THE_TOKENIZER, *unchanged}
    assert not set(LEFT) & after.keys()
