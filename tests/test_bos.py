"""The begin-of-sequence token: who needs it, and that every text is begun by it where it is wanted, and only there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import BOS, tiny, tiny_tokenizer
from msgspec import convert, to_builtins
from oracles import PROPERTY, mean_nll, prepared, write_texts
from studies import comparison, grid
from task_rows import write_rows

import secateur
from secateur.assets import Bos, Instruction, Text
from secateur.card import card
from secateur.engine.tokens import Tokens, bos_id_of, read_tokens, tokenize, wants_bos
from secateur.errors import DataError, InvalidOptionError, OutputExistsError
from secateur.forecast import forecast
from secateur.grid import Ablation, Comparison, Judging, ablate, compare
from secateur.grid.presets import PRESETS
from secateur.heal.data import IGNORED, make_examples
from secateur.heal.recover import RecoveryRequest, prepare_recovery
from secateur.heal.settings import Settings
from secateur.judge.generation import Decoding, generate
from secateur.judge.harness import answer
from secateur.judge.results import Perplexity, TaskResult
from secateur.judge.tasks import judge_tasks, plan_tasks
from secateur.model.family_plugins import checked_row
from secateur.model.handle import Model
from secateur.model.load import Source
from secateur.model.modeling_secateur import FAMILIES
from secateur.planning import Request
from secateur.record import MeasuredPerplexity
from secateur.run import Run

TOKENIZER = tiny_tokenizer(bos=True)
ID: int = TOKENIZER.bos_token_id
# A family, what is asked, and whether its windows are begun.
ASKED: list[tuple[str, Bos, bool]] = [
    ("llama", "auto", False), ("llama", "always", True), ("gemma3_text", "auto", True), ("gemma3_text", "never", False),
]  # fmt: skip
SHORT = Decoding(name="greedy", max_new_tokens=2)
HALF: dict[str, Any] = {"sparsity": 0.5, "method": "shortgpt", "samples": 2, "length": 16}


def spoken(family: str, tokenizer: Any = TOKENIZER) -> Model:
    model = tiny(family)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_texts(tmp_path_factory.mktemp("texts"))


def plain(text: str) -> Text:
    return Text(name="corpus", text=text, conversations=None, provenance={})


def begins(tokens: Tokens) -> bool:
    """Whether all windows are begun, none of them twice; or else none."""
    first, second = (set((tokens.ids[:, place] == ID).tolist()) for place in (0, 1))
    assert len(first) == 1
    assert True not in second
    return first == {True}


# --- who needs it ---


def test_only_families_of_which_it_is_known_need_it() -> None:
    assert {name for name, row in FAMILIES.items() if row.needs_bos} == {"gemma2", "gemma3_text"}
    for row in FAMILIES.values():
        assert wants_bos(row, "auto") is row.needs_bos
        assert (wants_bos(row, "always"), wants_bos(row, "never")) == (True, False)
    assert checked_row({"model_type": "of-a-plugin", "needs_bos": True}).needs_bos
    with pytest.raises(ValueError, match="needs_bos"):
        checked_row({"model_type": "of-a-plugin", "needs_bos": "yes"})


@pytest.mark.parametrize(("family", "bos", "wanted"), ASKED)
def test_a_tokenizer_without_the_token_is_refused_where_it_is_wanted(family: str, bos: Bos, wanted: bool) -> None:
    assert bos_id_of(spoken(family), bos) == (ID if wanted else None)
    lacking = spoken(family, tiny_tokenizer())
    if not wanted:
        assert bos_id_of(lacking, bos) is None
        return
    with pytest.raises(DataError, match="has none"):
        bos_id_of(lacking, bos)


def test_another_word_is_refused_wherever_it_is_given(texts: tuple[Path, Path]) -> None:
    model, word = spoken("llama"), "perhaps"
    before = model.fingerprint()
    with pytest.raises(InvalidOptionError, match="auto, always, never"):
        read_tokens(model, str(texts[0]), purpose="evaluation", length=8, bos=word)  # type: ignore[arg-type]
    ids = torch.arange(32)
    for source, wrong in ((ids, "bos"), (ids.view(2, 16), "bos"), (Tokens.of(ids.view(2, 16)), "count")):
        with pytest.raises(InvalidOptionError, match=f"{wrong} is one of"):
            read_tokens(model, source, purpose="calibration", length=8, **{wrong: word})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="plain text"):
        read_tokens(model, ids, purpose="calibration", length=8, count="responses")
    with pytest.raises(InvalidOptionError, match="auto, always, never"):
        secateur.prune(model, **HALF, calibration=str(texts[0]), bos=word)
    with pytest.raises(InvalidOptionError, match="bos"):
        Settings(bos=word)  # type: ignore[arg-type]
    assert model.fingerprint() == before


# --- windows ---


@PROPERTY
@given(st.text("abc ", min_size=6, max_size=60), st.integers(2, 6), st.integers(0, 2))
def test_each_window_is_a_sequence_of_its_own(text: str, length: int, seed: int) -> None:
    tokens = tokenize(plain(text), TOKENIZER, length=length, bos_id=ID, seed=seed)
    whole = len(text) // (length - 1)
    assert tokens.ids.shape == tokens.weights.shape == (whole, length)
    assert set(tokens.ids[:, 0].tolist()) == {ID}
    assert tokens.weights.min() == 1
    said = [TOKENIZER.decode(row[1:]) for row in tokens.ids]
    parts = [text[start : start + length - 1] for start in range(0, whole * (length - 1), length - 1)]
    assert said == parts if seed == 0 else sorted(said) == sorted(parts)
    assert (tokens.source["bos"], tokens.source["windows_available"]) == (True, whole)


def test_a_window_that_begins_with_the_token_gets_no_second_one() -> None:
    tokens = tokenize(plain(f"{BOS}abcdef{BOS}ghijk"), TOKENIZER, length=4, bos_id=ID)
    assert [TOKENIZER.decode(row) for row in tokens.ids] == [f"{BOS}abc", f"{BOS}def", f"{BOS}ghi"]
    short = tokenize(plain("abcde"), TOKENIZER, length=4, bos_id=ID)
    assert [TOKENIZER.decode(row) for row in short.ids] == [f"{BOS}abc"]
    with pytest.raises(DataError, match="0 windows of 4"):
        tokenize(plain("ab"), TOKENIZER, length=4, bos_id=ID)


def test_ids_as_a_stream_are_cut_alike_and_windows_of_ids_are_taken_as_they_are() -> None:
    model, stream = spoken("gemma3_text"), torch.arange(5, 35)
    tokens = read_tokens(model, stream, purpose="calibration", length=16)
    assert tokens.ids.tolist() == [[ID, *range(5, 20)], [ID, *range(20, 35)]]
    assert tokens.source["bos"] is True
    matrix = stream.view(3, 10)
    assert torch.equal(read_tokens(model, matrix, purpose="calibration", length=16).ids, matrix)
    model.tokenizer = None
    model.hf.config.bos_token_id = 3
    assert read_tokens(model, stream, purpose="calibration", length=16).ids[:, 0].tolist() == [3, 3]


def test_a_rendered_chat_has_it_once_and_it_is_no_response() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = BOS + tokenizer.chat_template  # as Gemma's
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho!"}]
    chat = Text(name="talk", text=None, conversations=(talk,) * 9, provenance={})
    for count, weight in (("all", 1.0), ("responses", 0.0)):
        tokens = tokenize(chat, tokenizer, length=12, count=count, bos_id=ID)  # type: ignore[arg-type]
        assert begins(tokens)
        assert set(tokens.weights[:, 0].tolist()) == {weight}


# --- where texts are read ---


@pytest.mark.parametrize(("family", "bos", "wanted"), ASKED)
def test_a_pruning_is_calibrated_and_judged_alike(
    family: str, bos: Bos, wanted: bool, texts: tuple[Path, Path]
) -> None:
    text, chat = map(str, texts)
    job = prepared(spoken(family), calibration=text, bos=bos, **HALF)
    assert begins(job.tokens) is wanted
    other = prepared(spoken(family), calibration=text, bos="never" if wanted else "always", **HALF)
    assert (job.fingerprint == other.fingerprint, begins(other.tokens)) == (False, not wanted)

    model, dense = spoken(family), spoken(family)
    pruned = secateur.prune(model, calibration=text, bos=bos, **HALF)
    assert pruned.record.calibration["bos"] is wanted  # type: ignore[index]
    assert ("begin-of-sequence" in card(pruned.record)) is wanted

    judging = Judging(texts=(text,), length=16, samples=3, bos=bos)
    report = secateur.evaluate(model, judging, against=dense, fidelity_on=[chat])
    (measured,), (compared,) = report.model.perplexity or (), report.model.fidelity or ()
    assert measured.bos is compared.bos is wanted
    by_hand = tokenize(plain(texts[0].read_text()), TOKENIZER, length=16, samples=3, bos_id=ID if wanted else None)
    assert measured.nll == pytest.approx(mean_nll(model, by_hand), rel=1e-6)
    assert measured.predictions == 3 * 15


@pytest.mark.parametrize(("family", "bos", "wanted"), ASKED)
def test_a_prompt_is_begun_once(family: str, bos: Bos, wanted: bool) -> None:
    model = spoken(family)
    ids = TOKENIZER("Who")["input_ids"]
    assert generate(model, "Who", SHORT, bos=bos).prompt_ids.tolist() == ([ID, *ids] if wanted else ids)
    assert generate(model, f"{BOS}Who", SHORT, bos=bos).prompt_ids.tolist() == [ID, *ids]


class Beginning(type(TOKENIZER)):  # type: ignore[misc]
    """A tokenizer that begins a text with the token by itself, as Llama's does."""

    def __call__(self, text: Any, **options: Any) -> Any:
        texts = text if not options.get("add_special_tokens", True) else BOS + text
        return super().__call__(texts, **options)

    def encode(self, text: str, **options: Any) -> list[int]:
        return list(self(text, **options)["input_ids"])


