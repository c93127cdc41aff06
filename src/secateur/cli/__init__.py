"""The commands. Only this folder prints, shows progress or exits."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Entry point of the `secateur` command."""
    # A tokenizer's own threads gain nothing here, and warn when pip is called as a subprocess.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up as Ctrl-C does
    try:
        from secateur.cli.app import app
    except KeyboardInterrupt:  # importing torch takes seconds
        sys.exit(130)
    app()
