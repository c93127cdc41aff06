"""What is quick stays quick: help without torch; and secateur's models known to transformers all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
from models import tiny, tiny_tokens

import secateur
from secateur.cli.app import COMMANDS
from secateur.cli.compare import PRESETS
from secateur.grid import presets
from secateur.methods import methods
from secateur.signatures import builtin_options

HEAVY = {"torch", "transformers", "numpy", "matplotlib", "datasets", "pandas", "lm_eval"}
HELP = """
import sys
from secateur.cli import main
for words in {words!r}:
    sys.argv = ["secateur", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
assert not {heavy!r} & set(sys.modules), {heavy!r} & set(sys.modules)
"""
RELOAD = """
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert type(model).__module__ == "secateur.model.modeling_secateur", type(model)
"""
SECATEUR = "import secateur"
TRANSFORMERS = "from transformers import AutoModelForCausalLM"


def fresh(code: str) -> str:
    """What a new Python prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_and_help_import_nothing_heavy() -> None:
    words = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    shown = fresh(HELP.format(words=words, heavy=HEAVY))
    assert shown.startswith(secateur.__version__)
    for flag in ("--stage1-only", "--selection-tokens", "--preset", "--prompt-length", "calibration-size"):
        assert flag in shown


@pytest.fixture(scope="module")
def rebased(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that stock architectures cannot hold."""
    folder, model = tmp_path_factory.mktemp("start") / "out", tiny("llama")
    pruned = secateur.prune(model, "slicegpt", sparsity=0.3, calibration=tiny_tokens(model, 2, 8), multiple=1)
    assert secateur.save(pruned, folder) == "B"
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        (SECATEUR, TRANSFORMERS),
        (TRANSFORMERS, SECATEUR),
        (SECATEUR, "from importlib.util import find_spec; find_spec('transformers')", TRANSFORMERS),  # only asked
        ("from secateur.model import modeling_secateur", TRANSFORMERS),  # which imports transformers itself
        ("from secateur import load", TRANSFORMERS),
    ],
    ids=" ".join,
)
def test_transformers_knows_secateurs_models(imports: tuple[str, ...], rebased: str) -> None:
    fresh("\n".join(imports) + RELOAD.format(folder=rebased))


def test_flags_are_those_of_the_methods() -> None:
    """The source, read without importing it, says what the imported functions say."""
    assert builtin_options() == {name: method.options for name, method in methods().items()}


def test_what_the_help_repeats_is_so() -> None:
    assert tuple(presets.PRESETS) == PRESETS


def test_public_names_are_there() -> None:
    assert set(secateur.__all__) <= set(dir(secateur))
    assert all(getattr(secateur, name) is not None for name in secateur.__all__)
    with pytest.raises(AttributeError):
        secateur.nothing  # noqa: B018
