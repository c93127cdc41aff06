"""Settings for all tests: offline, one thread, and in CI no test that silently does not run."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

# The plain one, the one with fused projections, and the oddest (Conv1D, learned positions, LayerNorm, tied head).
KINDS_OF_FAMILY = ("llama", "phi3", "gpt2")
ROOT = Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most tests take one family of each kind; for all others they are slow tests."""
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if family and family not in KINDS_OF_FAMILY and not item.get_closest_marker("every_family"):
            item.add_marker(pytest.mark.slow)


def _strict(item: pytest.Item | pytest.Collector) -> bool:
    return os.environ.get("SECATEUR_CI") == "1" and item.get_closest_marker("cuda") is None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """With SECATEUR_CI=1 a skipped test is a failure, but for one that needs CUDA."""
    report = yield
    if report.skipped and _strict(item) and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which SECATEUR_CI=1 forbids: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """The same for a file that skips itself as a whole."""
    report = yield
    if report.skipped and _strict(collector):
        report.outcome = "failed"
        report.longrepr = f"skipped, which SECATEUR_CI=1 forbids: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with texts and reference outcomes that lies beside the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder
