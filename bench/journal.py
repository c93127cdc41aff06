"""What the journal of a run on disk costs: seconds in it over the seconds of the whole pruning, within one run.

Each method prunes with a store whose calls are timed: results are written, fsynced and read back, and with
`--keep-states` the walk's states are kept after every so many blocks.

    python bench/journal.py --samples 8 --length 512
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import MEGA, Report, calibration, load_model, parser

from secateur.driver import run_method
from secateur.journal import Journal, Journaled
from secateur.methods import get_method
from secateur.model.budget import Budget
from secateur.sharing import SharingRun

METHODS = ("2ssp", "shortgpt", "slimgpt", "slicegpt", "secateur")


class Timed(Journaled):
    """A store that knows the seconds spent in it."""

    seconds = 0.0

    def put(self, key: str, value: Any) -> None:
        began = time.monotonic()
        super().put(key, value)
        self.seconds += time.monotonic() - began

    def get(self, key: str) -> Any:
        began = time.monotonic()
        try:
            return super().get(key)
        finally:
            self.seconds += time.monotonic() - began

    def put_states(self, key: str, value: Any) -> None:
        began = time.monotonic()
        super().put_states(key, value)
        self.seconds += time.monotonic() - began


def measure(model_name: str, method: str, keep_states: int, samples: int, length: int, folder: Path) -> dict[str, Any]:
    model = load_model(model_name)
    tokens = calibration(model, samples, length)
    store = Timed(Journal(folder))
    store.open("bench")
    began = time.monotonic()
    run_method(model, get_method(method), tokens, Budget(0.25), SharingRun(0, store, keep_states=keep_states))
    total = time.monotonic() - began
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "method": method, "states kept": f"every {keep_states} blocks" if keep_states else "no",
        "steps": len(store.journal.entries), "MB on disk": written / MEGA,
        "s": total, "in the journal, s": store.seconds, "share": store.seconds / total,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--methods", nargs="+", default=METHODS)
    made.add_argument("--keep-states", type=int, nargs="+", default=[0, 1])
    made.add_argument("--samples", type=int, default=8)
    made.add_argument("--length", type=int, default=512)
    options = made.parse_args(arguments)
    report = Report("What the journal costs", options)
    rows = []
    for method in options.methods:
        for every in options.keep_states:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(options.model, method, every, options.samples, options.length, Path(folder)))
    report.table("Journal", rows)
    report.close()


if __name__ == "__main__":
    main()