def beginning() -> Any:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.__class__ = Beginning
    return tokenizer


def first_tokens(model: Model, work: Any) -> list[list[int]]:
    """The first two tokens of all sequences that go through the model meanwhile."""
    seen: list[list[int]] = []

    def look(module: Any, args: Any, options: dict[str, Any]) -> None:
        seen.extend((options["input_ids"] if "input_ids" in options else args[0])[:, :2].tolist())

    handle = model.hf.register_forward_pre_hook(look, with_kwargs=True)
    work()
    handle.remove()
    return seen


@pytest.fixture(scope="module")
def piqa(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return plan_tasks(["piqa"], limit=2, data=write_rows(tmp_path_factory.mktemp("data")))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("family", "bos", "asked"), [(*row[:2], {"auto": True if row[2] else None}.get(row[1], row[2])) for row in ASKED]
)
def test_tasks_are_asked_alike(family: str, bos: Bos, asked: bool | None, own: bool, piqa: Any) -> None:
    """If nothing is wanted or forbidden, as lm-eval itself does: as the tokenizer begins a text."""
    model = spoken(family, beginning() if own else TOKENIZER)
    results: dict[str, TaskResult] = {}
    seen = first_tokens(model, lambda: results.update(judge_tasks(model, piqa, bos=bos)))
    begun = own if asked is None else asked
    assert {first == ID for first, _ in seen} == {begun}
    assert all(second != ID for _, second in seen)
    assert results["piqa"].bos is asked


