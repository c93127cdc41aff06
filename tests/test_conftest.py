"""The rule of the suite itself: in CI a test that does not run is a failure, unless it needs CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

def test_runs(): pass

@pytest.mark.cuda
@pytest.mark.skip(reason="no device")
def test_needs_cuda(): pass

@pytest.mark.xfail
def test_known_to_fail(): assert False

@pytest.mark.skip(reason="not today")
def test_marked(): pass

def test_skips_itself(): pytest.skip("nothing here")

def test_lacks_a_folder(shared): pass
"""


@pytest.mark.slow
def test_in_ci_a_skip_is_a_failure(tmp_path: Path) -> None:
    folder = tmp_path / "project" / "tests"
    folder.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_none.py").write_text("import pytest\npytest.importorskip('no_such_module')")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--continue-on-collection-errors", "."],
        cwd=folder, env={**os.environ, "SECATEUR_CI": "1", "PYTEST_ADDOPTS": ""}, capture_output=True, text=True,
    )  # fmt: skip
    counts = re.findall(r"(\d+) (passed|skipped|xfailed|failed|errors?)", done.stdout.splitlines()[-1])
    found = {kind: int(count) for count, kind in counts}
    assert found == {"passed": 1, "skipped": 1, "xfailed": 1, "failed": 1, "errors": 3}, done.stdout
