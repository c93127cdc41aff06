"""transformers' own verbs on a pruned model, adopted or loaded: resize, tie, cast, copy, pickle, train, other heads.

After each of them the model can be saved and loaded again, and is the same.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import (
    FAMILY_NAMES,
    REBASABLE,
    VOCABULARY,
    apply_all,
    logits,
    tiny_hf,
    tiny_in,
    tiny_tokenizer,
    whole_load,
)
from peft.utils import constants
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)
from transformers.pytorch_utils import Conv1D

from secateur.errors import UnsupportedModelError
from secateur.export import save
from secateur.hf import quiet_transformers
from secateur.model.handle import Model
from secateur.model.modeling_secateur import FAMILIES, PREFIX, classes
from secateur.surgery.edits import FoldNorms, KeepNeurons, Rebase

slow = pytest.mark.slow
IDS = torch.randint(5, 90, (2, 11), generator=torch.Generator().manual_seed(1))
WITHOUT_SOME = "sliced stream and more"  # attention of block 0, MLP, KV heads, a block; and all of it rebased
LAYOUTS = [(family, "everything", None) for family in FAMILY_NAMES]
LAYOUTS += [("llama", layout, None) for layout in ("all attentions missing", "mixed KV groups", "one block left")]
LAYOUTS += [(family, WITHOUT_SOME, tied) for family in REBASABLE for tied in (True, False)]
LAYOUTS += [("llama", "rotated stream", tied) for tied in (True, False)]
FAST = ("llama", WITHOUT_SOME, True)


def _cases(*fast: tuple[str, str, bool | None]) -> pytest.MarkDecorator:
    cases = [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in LAYOUTS]
    return pytest.mark.parametrize(("family", "layout", "tied"), cases)


every_layout, every_layout_slowly = _cases(FAST), _cases()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


def both(family: str, layout: str, tied: bool | None, folder: Path) -> list[Any]:
    """The pruned model as it was adopted, and as it is loaded again; its head tied or not, or as the family has it."""
    model = tiny_in(layout, family, **({} if tied is None else {"tie_word_embeddings": tied}))
    save(model, folder)
    return [model.hf, whole_load(folder)]


def assert_whole(hf: Any, folder: Path) -> Any:
    """Saved and loaded again, it is the same, and generates with a cache as without.

    Returns:
        What was loaded.
    """
    hf.eval().save_pretrained(folder)
    again = whole_load(folder)
    expected = logits(hf, IDS)
    assert torch.equal(logits(again, IDS), expected)
    assert again.config.vocab_size == expected.shape[-1] == again.get_input_embeddings().num_embeddings
    assert is_tied(again) == is_tied(hf) == again.config.tie_word_embeddings
    one, other = (
        again.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=cached)
        for cached in (True, False)
    )
    assert torch.equal(one, other)
    return again


def is_tied(hf: Any) -> bool:
    return hf.get_output_embeddings().weight is hf.get_input_embeddings().weight


# --- the vocabulary ---


@every_layout
def test_the_vocabulary_is_resized(family: str, layout: str, tied: bool | None, tmp_path: Path) -> None:
    for number, hf in enumerate(both(family, layout, tied, tmp_path / "pruned")):
        for step, (tokens, multiple, size) in enumerate(((105, None, 105), (None, 64, 128), (91, None, 91))):
            before = logits(hf, IDS)
            hf.resize_token_embeddings(tokens, pad_to_multiple_of=multiple, mean_resizing=step == 0)
            after = logits(hf, IDS)
            assert after.shape[-1] == size
            kept = min(size, before.shape[-1])
            assert torch.equal(after[..., :kept], before[..., :kept])
        assert_whole(hf, tmp_path / f"resized {number}")


def test_added_tokens_come_along(tmp_path: Path) -> None:
    """And the model, whose layout was asked before, is pruned on from there."""
    model = tiny_in("sliced stream and more", "llama")
    model.tokenizer = tiny_tokenizer()
    assert model.layout().ends.vocabulary == VOCABULARY
    model.tokenizer.add_tokens(["<tool>", "</tool>"])
    model.hf.resize_token_embeddings(VOCABULARY + 2)
    assert model.layout().ends.vocabulary == VOCABULARY + 2
    apply_all(model, [KeepNeurons(0, (0, 1))])
    save(model, tmp_path / "pruned")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    assert len(tokenizer("<tool>")["input_ids"]) == 1
    assert torch.equal(logits(whole_load(tmp_path / "pruned"), IDS), logits(model, IDS))


@pytest.mark.slow
def test_sizes_that_an_older_checkpoint_states_twice_do_no_harm(tmp_path: Path) -> None:
    hf = tiny_in("sliced stream and more", "llama").hf
    hf.config.stream_ends |= {"vocabulary": VOCABULARY, "hidden": hf.config.hidden_size, "tied": False}
    assert_whole(hf, tmp_path / "old")
    loaded = whole_load(tmp_path / "old")
    loaded.resize_token_embeddings(94)
    assert_whole(loaded, tmp_path / "resized")


# --- the head ---


@every_layout_slowly
def test_a_tied_head_is_untied_and_tied_again(family: str, layout: str, tied: bool | None, tmp_path: Path) -> None:
    for number, hf in enumerate(both(family, layout, tied, tmp_path / "pruned")):
        if not is_tied(hf):
            continue
        before, head = logits(hf, IDS), hf.get_output_embeddings()
        hf.config.tie_word_embeddings = False
        head.weight = nn.Parameter(1.5 * head.weight.detach())
        untied = assert_whole(hf, tmp_path / f"untied {number}")
        assert not torch.equal(logits(untied, IDS), before)
        untied.config.tie_word_embeddings = True
        untied.tie_weights()
        tied = assert_whole(untied, tmp_path / f"tied {number}")
        assert torch.equal(logits(tied, IDS), before)


@pytest.mark.slow
def test_a_model_that_its_user_untied_is_sliced_as_any(tmp_path: Path) -> None:
    """The maps beside its matrices stay, and the layout is foretold."""
    hf = tiny_in("sliced stream", "llama", tie_word_embeddings=True).hf
    hf.config.tie_word_embeddings = False
    hf.get_output_embeddings().weight = nn.Parameter(hf.get_output_embeddings().weight.detach().clone())
    model, same = Model(hf), Model(copy.deepcopy(hf))
    ends = model.layout().ends
    assert (ends.tied, ends.input_map, ends.output_map) == (False, True, True)
    sites = [0, 8]
    apply_all(model, [Rebase(site, torch.eye(width := model.layout().stream_width(site))) for site in sites])
    assert model.layout() == same.layout()
    assert torch.allclose(logits(model, IDS), logits(same, IDS), atol=1e-5)
    assert width > 0
    assert_whole(model.hf, tmp_path / "again")


@pytest.mark.parametrize("layout", ["sliced stream", pytest.param("rotated stream", marks=pytest.mark.slow)])
def test_ends_in_other_coordinates_are_not_tied(layout: str, tmp_path: Path) -> None:
    for hf in both("llama", layout, False, tmp_path / "pruned"):
        hf.config.tie_word_embeddings = True
        with pytest.raises(ValueError, match="other coordinates"):
            hf.tie_weights()
        hf.config.save_pretrained(tmp_path / "pruned")  # not by an edited configuration either
        with pytest.raises(ValueError, match="other coordinates"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")


# --- dtypes and copies ---


@every_layout_slowly
def test_a_cast_is_saved(family: str, layout: str, tied: bool | None, tmp_path: Path) -> None:
    adopted, loaded = both(family, layout, tied, tmp_path / "pruned")
    for hf, dtype in ((adopted.to(torch.bfloat16), torch.bfloat16), (loaded.half(), torch.float16)):
        weights = hf.state_dict()
        hf.save_pretrained(tmp_path / str(dtype))
        again = whole_load(tmp_path / str(dtype))  # whose buffers are float32, as a stock model's
        assert all(torch.equal(weights[name], tensor) for name, tensor in again.state_dict().items())
        assert again.dtype == dtype
        assert_whole(again, tmp_path / "again")
    assert (
        assert_whole(whole_load(tmp_path / "pruned", dtype=torch.bfloat16), tmp_path / "cast").dtype == torch.bfloat16
    )


@every_layout
def test_copies_and_pickles_are_the_model(family: str, layout: str, tied: bool | None, tmp_path: Path) -> None:
    for number, hf in enumerate(both(family, layout, tied, tmp_path / "pruned")):
        file = io.BytesIO()
        torch.save(hf, file)
        file.seek(0)
        copies = [copy.deepcopy(hf), pickle.loads(pickle.dumps(hf)), torch.load(file, weights_only=False)]
        expected = logits(hf, IDS)
        for other in copies:
            assert type(other) is type(hf)
            assert torch.equal(logits(other, IDS), expected)
            assert other.config is not hf.config
            with torch.no_grad():
                other.get_input_embeddings().weight.mul_(2)
        assert_whole(copies[number], tmp_path / f"copy {number}")
        assert torch.equal(logits(hf, IDS), expected)
        assert pickle.loads(pickle.dumps(hf.config)).to_dict() == hf.config.to_dict()


@every_layout_slowly
def test_weights_go_in_and_out(family: str, layout: str, tied: bool | None, tmp_path: Path) -> None:
    hf = both(family, layout, tied, tmp_path / "pruned")[1]
    other = AutoModelForCausalLM.from_config(hf.config).eval()
    assert other.num_parameters() == hf.num_parameters()
    other.load_state_dict(hf.state_dict())
    assert torch.equal(logits(other, IDS), logits(hf, IDS))
    other.set_input_embeddings(other.get_input_embeddings())
    assert_whole(other, tmp_path / "again")


# --- one configuration ---


@every_layout
def test_all_of_a_model_reads_the_configuration_that_its_user_sees(
    family: str, layout: str, tied: bool | None, tmp_path: Path
) -> None:
    for hf in both(family, layout, tied, tmp_path / "pruned"):
        expected = logits(hf, IDS)
        hf.config.use_cache = False
        hf.config.output_hidden_states = True
        with torch.no_grad():
            out = hf(input_ids=IDS)
        assert not {"past_key_values", "cache"} & out.keys()
        assert len(out.hidden_states) == hf.config.num_hidden_layers + 1
        hf.set_attn_implementation("eager")
        hf.config.output_attentions = True
        assert torch.allclose(logits(hf, IDS), expected, atol=1e-5)
        with torch.no_grad():
            seen = hf(input_ids=IDS).attentions  # which only the eager one gives
        row = FAMILIES[family]
        there = sum(hasattr(block.get_submodule(row.attention), row.head_dim) for block in hf.get_submodule(row.blocks))
        assert sum(each is not None for each in seen) == there


def test_a_configuration_goes_through_its_own_verbs(tmp_path: Path) -> None:
    for layout in ("everything", "sliced stream and more"):
        hf = tiny_in(layout, "llama").hf
        hf.save_pretrained(tmp_path / layout)
        config = AutoConfig.from_pretrained(tmp_path / layout)
        assert type(config) is type(hf.config)
        passing = {"dtype", "architectures", "transformers_version", "_name_or_path"}
        one, other = ({k: v for k, v in each.to_dict().items() if k not in passing} for each in (config, hf.config))
        assert one == other
        assert set(config.to_diff_dict()) <= set(config.to_dict())
        assert json.loads(config.to_json_string())["per_layer_config"]
        blocks = len(config.per_layer_config)
        with pytest.raises(ValueError, match=f"nothing of block {blocks}"):
            AutoModelForCausalLM.from_pretrained(tmp_path / layout, num_hidden_layers=blocks + 1)


# --- training ---


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@every_layout_slowly
def test_gradient_checkpointing_changes_no_gradient(
    family: str, layout: str, tied: bool | None, tmp_path: Path
) -> None:
    hf = both(family, layout, tied, tmp_path / "pruned")[1]
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, torch.Tensor]:
        hf.zero_grad()
        hf.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}

    plain = gradients()
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in gradients().items():
        assert torch.allclose(gradient, plain[name], atol=1e-5), name
    hf.gradient_checkpointing_disable()
    assert_whole(hf, tmp_path / "again")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@every_layout_slowly
def test_adapters_are_trained_saved_and_merged(family: str, layout: str, tied: bool | None, tmp_path: Path) -> None:
    hf = both(family, layout, tied, tmp_path / "pruned")[1]
    linears = {name for name, module in hf.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    inside = sorted(name for name in linears if name.startswith(FAMILIES[family].blocks))
    if not inside:
        return
    settings = peft.LoraConfig(r=2, target_modules=inside, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(hf, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    expected = logits(adapted, IDS)
    adapted.save_pretrained(tmp_path / "adapter")
    base = whole_load(tmp_path / "pruned")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    assert torch.allclose(logits(merged, IDS), expected, atol=1e-3)
    assert_whole(merged, tmp_path / "merged")


ADAPTED = [name for name in FAMILY_NAMES if name in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("family", [*ADAPTED[:1], *(pytest.param(f, marks=slow) for f in ADAPTED[1:])])
def test_adapters_find_their_places_by_themselves(family: str, tmp_path: Path) -> None:
    """Without `target_modules` they go where PEFT puts them in the stock model, as far as that is there."""
    settings = {"r": 2, "task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2"}
    for hf in both(family, "everything", None, tmp_path / "pruned"):
        there = {name for name, _ in hf.named_modules()}
        adapted = peft.get_peft_model(hf, peft.LoraConfig(**settings))
        dense = peft.get_peft_model(tiny_hf(family), peft.LoraConfig(**settings))
        found, wanted = (
            {name.split(".lora_A")[0] for name, _ in each.get_base_model().named_parameters() if "lora_A" in name}
            for each in (adapted, dense)
        )
        assert {name.rpartition(".")[2] for name in found} <= {name.rpartition(".")[2] for name in wanted}
        assert found
        assert found <= there
        adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
        assert_whole(adapted.merge_and_unload(), tmp_path / "merged")


# --- as others run it ---


@every_layout_slowly
def test_it_is_spread_over_memory_and_disk(family: str, layout: str, tied: bool | None, tmp_path: Path) -> None:
    """By accelerate, which moves the weights of a module when it is called."""
    assert_spreads(family, layout, tied, tmp_path)


def test_one_layout_is_spread_over_memory_and_disk(tmp_path: Path) -> None:
    assert_spreads(*FAST, tmp_path)


def assert_spreads(family: str, layout: str, tied: bool | None, folder: Path) -> None:
    whole, settings = both(family, layout, tied, folder / "pruned")[0], {"max_new_tokens": 3, "do_sample": False}
    expected, written = logits(whole, IDS), whole.generate(IDS, pad_token_id=0, **settings)
    size = sum(path.stat().st_size for path in (folder / "pruned").glob("*.safetensors"))
    for device_map, memory in (("auto", None), ({"": "cpu"}, None), ("auto", {"cpu": size * 2 // 3})):
        hf = whole_load(folder / "pruned", device_map=device_map, max_memory=memory, offload_folder=str(folder / "off"))
        assert torch.equal(logits(hf, IDS), expected)
        assert torch.equal(hf.generate(IDS, pad_token_id=0, **settings), written)


@pytest.mark.parametrize("layout", ["everything", pytest.param(WITHOUT_SOME, marks=slow)])
def test_a_pipeline_writes_the_same_alone_and_in_a_batch(layout: str, tmp_path: Path) -> None:
    model = tiny_in(layout, "llama")
    model.tokenizer = tiny_tokenizer()
    save(model, tmp_path / "pruned")
    options = {"max_new_tokens": 4, "do_sample": False}
    for dtype in (torch.float32, torch.bfloat16):
        write = pipeline("text-generation", model=str(tmp_path / "pruned"), dtype=dtype, device="cpu")
        assert write.model.dtype == dtype
        prompts = ["One prompt.", "Another, which is longer."]
        alone = [write(prompt, **options)[0]["generated_text"] for prompt in prompts]
        batch = [answer[0]["generated_text"] for answer in write(prompts, batch_size=2, **options)]
        assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
        assert batch == alone or dtype == torch.bfloat16  # whose sums depend on the batch


# --- other heads ---


@every_layout
def test_the_model_without_its_head(family: str, layout: str, tied: bool | None, tmp_path: Path) -> None:
    adopted = both(family, layout, tied, tmp_path / "pruned")[0]
    base, info = AutoModel.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        expected = adopted.base_model(input_ids=IDS).last_hidden_state
        assert torch.equal(base.eval()(input_ids=IDS).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        assert torch.equal(whole_load(tmp_path / "base", AutoModel)(input_ids=IDS).last_hidden_state, expected)
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        Model(base)  # nothing to judge a pruning by


@every_layout_slowly
def test_other_heads(family: str, layout: str, tied: bool | None, tmp_path: Path) -> None:
    """Only the head itself is new, and transformers says so; where it has no such class for the family, it refuses."""
    both(family, layout, tied, folder := tmp_path / "pruned")
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        options = {"num_labels": 3, "pad_token_id": 0}
        if auto.__name__ not in classes(family):
            with pytest.raises(ValueError, match="Unrecognized configuration class"):
                auto.from_pretrained(folder, **options)
            continue
        hf, info = auto.from_pretrained(folder, output_loading_info=True, **options)
        assert {name.partition(".")[0] for name in info["missing_keys"]} <= {"score", "classifier"}
        assert not info["mismatched_keys"]
        with torch.no_grad():
            expected = hf.eval()(input_ids=IDS).logits
            assert expected.shape[-1] == 3
            hf.save_pretrained(tmp_path / auto.__name__)
            again = whole_load(tmp_path / auto.__name__, auto)
            assert torch.equal(again(input_ids=IDS).logits, expected)
        assert again.config.num_labels == 3


@pytest.mark.slow
def test_heads_that_would_not_find_their_weights_are_refused(tmp_path: Path) -> None:
    save(tiny_in("everything", "llama"), tmp_path / "pruned")
    with pytest.raises(ValueError, match=r"SecateurLlamaConfig.*AutoModelForQuestionAnswering"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "pruned")


@pytest.mark.slow
def test_every_class_is_found_by_its_name() -> None:
    for family in FAMILY_NAMES:
        for cls in classes(family).values():
            assert pickle.loads(pickle.dumps(cls)) is cls
        assert classes(family)["AutoConfig"].model_type == PREFIX + family


def test_a_folded_block_stays_one_of_its_stock_class(tmp_path: Path) -> None:
    """By whose name accelerate knows what not to split, in a copy too."""
    model = apply_all(tiny_in("dense", "llama"), [FoldNorms()])
    for hf in (model.hf, copy.deepcopy(model.hf), pickle.loads(pickle.dumps(model.hf))):
        block = hf.get_submodule(model.family.blocks)[0]
        assert type(block).__name__ in hf._no_split_modules
        assert type(block) is type(model.blocks[0])