@pytest.mark.parametrize("own", [False, True])
def test_a_rolling_task_has_it_once(own: bool, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "and then the old dog"}\n')
    config = {
        "task": "rolling", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/rows.jsonl"}},
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    (tmp_path / "rolling.yaml").write_text(json.dumps(config))
    (line,) = plan_tasks([str(tmp_path / "rolling.yaml")])
    model = spoken("gemma3_text", beginning() if own else TOKENIZER)
    kept = {"batch_size": 1, "bos": "auto", "run": Run(), "label": ""}
    seen = first_tokens(model, lambda: answer(model, line.parts, line.sizes, **kept))  # type: ignore[arg-type]
    assert [(first == ID, second == ID) for first, second in seen] == [(True, False)]


def test_models_without_the_token_are_refused_before_they_are_judged(piqa: Any) -> None:
    lacking = spoken("gemma2", tiny_tokenizer())
    lacking.tokenizer.eos_token = "<|im_end|>"  # type: ignore[union-attr]
    for work in (
        lambda: judge_tasks(lacking, piqa),
        lambda: generate(lacking, "Who"),
        lambda: Judging(prompts=("Who",)).check(lacking),
        lambda: Judging(tasks=("piqa",)).check(lacking),
    ):
        with pytest.raises(DataError, match="gemma2 models need a begin-of-sequence token"):
            work()
    assert generate(lacking, "Who", SHORT, bos="never").prompt_ids.tolist() == TOKENIZER("Who")["input_ids"]


@pytest.mark.parametrize("rendered", [False, True])
@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_rows_to_train_on_are_begun(template: Any, rendered: bool) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    if rendered:
        tokenizer.chat_template = BOS + tokenizer.chat_template
    told = tuple(Instruction(instruction=f"Say {word}", input="", output=word) for word in ("one", "two", "ten"))
    rows = Text(name="mine", text="", conversations=None, provenance={}, instructions=told)
    settings = Settings(template=template, max_length=400)
    without, begun = (make_examples(rows, tokenizer, settings, bos_id=each) for each in (None, ID))
    assert (without.facts.bos, begun.facts.bos) == (False, True)
    again = rendered and template == "chat"
    for before, after in zip(
        (*without.train, *without.held_out), (*begun.train, *begun.held_out), strict=True
    ):  # rows are held out by the seed alone
        assert after.ids.tolist() == ([] if again else [ID]) + before.ids.tolist()
        assert after.labels.tolist() == ([] if again else [IGNORED]) + before.labels.tolist()
    assert (without.facts.fingerprint == begun.facts.fingerprint) is again
    windows = make_examples(plain("abcdef" * 8), tokenizer, Settings(max_length=8), bos_id=ID)
    for row in (*windows.train, *windows.held_out):
        assert (row.ids[0], row.labels[0], len(row.ids)) == (ID, IGNORED, 8)


@pytest.mark.parametrize(("family", "bos", "wanted"), ASKED)
def test_a_recovery_begins_its_rows(family: str, bos: Bos, wanted: bool, texts: tuple[Path, Path]) -> None:
    def prepared_with(word: Bos) -> Any:
        settings = Settings(max_length=32, bos=word)
        return prepare_recovery(RecoveryRequest(data=str(texts[0]), settings=settings), spoken(family))

    job = prepared_with(bos)
    assert job.data.bos is wanted
    assert {int(row.ids[0]) == ID for row in (*job.examples.train, *job.examples.held_out)} == {wanted}
    assert job.fingerprint == prepared_with("always" if wanted else "never").fingerprint  # it says the same
    assert job.fingerprint != prepared_with("never" if wanted else "always").fingerprint


# --- grids ---


def test_a_grids_folder_is_of_one_kind_of_windows(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    def load() -> Model:
        return spoken("llama")

    def run(bos: Bos, judged: Bos, *methods: str, out: str = "out") -> Any:
        judging = {"bos": judged, "length": 16, "samples": 2}
        asked = comparison(texts[0], *(methods or ("shortgpt",)), bos=bos, length=16)
        return compare(asked, grid(tmp_path / out, texts[0], load=load, more=judging))

    cells = run("auto", "auto")
    assert cells["shortgpt-0.25"].calibration["bos"] is False
    assert run("never", "auto")["shortgpt-0.25"].created == cells["shortgpt-0.25"].created  # it says the same
    for bos, judged in (("always", "auto"), ("auto", "always"), ("auto", "never")):
        for method in ("shortgpt", "window"):  # a cell that is there, and one to be added
            with pytest.raises(OutputExistsError, match="bos"):
                run(bos, judged, method)  # type: ignore[arg-type]
    begun = run("always", "always", out="begun")
    assert begun["shortgpt-0.25"].calibration["bos"] is True
    assert all(result.bos for cell in begun.values() for result in cell.perplexity.values())

    index = tmp_path / "out" / "compare.json"
    older = json.loads(index.read_text())  # as it was written before it could be asked
    del older["settings"]["bos"], older["settings"]["grid"]["bos"], older["settings"]["grid"]["text_field"]
    index.write_text(json.dumps(older))
    assert set(run("auto", "auto", "shortgpt", "window")) == {"dense", "shortgpt-0.25", "window-0.25"}
    index.write_text(json.dumps(older))
    with pytest.raises(OutputExistsError, match="bos"):
        run("always", "auto", "window")
    body = comparison(texts[0], "window", length=16, text_field="body")
    with pytest.raises(OutputExistsError, match="text_field differ"):
        compare(body, grid(tmp_path / "out", texts[0], load=load, more={"length": 16, "samples": 2}))


def test_an_ablation_is_of_one_kind_of_windows(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    def run(bos: Bos, *seeds: int) -> None:
        asked = Ablation(
            what=("repeats",), method="shortgpt", seeds=seeds, sparsities=(0.25,), calibration=str(texts[0]), samples=2,
            length=16, bos=bos,
        )  # fmt: skip
        ablate(asked, grid(tmp_path, texts[0], load=lambda: spoken("llama"), more={"length": 16, "samples": 2}))

    run("auto", 0)
    run("never", 1)
    with pytest.raises(OutputExistsError, match="bos"):
        run("always", 2)


@pytest.mark.parametrize("name", PRESETS)
def test_the_papers_windows_are_not_begun(name: str) -> None:
    model = tiny("gemma3_text", max_position_embeddings=4096)
    asked = Comparison.from_preset(name)
    assert asked.bos == PRESETS[name].judging.bos == "never"
    if name == "slimgpt-paper":
        assert {cell.calibration.bos for cell in asked.cells(model) if cell.calibration} == {"never"}
    assert Comparison.from_preset(name, bos="always").bos == "always"


# --- what is told ---


def test_older_files_mean_that_no_window_was_begun() -> None:
    measured = {"text": "wikitext2", "samples": 2, "length": 16, "before": 2.0, "after": 3.0}
    older = (
        convert(measured, MeasuredPerplexity), convert({"perplexity": 2.0}, Perplexity),
        convert({"metric": "acc", "value": 0.5}, TaskResult),
    )  # fmt: skip
    assert not any(each.bos for each in older)
    assert to_builtins(older[0]) == measured


def test_a_dry_run_says_what_auto_comes_to(tmp_path: Path) -> None:
    for family in ("llama", "gemma3_text"):
        spoken(family).hf.save_pretrained(tmp_path / family)
    asked = {"sparsity": 0.5, "method": "shortgpt", "length": 16, "samples": 2}
    for family, bos, wanted in ASKED:
        assert forecast(Request(bos=bos, **asked), Source(name=str(tmp_path / family))).bos is wanted  # type: ignore[arg-type]
    ready = Request(calibration=Tokens.of(torch.zeros(2, 16)), bos="always", **asked)  # type: ignore[arg-type]
    assert not forecast(ready, Source(name=str(tmp_path / "llama"))).bos  # ids as given
