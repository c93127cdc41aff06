"""Which family can do which edit: tried on the tiny models, written as docs/families.md (`make families`)."""

from __future__ import annotations

import sys

from models import FAMILY_NAMES, orthonormal, random, tiny

from secateur.errors import UnsupportedEditError
from secateur.model.handle import Model
from secateur.surgery import edits
from secateur.surgery.apply import apply
from secateur.surgery.edits import Edit

HEADER = """# Families and edits

Written by the tests (`make families`), from trying each edit on a tiny model of each family. That an edit is exact,
that what it leaves is saved, loaded and generates with a cache, is what the other tests of that family hold.

"""


def examples(model: Model) -> list[Edit]:
    """One edit of each kind."""
    with model.open(1) as block:
        shape = block.weight("mlp_out").shape
    return [
        edits.DropBlock(1), edits.DropAttention(1), edits.DropMLP(1), edits.KeepNeurons(1, (0, 2)),
        edits.KeepHeads(1, (1,)), edits.SetWeight(1, "mlp_out", random(*shape)), edits.FoldNorms(),
        edits.Rebase(3, orthonormal(model.hidden_size, 9)), edits.UntieHead(), edits.CentreEmbedding(),
    ]  # fmt: skip


def attempt(family: str, place: int) -> str | None:
    """None where the edit is done, else the reason against it."""
    edit = examples(tiny(family))[place]
    model = tiny(family, tie_word_embeddings=isinstance(edit, edits.UntieHead))
    before = model.layout()
    try:
        if isinstance(edit, edits.Rebase):
            apply(model, edits.FoldNorms())
        apply(model, edit)
    except UnsupportedEditError as error:
        assert model.layout() == before
        return str(error).partition(": ")[2]
    return None


def table() -> str:
    kinds = [type(edit).__name__ for edit in examples(tiny("llama"))]
    lines = ["| family | " + " | ".join(f"`{kind}`" for kind in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    reasons: list[str] = []
    for family in sorted(FAMILY_NAMES):
        cells = []
        for place in range(len(kinds)):
            reason = attempt(family, place)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}." for number, reason in enumerate(reasons, start=1)]
    return HEADER + "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
