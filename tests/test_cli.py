"""The commands, in this process: what they write, what they print where, and how they refuse."""

from __future__ import annotations

import functools
import io
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from models import FAMILY_NAMES, parameters
from oracles import write_model, write_texts
from task_rows import write_rows

import secateur
from secateur import folders
from secateur.cli.app import app
from secateur.cli.prune import method_flags
from secateur.methods import methods, two_ssp
from secateur.signatures import Option
from secateur.surgery.apply import apply
from secateur.surgery.edits import from_json


class Told:
    """What a command said and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        def no_constant(name: str) -> None:
            raise ValueError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=no_constant)


@functools.cache
def command() -> Any:
    """Built once, which typer's own runner would do at each call."""
    return typer.main.get_command(app)


def call(*words: object) -> Told:
    args = [str(word) for word in words]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["secateur", *args])
        patch.setenv("COLUMNS", "200")
        patch.setenv("TERM", "dumb")
        with pytest.raises(SystemExit) as ended:
            command()(args, prog_name="secateur")
    return Told(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SECATEUR_DATA", "SECATEUR_CACHE"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("secateur")
    before = logger.handlers, logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a text and a chat file, which no test changes."""
    folder = tmp_path_factory.mktemp("world")
    plain, chat = write_texts(folder)
    return {"model": write_model(folder / "model"), "plain": plain, "chat": chat}


def prune_words(world: dict[str, Path]) -> tuple[object, ...]:
    return (
        world["model"], "--method", "2ssp", "--sparsity", 0.5, "--calibration", world["plain"], "--samples", 3,
        "--length", 16,
    )  # fmt: skip


@pytest.fixture
def prune(world: dict[str, Path], tmp_path: Path) -> Callable[..., Told]:
    """`secateur prune` with enough options to run; those given come last and win."""

    def run(*words: object, out: Path | None = tmp_path / "out", model: object = None) -> Told:
        return call("prune", model or world["model"], *prune_words(world)[1:], *(["--out", out] if out else []), *words)

    return run


@pytest.fixture(scope="session")
def pruned_once(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "out"
    assert call("prune", *prune_words(world), "--attentions", 1, "--out", folder).code == 0
    return folder


@pytest.fixture
def pruned(pruned_once: Path, tmp_path: Path) -> Path:
    """What `prune("--attentions", 1)` writes, there already."""
    return Path(shutil.copytree(pruned_once, tmp_path / "out"))


def recorded(folder: Path) -> Any:
    return json.loads((folder / "secateur.json").read_text())


def write_ending_model(folder: Path) -> Path:
    """One whose tokenizer has a token that ends a text, as lm-eval needs."""
    write_model(folder)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / file).exists():
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<|im_end|>"}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- prune ---


@pytest.mark.parametrize(
    "words", [(), ("--of", "model", "--sparsity", 0.3), ("--round-to", 8, "--norm", "l1")], ids=str
)
def test_a_pruned_model_with_its_account(
    words: tuple[object, ...], prune: Callable[..., Told], tmp_path: Path, world: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    told = prune(*words, "--attentions", 1)
    assert told.code == 0, told.err
    assert str(out) in told.out
    assert {"config.json", "model.safetensors", "tokenizer.json", "secateur.json", "README.md"} <= set(contents(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = recorded(out)
    assert record["arguments"]["command"][:2] == ["prune", world["model"].name]
    assert str(tmp_path.parent) not in json.dumps(record)  # nobody's private paths
    assert record["arguments"]["command"][-2:] == ["--attentions", "1"]
    assert record["environment"]["threads"] == 1
    replayed = secateur.load(str(world["model"]))
    assert record["model"]["fingerprint"] == replayed.fingerprint()
    assert record["before"]["parameters"] == parameters(replayed)
    for entry in record["edits"]:
        apply(replayed, from_json(entry))
    written = secateur.load(str(out))
    assert replayed.fingerprint() == written.fingerprint()
    assert record["after"]["parameters"] == parameters(written)
    convention = record["sparsity"]["of"]
    assert record["sparsity"]["achieved"][convention] == pytest.approx(record["sparsity"]["asked"], abs=0.03)
    assert f"{parameters(written):,}" in told.out
    assert f"{parameters(written):,}" in (out / "README.md").read_text()
    if "--round-to" in words:
        assert all(len(entry["index"]) % 8 == 0 for entry in record["edits"] if "index" in entry)


def test_the_same_command_again_finds_its_result(prune: Callable[..., Told], pruned: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    again = prune("--attentions", 1)
    assert (again.code, again.err.count(str(pruned))) == (0, 1)
    assert prune("--attentions", 1, "--json").json["fingerprint"] == recorded(pruned)["fingerprint"]
    assert prune("--attentions", 1, "--seed", 1).code == 3  # another pruning's
    assert contents(tmp_path) == before
    assert prune("--attentions", 1, "--seed", 1, "--overwrite").code == 0
    assert recorded(pruned)["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_texts_are_measured_before_and_after(
    prune: Callable[..., Told], tmp_path: Path, world: dict[str, Path]
) -> None:
    words = ("--perplexity", world["plain"], "--eval-samples", 2, "--eval-length", 12, "--json")
    told = prune(*words)
    assert told.code == 0, told.err
    record = recorded(tmp_path / "out")
    alone = {key: record[key] for key in record if key not in ("edits", "parents")}
    assert told.json == {"out": str(tmp_path / "out"), **alone}  # all else went to stderr
    (measured,) = record["perplexity"]
    assert (measured["samples"], measured["length"]) == (2, 12)
    judged = [
        call("eval", model, "--perplexity", world["plain"], "--samples", 2, "--length", 12, "--json").json["model"]
        for model in (world["model"], tmp_path / "out")
    ]
    assert [each["perplexity"][0]["perplexity"] for each in judged] == [
        pytest.approx(measured["before"]), pytest.approx(measured["after"])
    ]  # fmt: skip


@pytest.mark.slow
def test_chat_counts_responses(prune: Callable[..., Told], tmp_path: Path, world: dict[str, Path]) -> None:
    words = ("--calibration", world["chat"], "--length", 60)
    assert prune(*words, "--count", "responses").code == 0
    assert prune(*words, out=tmp_path / "all").code == 0
    records = [json.loads((tmp_path / name / "secateur.json").read_text()) for name in ("out", "all")]
    assert [record["calibration"]["count"] for record in records] == ["responses", "all"]
    assert records[0]["edits"] != records[1]["edits"]


def test_what_the_method_said_of_its_run_is_shown_and_recorded(prune: Callable[..., Told], tmp_path: Path) -> None:
    words = ("--generations", 1, "--offspring", 4, "--initial-tokens", 16, "--selection-tokens", "16, 32")
    told = prune("--method", "evopress", *words)
    assert told.code == 0, told.err
    note = recorded(tmp_path / "out")["notes"]["reduced"]
    assert note.startswith("A reduced EvoPress search: ")
    assert note in told.out
    assert note not in prune(out=tmp_path / "2ssp").out


def test_names_are_no_markup(prune: Callable[..., Told], tmp_path: Path, world: dict[str, Path]) -> None:
    text = tmp_path / "te[bold]xt.txt"
    text.write_bytes(world["plain"].read_bytes())
    out = tmp_path / "[red]out[/]"
    told = prune("--calibration", text, "--perplexity", text, "--eval-length", 16, "--eval-samples", 1, out=out)
    assert told.code == 0, told.err
    assert f"written to {out}" in told.out
    assert f"perplexity, {text.name}" in told.out
    told = prune("--calibration", tmp_path / "[red]none[/].txt")
    assert f"there is no file {tmp_path / '[red]none[/].txt'}" in told.err


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_dry_run_only_tells(family: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family)
    before = contents(tmp_path)
    words = (
        "prune", model, "--method", "2ssp", "--sparsity", 0.4, "--samples", 3, "--length", 16, "--attentions", 1,
        "--dry-run",
    )  # fmt: skip
    told = call(*words)
    assert told.code == 0, told.err
    as_json = call(*words, "--json").json
    assert f"{as_json['parameters']['before']:,} -> {as_json['parameters']['after']:,} parameters" in told.out
    sparsity = as_json["sparsity"]
    assert f"asked for 40.00% of the blocks' parameters, got {sparsity['achieved']['blocks']:.2%}" in told.out
    assert sparsity.get("reason", "got") in told.out.replace("\n", " ")
    words = ("3 x 16 tokens", "peak memory", "disk", f"{as_json['forwards']:.1f} full-length forwards")
    assert [word for word in words if word not in told.out] == []
    assert {"peak_memory_bytes", "disk_bytes", "seconds"} <= set(as_json)
    assert contents(tmp_path) == before


REFUSED: dict[str, tuple[tuple[object, ...], int, str]] = {
    "method": (("--method", "2spp"), 3, "Did you mean '2ssp'?"),
    "text": (("--calibration", "nonsense"), 3, "unknown text 'nonsense'"),
    "missing text": (("--calibration", "./none.txt"), 3, "there is no file"),
    "known text": (("--calibration", "wikitext2", "--data", "."), 3, "wikitext2"),
    "dtype": (("--dtype", "int3"), 3, "float32"),
    "device": (("--device", "abacus"), 3, "abacus"),
    "of": (("--of", "all"), 3, "blocks, model"),
    "sparsity 0": (("--sparsity", 0), 3, "between 0 and 1"),
    "sparsity 1": (("--sparsity", 1), 3, "between 0 and 1"),
    "sparsity nan": (("--sparsity", "nan"), 3, "between 0 and 1"),
    "sparsity 25": (("--sparsity", 25), 3, "between 0 and 1"),
    "sparsity negative": (("--sparsity", -0.1), 3, "between 0 and 1"),
    "sparsity no number": (("--sparsity", "half"), 2, "--sparsity"),
    "sparsity out of reach": (("--sparsity", 0.97, "--attentions", 0), 3, "it reaches 0.02 to 0.584"),
    "round_to": (("--round-to", 0), 3, "round_to"),
    "round_to no number": (("--round-to", "x"), 2, "--round-to"),
    "samples": (("--samples", 4000), 3, "4000 are needed"),
    "no samples": (("--samples", 0), 3, "at least 1 window"),
    "length": (("--length", 65), 3, "positions end at 64"),
    "length 1": (("--length", 1), 3, "at least 2 tokens"),
    "eval length": (("--perplexity", "{plain}", "--eval-length", 65), 3, "positions end at 64"),
    "eval samples": (("--perplexity", "{plain}", "--eval-length", 16, "--eval-samples", 0), 3, "at least 1"),
    "eval text": (("--perplexity", "nonsense", "--eval-length", 16), 3, "unknown text"),
    "count": (("--count", "answers"), 3, "all, responses"),
    "responses": (("--count", "responses"), 3, "plain text"),
    "alpha": (("--alpha", 0), 3, "alpha must be positive"),
    "alpha no number": (("--alpha", "high"), 3, "alpha takes a number"),
    "attentions": (("--attentions", 9), 3, "9 attention modules asked; the model has 4"),
    "attentions no number": (("--attentions", 1.5), 3, "attentions takes a whole number"),
    "norm": (("--norm", "l3"), 3, "norm takes l2 or l1"),
    "contradiction": (("--attentions", 2, "--stage1-only"), 3, "stage1_only"),
    "search": (("--search-samples", 4), 3, "4 windows"),
    "flag": (("--alfa", 2), 2, "--alfa"),
    "log level": (("--log-level", "loud"), 3, "debug, info, warning, error"),
    "log file": (("--log-file", "no/such/folder/log"), 3, "--log-file"),
    "shard size": (("--max-shard-size", "big"), 3, "5GB"),
}  # fmt: skip


BEFORE_WEIGHTS = {  # what a model's configuration tells
    "dtype", "sparsity out of reach", "no samples", "length", "length 1", "eval length", "alpha", "attentions", "norm",
    "contradiction", "search",
}  # fmt: skip
DRY = {"method", "dtype", "device", "of", "sparsity out of reach", "no samples", "length", "alpha", "norm", "search"}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line(
    name: str, prune: Callable[..., Told], tmp_path: Path, world: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, code, message = REFUSED[name]
    words = tuple(str(word).format(**world) for word in words)
    monkeypatch.chdir(tmp_path)
    if name in BEFORE_WEIGHTS:
        monkeypatch.setattr("secateur.model.load.load", lambda *_, **__: pytest.fail("the weights were read first"))
    for told in (prune(*words), *([prune(*words, "--dry-run", out=None)] if name in DRY else [])):
        assert (told.code, told.out, message in told.err) == (code, "", True), told.err
        if code == 3:
            assert told.err.startswith("error: ")
            assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_cannot_is_refused_before_its_weights_are_read(
    prune: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.model.load.load", lambda *_, **__: pytest.fail("the weights were read first"))
    told = prune("--method", "slicegpt", model=write_model(tmp_path / "model", "gpt_neox"))
    assert (told.code, "gpt_neox cannot do Rebase" in told.err) == (3, True), told.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("extra", [(), ("--dry-run",)], ids=str)
def test_a_model_that_is_none_is_refused(extra: tuple[str, ...], prune: Callable[..., Told], tmp_path: Path) -> None:
    told = prune(*extra, model=tmp_path / "missing")
    assert (told.code, told.err) == (3, f"error: there is no folder {tmp_path / 'missing'}\n")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in prune(*extra, model=tmp_path / "empty").err
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    told = prune(*extra, model=tmp_path / "empty")
    assert told.code == 3
    assert f"supported: {', '.join(sorted(FAMILY_NAMES))}" in told.err
    (tmp_path / "empty" / "config.json").write_text("{")
    assert prune(*extra, model=tmp_path / "empty").code == 3
    assert prune(*extra, model="nobody/nothing").code == 3  # offline
    assert not (tmp_path / "out").exists()


# --- interrupted, logged ---


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_a_run_that_ends_early_leaves_nothing(
    prune: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_ssp, "neuron_scores", interrupt)
    told = prune()
    assert (told.code, told.out, told.err.count("\n")) == (130, "", 1)
    monkeypatch.setattr(two_ssp, "neuron_scores", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug shows itself whole
        prune()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_what_was_there(
    prune: Callable[..., Told], pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(tmp_path)
    monkeypatch.setattr(folders, "_sync", interrupt)  # all is written, and not yet in its place
    for out, words in ((pruned, ("--overwrite",)), (tmp_path / "new", ())):
        assert prune("--attentions", 2, *words, out=out).code == 130
        kept = {name for name in contents(tmp_path) if ".run/" in name}
        assert kept  # what the run computed
        assert {name: content for name, content in contents(tmp_path).items() if name not in kept} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.run", "new.run"}


def test_the_log_file_tells_of_the_run_and_of_its_error(prune: Callable[..., Told], tmp_path: Path) -> None:
    told = prune("--alpha", 0, "--log-file", tmp_path / "log")
    assert (told.code, told.err.count("alpha must be positive")) == (3, 1)
    assert "ERROR secateur.cli alpha must be positive" in (tmp_path / "log").read_text()
    told = prune("--attentions", 2, "--log-file", tmp_path / "log")
    assert (told.code, "INFO" in told.err) == (0, False)
    assert (tmp_path / "log").read_text().count("without the attention of block") == 2
    assert "INFO 2ssp: " in prune("--attentions", 2, "--log-level", "info", out=tmp_path / "other").err


# --- the other commands ---


def test_evaluations_are_added_to_the_record(pruned: Path, world: dict[str, Path]) -> None:
    before = recorded(pruned)
    words = ("--perplexity", world["plain"], "--length", 12, "--samples", 2)
    plain = call("eval", pruned, *words, "--against", world["model"], "--generate", "and then")
    assert plain.code == 0, plain.err
    for fact in ("parameters", "perplexity", "2 x 12", "and then", f"{before['after']['parameters']:,}", "%"):
        assert fact in plain.out
    as_json = call("eval", pruned, *words, "--json", "--inference", "--prompt-length", 8, "--rounds", 1)
    assert as_json.code == 0, as_json.err
    after = recorded(pruned)
    first, second = after.pop("evaluations")
    assert before.pop("evaluations") == []
    assert after == before
    assert {"created", "dtype", "model", "against"} == set(first)
    assert first["against"]["perplexity"][0]["perplexity"] != first["model"]["perplexity"][0]["perplexity"]
    told = as_json.json
    for each, place in zip(told.values(), (pruned, world["model"]), strict=False):
        assert each["name"] == str(place)
        assert each["perplexity"][0]["text"] == str(world["plain"])
        each["name"], each["perplexity"][0]["text"] = place.name, world["plain"].name  # the record is published
    assert {key: second[key] for key in told} == told
    assert as_json.json["model"]["inference"]["throughput_tokens_s"] > 0
    assert len(call("inspect", pruned, "--json").json["evaluations"]) == 2


@pytest.mark.slow
def test_tasks_stand_in_the_table_and_in_the_record(
    prune: Callable[..., Told], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, dense, out = write_rows(tmp_path / "data"), write_ending_model(tmp_path / "dense"), tmp_path / "out"
    assert prune("--attentions", 1, model=dense).code == 0
    words = ("eval", out, "--tasks", "winogrande, copa", "--tasks", "arc_easy", "--data", data)
    shown = call(*words, "--against", dense)
    assert shown.code == 0, shown.err
    (line,) = (line for line in shown.out.splitlines() if line.startswith("arc_easy"))
    figure = r"[\d.]+ ± [\d.]+ %"
    assert re.fullmatch(rf"arc_easy, acc, 4.*? {figure} +{figure} +[+-][\d.]+ points *", line)
    assert "near chance: what it is judged against is within 3 standard errors of it" in shown.out
    told = call(*words, "--limit", 2, "--fewshot", 0, "--json").json["model"]["tasks"]
    assert {name: each["documents"] for name, each in told.items()} == {"winogrande": 2, "copa": 2, "arc_easy": 2}
    text = (out / "secateur.json").read_text()
    first, second = json.loads(text)["evaluations"]
    assert (set(first["against"]["tasks"]), second["model"]["tasks"]) == (set(told), told)
    assert str(tmp_path) not in text
    assert re.search(r'"per_document": \[\d\.0, \d\.0, \d\.0, \d\.0\],\n', text)  # on one line: there may be thousands


def test_tasks_are_refused_before_the_model_is_judged(world: dict[str, Path], tmp_path: Path) -> None:
    write_rows(tmp_path)
    words = ("eval", world["model"], "--perplexity", world["plain"], "--length", 12, "--tasks", "piqa")
    for given, says in (
        (("--data", tmp_path, "--limit", 0), "limit must be at least 1, not 0"),
        (("--data", tmp_path, "--fewshot", 1), "only the split 'validation', which is judged"),
        (("--data", tmp_path / "downstream"), "no rows of piqa"),
    ):
        told = call(*words, *given)
        assert (told.code, told.out) == (3, "")
        assert says in told.err


def test_a_dense_model_is_judged_and_left_alone(world: dict[str, Path]) -> None:
    before = contents(world["model"])
    told = call("eval", world["model"], "--generate", "and then", "--json")
    assert told.code == 0
    assert told.json["model"]["generation"]["samples"][0]["prompt"] == "and then"
    assert contents(world["model"]) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "nothing to do"), (("--perplexity", "nonsense", "--length", 16), "unknown text"),
     (("--perplexity", "{plain}"), "positions end at 64"), (("--generate", ""), "prompt is empty"),
     (("--fidelity", "{chat}", "--length", 60), "give it as --against"),
     (("--inference", "--rounds", 0), "rounds must be at least 1, not 0"),
     (("--perplexity", "{plain}", "--fail-if", "kl>0.1", "--length", 16), "unknown figure 'kl'"),
     (("--perplexity", "{plain}", "--fail-if", "ppl", "--length", 16), "'ppl' is no condition"),
     (("--inference", "--device", "abacus"), "abacus"), (("--inference", "--against", "./none"), "no folder")],
    ids=str,
)  # fmt: skip
def test_eval_refuses_in_one_line(words: tuple[str, ...], message: str, world: dict[str, Path]) -> None:
    told = call("eval", world["model"], *(str(word).format(**world) for word in words))
    assert (told.code, told.out, told.err.count("\n")) == (3, "", 1)
    assert message in told.err


def test_eval_reads_no_weights_before_it_knows_the_names(
    world: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.model.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    words = ("--perplexity", world["plain"], "--length", 16, "--fail-if", "kl>0.1")
    assert call("eval", world["model"], *words).code == 3


def test_a_gate_ends_with_a_code_of_its_own(pruned: Path, world: dict[str, Path]) -> None:
    words = (
        "eval", pruned, "--against", world["model"], "--fidelity", world["chat"], "--perplexity", world["plain"],
        "--length", 60, "--samples", 2,
    )  # fmt: skip
    passed = call(*words, "--fail-if", "top1>1", "--fail-if", "ppl<1")
    assert passed.code == 0, passed.err
    failed = call(*words, "--fail-if", "top1>1", "--fail-if", "kl>0", "--fail-if", "ppl>1")
    assert failed.code == 4
    for line in ("failed, kl>0: kl:chat.jsonl is ", f"failed, ppl>1: ppl:{world['plain'].name} is "):
        assert line in failed.err
    assert "top1>1" not in failed.err
    for told in (passed, failed):
        for fact in ("loss of responses, chat.jsonl, 2 x 60", "KL, chat.jsonl", "top-1 agreement, chat.jsonl", "±"):
            assert fact in told.out
    as_json = call(*words, "--fail-if", "kl>0", "--json")
    assert as_json.code == 4
    assert [each["condition"] for each in as_json.json["failed"]] == ["kl>0"]
    kept = recorded(pruned)["evaluations"]
    assert [len(each["failed"]) for each in kept] == [0, 2, 1]  # a judgement that fails is kept too
    assert kept[0]["model"]["fidelity"][0]["text"] == "chat.jsonl"


def test_the_cost_of_running_is_shown_side_by_side(world: dict[str, Path]) -> None:
    told = call(
        "eval", world["model"], "--against", world["model"], "--inference", "--prompt-length", 8, "--new-tokens", 2,
        "--rounds", 2, "--batch-size", 3,
    )  # fmt: skip
    assert told.code == 0, told.err
    for fact in ("prompt of 3 x 8, ms", "each further token, ms", "throughput, tokens/s", "KV cache, bytes per token",
                 "peak memory, MB", "peak memory: tensors alive at once", "+0.0%"):  # fmt: skip
        assert fact in told.out


@pytest.mark.slow
def test_the_references_prompts_have_its_beams(world: dict[str, Path]) -> None:
    told = call("eval", world["model"], "--generate", "2ssp", "--generate", "and then", "--json")
    assert told.code == 0, told.err
    samples = told.json["model"]["generation"]["samples"]
    prompts = ["Who is Albert Einstein?", "The theory of relativity", "and then"]
    assert [each["prompt"] for each in samples] == [prompt for prompt in prompts for _ in range(2)]
    assert [each["settings"]["num_beams"] for each in samples] == [1, 5] * 3
    plain = call("eval", world["model"], "--generate", "and then", "--against", world["model"]).out
    for fact in ("greedy agreement", "100.0%", "distinct pairs, greedy text", "model, greedy: and then"):
        assert fact in plain
    assert "2ssp" not in plain
    assert "model, 2ssp: and then" in call("eval", world["model"], "--generate", "and then", "--beams").out


def test_perplexities_of_other_tokens_are_shown_apart(world: dict[str, Path], tmp_path: Path) -> None:
    """A tokenizer of another kind reads the same text as other tokens."""
    other = write_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = call(
        "eval", world["model"], "--against", other, "--perplexity", world["plain"], "--length", 12, "--samples", 2
    )
    assert told.code == 0, told.err
    assert "other tokens" in told.out
    assert "different tokens" in told.out


def test_a_damaged_record_is_told(prune: Callable[..., Told], pruned: Path) -> None:
    (pruned / "secateur.json").write_text("{")
    for words in (("inspect", pruned), ("eval", pruned, "--generate", "a")):
        told = call(*words)
        assert (told.code, "secateur.json" in told.err) == (3, True)
    assert prune("--attentions", 1).code == 3


def test_inspect_shows_what_is_there(pruned: Path, tmp_path: Path, world: dict[str, Path]) -> None:
    record = recorded(pruned)
    gone = record["edits"][-1]["block"]
    for file in pruned.glob("*.safetensors"):
        file.unlink()  # no weights are read
    shown = call("inspect", tmp_path / "out", "--json").json
    assert shown["parameters"] == record["after"]["parameters"]
    assert shown["native"] is True
    assert [block["kv_heads"] for block in shown["blocks"]] == [0 if n == gone else 4 for n in range(4)]
    assert [block["width"] for block in shown["blocks"]] == [len(entry["index"]) for entry in record["edits"][:4]]
    assert shown["pruned"]["edits"] == {"KeepNeurons": 4, "DropAttention": 1}
    assert shown["pruned"]["sparsity"] == record["sparsity"]
    told = call("inspect", tmp_path / "out").out
    for fact in ("none", "pruned by 2ssp", "4 KeepNeurons, 1 DropAttention", f"{shown['parameters']:,}"):
        assert fact in told
    dense = call("inspect", world["model"], "--json").json
    assert (dense["native"], dense["family"], dense["hidden_size"], dense["dtype"]) == (False, "llama", 32, "float32")
    assert "pruned" not in dense
    assert call("inspect", world["model"]).out.count("0-3") == 1
    assert call("inspect", tmp_path / "none").code == 3


def test_methods_are_listed() -> None:
    listed = call("methods", "--json").json
    assert set(listed) == set(methods())
    for name, each in listed.items():
        known = methods()[name]
        assert each["calibration"] == {"samples": known.samples, "length": known.length}
        assert {o: facts["default"] for o, facts in each["options"].items()} == known.complete({})
    bibtex = call("methods", "--bibtex").out
    plain = call("methods").out
    for name, known in methods().items():
        assert known.bibtex in bibtex
        assert name in plain
        assert known.paper in plain
        for option in known.options.values():
            assert f"  --{option.name.replace('_', '-')} ({option.default_in_words}): " in plain
    assert "(None)" not in plain
    assert "(False)" not in plain


def test_citing_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.forecast.forwards_by_method", interrupt)
    assert call("methods", "demo", "--bibtex").code == 0


def test_an_option_that_cannot_be_a_flag_is_told_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    word, switch = Option("order", (str,), "x", "A word."), Option("order", (bool,), False, "A switch.")
    data = Option("data", (str,), None, "As ours.")
    ours, theirs = {"order": word}, {"order": switch, "data": data, "loud": replace(switch, name="loud")}
    flags = method_flags({"ours": ours, "theirs": theirs}, {"data"})
    assert [flag.name for flag in flags] == ["order", "loud"]
    assert [line.count(" of theirs ") for line in capsys.readouterr().err.splitlines()] == [1, 1]


def test_methods_say_what_they_take_on_a_model(world: dict[str, Path]) -> None:
    listed = call("methods", world["model"], "--sparsity", 0.5, "--json").json
    plain = call("methods", world["model"], "--sparsity", 0.5).out
    for name, known in methods().items():
        cost = listed[name]["cost"]
        if name == "evopress":  # the model's positions end at 64, and its selections want more tokens than that gives
            assert "tokens" in cost["refused"]
            continue
        assert cost["samples"] == known.samples
        assert 0 < cost["forwards"] <= cost["forwards_asked"]
        assert f"{cost['forwards']:,.1f} full-length forwards (of {cost['forwards_asked']:,.1f} asked for)" in plain
        assert known.needs in plain
    head = 97 / (4 * parameters_of_a_block(world["model"]) / 32 + 97)  # its share of a forward
    assert listed["shortgpt"]["cost"]["forwards"] == pytest.approx(128 * (1 - head))
    assert listed["shortgpt"]["cost"]["forwards_asked"] == 128
    assert "cost" not in call("methods", "--json").json["2ssp"]
    refused = call("methods", world["model"], "--sparsity", 0.99)
    assert refused.code == 0
    assert "refused: 0.99 of the parameters of the blocks is nearest to 4 of 4 blocks" in refused.out
    assert call("methods", world["model"], "--sparsity", 2).code == 3
    assert call("methods", world["model"], "--of", "layers").code == 3


def parameters_of_a_block(folder: Path) -> float:
    return call("inspect", folder, "--json").json["block_parameters"] / 4


def test_the_methods_options_are_flags_of_prune() -> None:
    shown = call("prune", "--help")
    assert shown.code == 0
    for name, known in methods().items():
        for option in known.options.values():
            assert "--" + option.name.replace("_", "-") in shown.out
            assert name in shown.out
            assert option.help.split(";")[0].split(".")[0][:20] in shown.out


def test_only_the_demo_and_the_rows_can_be_fetched() -> None:
    told = call("fetch", "nonsense")
    assert (told.code, told.out, told.err.count("demo, tasks")) == (3, "", 1)


def test_usage(prune: Callable[..., Told]) -> None:
    nowhere = prune(out=None)
    assert (nowhere.code, "--out" in nowhere.err) == (3, True)
    assert call("--version").out == secateur.__version__ + "\n"
    nothing = call()
    assert nothing.code in (0, 2)  # as this version of click has it
    assert all(command in nothing.out + nothing.err for command in ("prune", "eval", "inspect", "methods", "fetch"))
    assert call("prun").code == 2
    assert call("prune").code == 2
