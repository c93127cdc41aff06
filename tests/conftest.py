"""Settings for all tests: offline, one thread, and in CI no test that silently does not run."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, which is not done here: xdist's controller needs none
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a pool of threads for each tiny model takes longer than to read it

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.fsync = lambda handle: None  # nothing here must outlive a power cut, and half of the time would go to waiting

# The plain one, the one with fused projections, and the oddest (Conv1D, learned positions, LayerNorm, tied head).
KINDS_OF_FAMILY = ("llama", "phi3", "gpt2")
ROOT = Path(__file__).parents[1]
collect_ignore = ["plugin"]  # a package of its own, which test_plugin.py installs and tests
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most tests take one family of each kind; for all others they are slow tests."""
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if family and family not in KINDS_OF_FAMILY and not item.get_closest_marker("every_family"):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Each full collection of garbage would look through all that was imported: half a second."""
    importlib.import_module("hypothesis")  # which asks who refers to its generators, and gets no answer afterwards
    gc.freeze()


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


@contextmanager
def importing(folder: Path) -> Iterator[Callable[[str], Any]]:
    """Imports modules of a folder by name, as its scripts import each other; they are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with texts and reference outcomes that lies beside the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, by the system's own driver: nothing is fetched."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the driver's own pipes
        started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield started
        finally:
            started.quit()
