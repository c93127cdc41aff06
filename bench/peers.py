"""Other projects' pruning, as rows of others in a folder that `secateur compare` made.

    secateur compare demo --methods 2ssp --out FOLDER ...
    python bench/peers.py FOLDER demo --data DIR
    python bench/peers.py FOLDER demo --data DIR --peers 2ssp-authors --reference CHECKOUT

Each peer gets the same dense checkpoint, the same calibration tokens and the same sizes (optipfair by the percentage
that comes to as many neurons), prunes by its own code in a process and a virtual environment of its own
(bench/peer_side.py), and what it leaves is judged as every other cell: by the folder's judging, on tokens of the same
fingerprints. Model, texts and judging that differ from the folder's are refused. Cells that are there are not made
again, and with --work what was pruned is kept, so that another folder (other texts) needs no second pruning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from msgspec import convert, structs
from safetensors.torch import load_file, save_file

import secateur
from secateur.assets.cache import cache_dir
from secateur.cli.grids import cell_in_words
from secateur.engine.tokens import Tokens, read_tokens
from secateur.export import save
from secateur.folders import claimed
from secateur.grid.cells import digest
from secateur.grid.folder import GridFolder, machine, make_index, now
from secateur.grid.pruning import shape, sizes
from secateur.grid.run import judged
from secateur.judge.generation import Decoding
from secateur.judge.judging import Judge, Judging
from secateur.model.handle import Model
from secateur.model.modeling_secateur import row_dim
from secateur.record import public_arguments, public_facts, public_name
from secateur.report.main_table import write_main_table
from secateur.report.results import CellResult, Index, PruneCost, read_results
from secateur.run import Observer, Run
from secateur.surgery.apply import apply
from secateur.surgery.edits import DropAttention, DropMLP, KeepNeurons

TORCH = f"torch=={torch.__version__.partition('+')[0]}"  # ours
SIDE = Path(__file__).with_name("peer_side.py")


@dataclass(frozen=True)
class Peer:
    """Another project.

    Attributes:
        label: in tables, with the version that it says of itself.
        about: what a reader must know of how it was run.
        requirements: of its environment, torch as ours beside.
        reference: whether it is a checkout, whose folder must be given.
    """

    label: str
    about: str
    requirements: tuple[str, ...]
    reference: bool = False


PEERS = {
    "optipfair": Peer(
        "optipfair {} (not ours)",
        'optipfair {}, `prune_model(model, "MLP_GLU", "MAW", pruning_percentage=..., dataloader=...)` by window',
        ("optipfair==0.4.2", f"transformers=={transformers.__version__}"),
    ),
    "2ssp-authors": Peer(
        "2ssp (authors' code, not ours)",
        "the code of 2SSP's authors ({}), `two_stage_2ssp(model, windows, sparsity)`, its perplexity on the model's "
        "device and windows of the calibration's length",
        ("transformers==4.47.1", "numpy==1.26.4"),
        reference=True,
    ),
}


def environment(peer: Peer, folder: Path, wheels: Path | None) -> Path:
    """The Python of a virtual environment with a peer's requirements, made if it is not there.

    Args:
        wheels: a folder to install from, without asking an index.
    """
    wanted, python, stamp = [TORCH, *peer.requirements], folder / "bin" / "python", folder / "requirements.txt"
    if not stamp.is_file() or stamp.read_text().split() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        places = ["--no-index", "--find-links", str(wheels)] if wheels else []
        subprocess.run([python, "-m", "pip", "install", "--quiet", *places, *wanted], check=True)
        stamp.write_text("\n".join(wanted))
    return python


def pruned(
    name: str, python: Path, job: Mapping[str, Any], tokens: Tokens, folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a peer leaves of a model, and what it says of it: from `folder`, where it did the same job before.

    Raises:
        RuntimeError: it failed; with the last line that it wrote.
    """
    if not (folder / "pruned.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(job))
        save_file({"ids": tokens.ids.contiguous()}, folder / "calibration.safetensors")
        ran = subprocess.run([python, str(SIDE), name, str(folder)], capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError((ran.stderr.strip() or f"exit code {ran.returncode}").splitlines()[-1])
    return load_file(folder / "pruned.safetensors"), json.loads((folder / "pruned.json").read_text())


def narrowed(model: Model, tensors: Mapping[str, torch.Tensor]) -> Model:
    """The dense model, in place, with a peer's tensors: narrower FFNs, and without the modules that have none left. The
    norm before such a module counts as gone, as with our methods, whether the peer left it or not.

    Raises:
        ValueError: tensors that the dense model has not, or too few.
    """
    family = model.family
    if strange := sorted(tensors.keys() - model.hf.state_dict().keys()):
        raise ValueError(f"the dense model has no {strange[0]}")
    for number, block in zip(list(model.numbers), list(model.blocks), strict=True):
        inside = f"{family.blocks}.{number}."
        if not any(name.startswith(f"{inside}{family.attention}.") for name in tensors):
            apply(model, DropAttention(number))
        columns = 1 - row_dim(block.get_submodule(family.mlp_out))
        if (out := tensors.get(f"{inside}{family.mlp_out}.weight")) is None:
            apply(model, DropMLP(number))
        else:
            apply(model, KeepNeurons(number, tuple(range(out.shape[columns]))))
    missing, _ = model.hf.load_state_dict(tensors, strict=False)  # of other shapes: refused by torch
    state = model.hf.state_dict()
    there = {state[name].data_ptr() for name in state.keys() & tensors.keys()}
    if lacking := [name for name in missing if state[name].data_ptr() not in there]:  # but tied ones
        raise ValueError(f"no {lacking[0]} is left")
    return model


@dataclass(frozen=True)
class Bench:
    """A compare folder's model, judging and calibration, as they were.

    Attributes:
        settings: those that the folder was made with.
    """

    folder: GridFolder
    index: Index
    settings: Mapping[str, Any]
    dense: Model
    judge: Judge
    texts: Mapping[str, Tokens]
    tokens: Tokens
    given: argparse.Namespace

    @classmethod
    def of(cls, given: argparse.Namespace) -> Bench:
        """
        Raises:
            OutputExistsError: model, texts or judging are not the folder's.
            SystemExit: the calibration is not that of the folder's cells.
        """
        results, folder = read_results(given.folder), GridFolder(given.folder)
        index, settings = results.index, results.index.settings["grid"]
        dense = secateur.load(given.model, device=given.device, dtype=given.dtype or str(index.versions["dtype"]))
        judge = Judge.of(_judging(index, given.texts), data=given.data, text_field=settings.get("text_field"))
        texts = judge.windows(dense)
        folder.check(make_index(index.kind, dense, judge.judging, texts, [], settings=settings, arguments={}), [])
        tokens = read_tokens(
            dense, given.calibration or settings["calibration"], purpose="calibration", seed=settings["seed"],
            samples=given.samples or settings["samples"] or 32, length=given.length or settings["length"] or 2048,
            count=settings["count"], bos=_BOS[settings.get("bos")], data=given.data,
            text_field=settings.get("text_field"),
        )  # fmt: skip
        shape = {"samples": tokens.samples, "length": tokens.length}
        others = [c for cell in results.done if (c := cell.calibration) and shape.items() <= c.items()]
        if others and tokens.fingerprint() not in {c["fingerprint"] for c in others}:
            raise SystemExit(f"the calibration is not that of the cells in {given.folder}; give theirs")
        return cls(folder, index, settings, dense, judge, texts, tokens, given)

    def job(self, peer: Peer, sparsity: float) -> dict[str, Any]:
        """What a peer is asked for: a share of the blocks' parameters, or as many by neurons alone."""
        layout = self.dense.layout()
        width = min(block.shape.width for block in layout.blocks.values())
        gone = round(sparsity * layout.block_parameters / sum(block.neuron for block in layout.blocks.values()))
        return {
            "sparsity": sparsity, "neurons_percent": 100 * (gone + 0.5) / width,  # peers cut off the fraction
            "length": self.tokens.length, "device": str(self.dense.device), "threads": torch.get_num_threads(),
            "dtype": str(self.dense.dtype).removeprefix("torch."),
            "reference_sha256": _sum_of(self.given.reference) if peer.reference else None,
        }  # fmt: skip

    def cell(self, name: str, sparsity: float) -> CellResult:
        """A peer's cell as it is before it is made: failed."""
        calibration = {**public_facts(self.tokens.source), "fingerprint": self.tokens.fingerprint()}
        return CellResult(
            name=f"{name}-{sparsity:.6g}", method=name, label=name, status="failed", sparsity=sparsity, of="blocks",
            calibration=calibration, created=now(), machine=machine(),
            fingerprint=digest(self.index.judged_by, self.pruning(name, sparsity)),
        )  # fmt: skip

    def pruning(self, name: str, sparsity: float) -> str:
        """sha256 of all that decides what a peer leaves."""
        peer = PEERS[name]
        job = self.job(peer, sparsity)
        return digest(name, [TORCH, *peer.requirements], job, self.tokens.fingerprint(), self.dense.fingerprint())

    def made(self, cell: CellResult, work: Path) -> CellResult:
        """A cell, pruned by its peer and judged; of one that fails, why."""
        given, peer, seconds = self.given, PEERS[cell.method], dict[str, float]()

        @contextmanager
        def part(name: str, *, bars: int = 1) -> Iterator[Observer]:
            began = time.monotonic()
            yield Run().observer
            seconds[name] = time.monotonic() - began

        try:
            if not (dense := work / f"dense-{self.dense.fingerprint()[:12]}").is_dir():
                save(self.dense, dense)
            job = {**self.job(peer, cell.sparsity), "dense": str(dense), "reference": str(given.reference)}
            python = environment(peer, given.environments / cell.method, given.wheels)
            folder = work / self.pruning(cell.method, cell.sparsity)[:12]
            tensors, said = pruned(cell.method, python, job, self.tokens, folder)
            model = narrowed(secateur.load(given.model, device=given.device, dtype=job["dtype"]), tensors)
            before, after = self.dense.layout(), model.layout()
            versions = {f"{package} of {cell.method}": version for package, version in said["versions"].items()}
            cell = structs.replace(
                cell, label=peer.label.format(said["version"]), options=said["options"],
                notes={"others": f"{peer.about.format(said['version'])}; not a method of secateur. It pruned in an "
                       f"environment of its own and is judged as the others are: `{given.command}`"},
                prune=PruneCost(**said["cost"], forwards_asked=said["cost"]["forwards"]), shape=shape(before, after),
                versions={**self.index.versions, **versions}, **sizes(before, after, model),
            )  # fmt: skip
            seconds["prune"] = said["cost"]["wall_s"]
            for fields in judged(self.folder, self.judge, model, self.texts, part, lambda: self.dense):
                cell = structs.replace(cell, **fields)
            return structs.replace(cell, status="done", seconds=seconds)
        except Exception as error:  # as in a grid, it is reported in the cell
            return structs.replace(cell, error=f"{type(error).__name__}: {error}")


_BOS: Mapping[Any, Any] = {True: "always", False: "never", None: "auto"}  # by what a folder says that came of it


def _judging(index: Index, texts: Sequence[str]) -> Judging:
    """A folder's judging. Args: texts: the files among its texts, of which it has the last part of the name only."""
    settings, files = dict(index.settings), {public_name(text): text for text in texts}
    del settings["grid"]
    settings |= {name: tuple(settings[name]) for name in ("tasks", "prompts")}
    settings["texts"] = tuple(files.get(name, name) for name in settings["texts"])
    settings["decodings"] = tuple(convert(settings["decodings"], list[Decoding]))
    return Judging(**{**settings, "bos": _BOS[settings.get("bos")]})


def _sum_of(checkout: Path) -> str:
    """The first digits of the sha256 of a checkout's own code."""
    files = sorted((checkout / "src").glob("*.py"))
    return f"sha256 of src/*.py {hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:12]}"


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of `secateur compare`")
    parser.add_argument("model", help="the folder's")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["optipfair"])
    parser.add_argument("--reference", type=Path, help="a checkout of the repository of 2SSP's authors")
    parser.add_argument("--sparsities", nargs="+", type=float, help="of the blocks' parameters (the folder's)")
    parser.add_argument("--calibration", help="a name or file, where it is not the folder's name")
    parser.add_argument("--samples", type=int, help="of the calibration (the folder's, else 32)")
    parser.add_argument("--length", type=int, help="of its windows (the folder's, else 2,048)")
    parser.add_argument("--texts", nargs="+", default=[], help="the files among the folder's texts")
    parser.add_argument("--data", type=Path, help="folder with the named texts")
    parser.add_argument("--device")
    parser.add_argument("--dtype", help="the folder's")
    parser.add_argument("--work", type=Path, help="keep what was pruned here, to judge it in another folder too")
    parser.add_argument("--environments", type=Path, default=cache_dir() / "peers")
    parser.add_argument("--wheels", type=Path, help="install from this folder, without an index")
    given = parser.parse_args(words)
    given.command = shlex.join(["python", "bench/peers.py", *public_arguments({"": words})[""]])
    if given.reference is None and any(PEERS[name].reference for name in given.peers):
        raise SystemExit("--reference DIR is missing: a checkout of that peer's repository")
    bench = Bench.of(given)
    with TemporaryDirectory() as temporary:
        add_cells(bench, (given.work or Path(temporary)).absolute())


def add_cells(bench: Bench, work: Path) -> None:
    """Make the cells that are not there, each in the table beside those of its size."""
    results, folder, given = read_results(bench.folder.path), bench.folder, bench.given
    asked = [bench.cell(name, size) for size in given.sparsities or results.sparsities for name in given.peers]
    ours = [cell for cell in results.cells if cell.name not in {each.name for each in asked}]
    names = [cell.name for cell in ours]
    for cell in reversed(asked):
        alike = [each.name for each in ours if results.size_of(each) == cell.sparsity] or names[-1:]
        names.insert(names.index(alike[-1]) + 1, cell.name)
    folder.write_index(structs.replace(bench.index, cells=names))
    for cell in asked:
        with claimed(folder.cell_path(cell.name)):
            there = folder.cell(cell.name)
            if there is not None and there.done:
                if there.fingerprint != cell.fingerprint:
                    raise SystemExit(f"{cell.name} is there, on other terms; take its folder away first")
                continue
            print(cell_in_words(folder.write_cell(bench.made(cell, work))), flush=True)
        write_main_table(folder.path, bench.settings["base"])


if __name__ == "__main__":
    main()
