"""The models that everything else is tried on: they build, generate, save and spread on every stack that has them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from accelerate.utils.modeling import check_device_map
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tools import models

TEXT = "Hello,  world!\n  x = {1}; # 100% of ~it\tstays"
PROMPT = torch.arange(20, 40)[None]  # longer than the sliding window


def each(names: Iterable[str]) -> pytest.MarkDecorator:
    """Tries the families that this stack has."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=pytest.mark.skipif(not models.available(name), reason=f"this stack has no {name}"))
            for name in names
        ],
    )


every_family = each(models.ALL_FAMILIES)
every_main_family = each(models.FAMILIES)
every_available_size = pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.74),
        ("llama-13b", 13.02),
        ("llama-3-8b", 8.03),
        ("gptj-6b", 6.05),
        ("gemma-3-12b", 11.77),  # without what reads pictures
        ("llama-70b-shape", 68.98),
    ],
)


def generate(model, tokens: int = 8) -> list[int]:
    """The greedy continuation of PROMPT, always `tokens` long."""
    out = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
    )
    return out[0, -tokens:].tolist()


def logits(model) -> torch.Tensor:
    decoder = {"decoder_input_ids": PROMPT} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=PROMPT, **decoder).logits


class TestBuilding:
    @every_family
    def test_the_same_tokens_come_out_of_every_build(self, name):
        assert generate(models.build(name)) == generate(models.build(name))

    @every_main_family
    def test_another_seed_gives_another_model(self, name):
        assert not torch.equal(logits(models.build(name, seed=0)), logits(models.build(name, seed=1)))

    @every_family
    def test_the_tokens_are_no_constant_repetition(self, name):
        assert len(set(generate(models.build(name), tokens=24))) >= 4

    @every_main_family
    def test_fp16_is_finite(self, name):
        model = models.build(name, dtype=torch.float16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
        assert logits(model).isfinite().all()

    @every_main_family
    def test_overrides_go_by_the_common_names(self, name):
        assert len(models.block_names(models.build(name, num_hidden_layers=3))) in (3, 9)  # T5: 3 and 6

    def test_the_random_state_stays_as_it_was(self):
        before = torch.get_rng_state()
        models.build("llama")
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_model_is_in_eval_mode(self):
        assert not models.build("llama").training

    def test_a_config_is_built_as_it_is(self):
        config = models.config("llama", num_hidden_layers=2)
        assert len(models.block_names(models.build(config))) == 2

    def test_overrides_with_a_config_are_refused(self):
        with pytest.raises(TypeError, match="num_hidden_layers"):
            models.build(models.config("llama"), num_hidden_layers=2)

    def test_an_unknown_family_is_told_which_there_are(self):
        with pytest.raises(KeyError, match="gpt-neox"):
            models.build("lama")

    def test_a_family_of_another_stack_is_told_so(self, monkeypatch):
        monkeypatch.delitem(models.CONFIG_MAPPING._mapping, "opt")
        with pytest.raises(NotImplementedError, match="opt"):
            models.build("opt")

    def test_parameters_larger_than_what_is_drawn_repeat_it(self, monkeypatch):
        monkeypatch.setattr(models, "MAX_DRAWN", 100)
        weight = models.build("llama").lm_head.weight.flatten()
        assert torch.equal(weight[:100], weight[100:200])


class TestSaving:
    @every_family
    def test_a_loaded_checkpoint_gives_the_same_logits(self, name, tmp_path):
        auto = AutoModelForSeq2SeqLM if models.ALL_FAMILIES[name].is_encoder_decoder else AutoModelForCausalLM
        loaded = auto.from_pretrained(models.save(name, tmp_path)).eval()
        assert torch.equal(logits(loaded), logits(models.build(name)))

    @every_main_family
    def test_the_tokenizer_gives_a_text_back(self, name, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(models.save(name, tmp_path))
        text = TEXT.replace("\t", " ")
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    def test_the_tokenizer_and_the_config_agree_on_ids(self, tmp_path):
        folder = models.save("llama", tmp_path)
        tokenizer, config = AutoTokenizer.from_pretrained(folder), models.config("llama")
        assert len(tokenizer) == config.vocab_size
        assert tokenizer.pad_token_id == config.pad_token_id
        assert tokenizer.bos_token_id == config.bos_token_id
        assert tokenizer.eos_token_id == config.eos_token_id

    def test_what_the_tokenizer_returns_goes_into_generate(self, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(models.save("llama", tmp_path))
        out = models.build("llama").generate(**tokenizer(["Hello"], return_tensors="pt"), max_new_tokens=2)
        assert out.shape[0] == 1

    def test_a_checkpoint_has_several_weight_files(self, tmp_path):
        folder = models.save("llama", tmp_path, shards=3)
        assert len([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) >= 3


class TestSpreading:
    @every_family
    @pytest.mark.parametrize("devices", [["a"], ["a", "b", "a"]], ids="".join)
    def test_every_parameter_has_one_device(self, name, devices):
        model = models.build(name)
        placed = models.device_map(model, devices)
        check_device_map(model, placed)
        for parameter, _ in model.named_parameters():
            assert sum(parameter == key or parameter.startswith(f"{key}.") for key in placed) == 1, parameter

    @every_main_family
    def test_weights_that_are_shared_are_on_one_device(self, name):
        model = models.build(name)
        placed = models.device_map(model, ["a", "b"])
        homes: dict[int, set[str]] = {}
        for key in placed:
            for parameter in model.get_submodule(key).parameters():
                homes.setdefault(id(parameter), set()).add(placed[key])
        assert all(len(home) == 1 for home in homes.values())

    @every_family
    def test_the_layers_fill_the_devices_in_order(self, name):
        model = models.build(name)
        placed = models.device_map(model, ["a", "b", "c"])
        layers = [placed[block] for block in models.block_names(model)]
        assert layers == sorted(layers)
        assert set(layers) == {"a", "b", "c"}

    @every_main_family
    def test_embeddings_and_rotary_tables_are_on_the_first_device(self, name):
        model = models.build(name)
        placed = models.device_map(model, ["a", "b"])
        top = {key: model.get_submodule(key) for key in placed if key not in models.block_names(model)}
        assert {placed[key] for key, module in top.items() if isinstance(module, nn.Embedding) or "rotary" in key} == {
            "a"
        }

    def test_an_encoder_comes_before_its_decoder(self):
        blocks = models.block_names(models.build("t5"))
        assert [block.split(".")[0] for block in blocks] == ["encoder"] * 6 + ["decoder"] * 6

    def test_a_split_gives_each_device_its_share(self):
        model = models.build("llama")
        placed = models.device_map(model, ["a", "b"], split=(1, 5))
        assert [placed[block] for block in models.block_names(model)] == ["a"] + ["b"] * 5

    def test_the_head_is_on_the_last_device(self):
        assert models.device_map(models.build("llama"), ["a", "b"])["lm_head"] == "b"

    def test_the_head_can_be_on_the_first_device(self):
        placed = models.device_map(models.build("llama"), ["a", "b"], head="first")
        assert (placed["lm_head"], placed["model.norm"]) == ("a", "b")

    def test_a_tied_head_stays_with_the_embedding(self):
        assert models.device_map(models.build("opt"), ["a", "b"])["lm_head"] == "a"

    @pytest.mark.parametrize("split", [(6,), (3, 2), (2, 2, 2)])
    def test_a_split_that_does_not_add_up_is_refused(self, split):
        with pytest.raises(ValueError, match="6 layers over 2 devices"):
            models.device_map(models.build("llama"), ["a", "b"], split=split)

    def test_no_devices_are_refused(self):
        with pytest.raises(ValueError, match="at least one device"):
            models.device_map(models.build("llama"), [])

    def test_another_place_for_the_head_is_refused(self):
        with pytest.raises(ValueError, match="middle"):
            models.device_map(models.build("llama"), ["a"], head="middle")

    def test_a_model_without_layers_is_refused(self):
        with pytest.raises(ValueError, match="Linear"):
            models.block_names(nn.Linear(1, 1))


class TestRealSizes:
    @every_available_size
    def test_a_real_config_has_the_published_number_of_parameters(self, name, billions):
        family = {"llama-3-8b": "llama-gqa", "llama-70b-shape": "llama-gqa", "gemma-3-12b": "gemma3"}.get(name, "llama")
        if not models.available(family):
            pytest.skip(f"this stack has no {family}")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(models.real_config(name))
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)

    def test_fewer_layers_can_be_asked_for(self):
        assert models.real_config("llama-7b", num_hidden_layers=2).num_hidden_layers == 2

    def test_an_unknown_size_is_told_which_there_are(self):
        with pytest.raises(KeyError, match="llama-13b"):
            models.real_config("llama-30b")
