"""Our SliceGPT against what the authors' code gave on the real test model (shared/reference.md): hidden 576 -> 432."""

import os
from pathlib import Path

import pytest
import torch
from oracles import prepared

import secateur
from secateur.engine.tokens import read_tokens
from secateur.judge.perplexity import perplexity
from secateur.pruning import run_job

SHARED = Path(__file__).parents[2] / "shared"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "reference").is_dir(), reason="the reference's outcome is not here (shared/)"),
]

# Perplexities of WikiText-2's first windows. Ten: the reference's own figure. Three, for CI: taken from the run of ours
# that met the reference's ten, with 141.64.
WINDOWS = 3 if os.environ.get("SECATEUR_CI") else 10
PERPLEXITY = {10: 141.6, 3: 181.710}[WINDOWS]


@pytest.fixture(scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def test_the_same_perplexity(threads):
    """With the embedding mean-centred and the head untied, as the authors' code does, though not the paper."""
    model = secateur.load("demo")
    job = prepared(
        model,
        "slicegpt",
        sparsity=0.25,
        calibration=str(SHARED / "reference" / "calibration.jsonl"),
        samples=8,
        length=2048,
        dimension=432,
        mean_centre=True,
    )
    pruned = run_job(job)
    achieved = pruned.record.sparsity.achieved.blocks
    assert achieved == pytest.approx(0.142, abs=5e-4)
    tokens = read_tokens(model, "wikitext2", purpose="evaluation", length=2048, samples=WINDOWS, data=SHARED / "data")
    assert perplexity(model, tokens).perplexity == pytest.approx(PERPLEXITY, rel=0.01)
