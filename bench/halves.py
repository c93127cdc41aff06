"""Texts to develop on and texts to test on, which no choice was made by: halves of the evaluation texts, as files.

python bench/halves.py DATA OUT

DATA is a folder with the named texts. OUT gets `dev/` and `test/`, each with a half of c4 and fineweb-edu; `dev/` the
split of wikitext2 named "validation" (its test split is the text `wikitext2`), `test/` a domain of its own as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

C4, FINEWEB, ALPACA = (
    "c4/c4_validation_2000.jsonl",
    "fineweb_edu/fineweb_edu_sample_1MB.txt",
    "alpaca/alpaca_sample.jsonl",
)
WIKITEXT = "wikitext2/wiki.valid.raw"


def write(data: Path, out: Path) -> None:
    documents = (data / C4).read_text(encoding="utf-8").splitlines(keepends=True)
    web = (data / FINEWEB).read_text(encoding="utf-8")
    halves = {"dev": (documents[:1000], web[: len(web) // 2]), "test": (documents[1000:], web[len(web) // 2 :])}
    for half, (c4, fineweb) in halves.items():
        folder = out / half
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "c4.jsonl").write_text("".join(c4), encoding="utf-8")
        (folder / "fineweb-edu.txt").write_text(fineweb, encoding="utf-8")
    (out / "dev" / "wikitext2.txt").write_text((data / WIKITEXT).read_text(encoding="utf-8"), encoding="utf-8")
    rows = [json.loads(line) for line in (data / ALPACA).read_text(encoding="utf-8").splitlines()]
    texts = [{"text": "\n\n".join(filter(None, (row["instruction"], row["input"], row["output"])))} for row in rows]
    (out / "test" / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write(arguments.data, arguments.out)
