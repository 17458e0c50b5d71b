"""Every causal class of transformers, tiny and random: accelerate's tokens in every mode, most of them from graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from extensions.sharded_kv import shard
from tests import support
from tools import models

if Version("5.23") > Version(transformers.__version__):
    pytest.skip("the lists are of the classes of transformers 5.23", allow_module_level=True)

TOKENS = 8
# Those that these sizes do not suit: their configs want others that fit together, or a package that is not there.
UNSUITED = frozenset(
    """
        BltForCausalLM
        CohereCompassForCausalLM
        DbrxForCausalLM
        Dots1ForCausalLM
        Dots3NoteForCausalLM
        Emu3ForCausalLM
        FalconH1ForCausalLM
        GPTNeoForCausalLM
        Gemma3nForCausalLM
        Gemma3nForConditionalGeneration
        Gemma4AssistantForCausalLM
        Gemma4ForCausalLM
        Gemma4ForConditionalGeneration
        Gemma4UnifiedAssistantForCausalLM
        Gemma4UnifiedForCausalLM
        Gemma4UnifiedForConditionalGeneration
        Lfm2MoeForCausalLM
        Mamba2ForCausalLM
        MllamaForCausalLM
        MusicgenForCausalLM
        MusicgenMelodyForCausalLM
        ProphetNetForCausalLM
        Qwen4ExpForCausalLM
        ReformerModelWithLMHead
        XLNetLMHeadModel
        Zamba2ForCausalLM
        ZambaForCausalLM
        ZayaForCausalLM
        BailingHybridForCausalLM
        BambaForCausalLM
        CamembertForCausalLM
        GraniteMoeHybridForCausalLM
        JambaForCausalLM
        KimiLinearForCausalLM
        XLMRobertaForCausalLM
        XmodForCausalLM
        xLSTMForCausalLM
    """.split()
)
# accelerate cannot run these where their embeddings are on two devices.
NOT_FOR_ACCELERATE = frozenset(
    """
        BlenderbotSmallForCausalLM
        RemBertForCausalLM
        XLMWithLMHeadModel
    """.split()
)
# Those that run eagerly, each for a reason.
WITHOUT_GRAPHS = frozenset(
    """
        AXK2ForCausalLM
        BartForCausalLM
        BigBirdPegasusForCausalLM
        BlenderbotForCausalLM
        CpmAntForCausalLM
        DeepseekV32ForCausalLM
        DeepseekV4ForCausalLM
        Gemma3ForConditionalGeneration
        GitForCausalLM
        GlmMoeDsaForCausalLM
        GotOcr2ForConditionalGeneration
        HYV4ForCausalLM
        HrmTextForCausalLM
        Inkling2ForCausalLM
        InklingForCausalLM
        JetMoeForCausalLM
        Llama4ForCausalLM
        LongcatFlashForCausalLM
        MBartForCausalLM
        MarianForCausalLM
        MiniMaxForCausalLM
        MossTranscribeDiarizeForConditionalGeneration
        MvpForCausalLM
        OpenAIGPTLMHeadModel
        PLBartForCausalLM
        PegasusForCausalLM
        RecurrentGemmaForCausalLM
        RoFormerForCausalLM
        RwkvForCausalLM
        TrOCRForCausalLM
        WhisperForCausalLM
    """.split()
)
CLASSES = sorted(set(NAMES.values()) - UNSUITED - NOT_FOR_ACCELERATE)

_SPECIAL = {"pad_token_id": models.PAD_ID, "bos_token_id": models.BOS_ID, "eos_token_id": models.EOS_ID}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
# What makes a model tiny, under whichever of these names its config has it.
_TINY: dict[str, Any] = {
    **_SPECIAL,
    **_LATENT,
    **_EXPERTS,
    **_MAMBA,
    **_LINEAR,
    "vocab_size": models.VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": models.MAX_POSITIONS,
    "use_cache": True,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "linear_value_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 8,
    "rotary_dim": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 64,
    "out_hidden_size": 64,
    **dict.fromkeys(("ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("decoder_layers", "decoder_attention_heads", "encoder_attention_heads"), 4),
    "encoder_layers": 2,
}


def tiny(of: type) -> Any:
    """A config of this class, with small sizes in place of its own, in its parts as well."""
    usual: Any = of()
    fields = {name: value for name, value in _TINY.items() if _has(usual, name)}
    if "kv_lora_rank" in fields:  # latent attention has a head for each query, of two parts
        fields |= {"num_key_value_heads": 4, "head_dim": 8}
    for name in of.sub_configs:  # type: ignore[attr-defined]
        part = getattr(usual, name, None)
        if part is not None:
            fields[name] = tiny(type(part)).to_dict()
    return of(**fields)


def _has(config: Any, name: str) -> bool:
    of_class = getattr(type(config), name, None)
    return hasattr(config, name) and not (isinstance(of_class, property) and of_class.fset is None)


def build(name: str) -> Any:
    """A model of this class.

    Raises:
        Exception: whatever the class raises for sizes like these.
    """
    config = tiny(getattr(transformers, name).config_class)
    with torch.device("meta"):
        parameters = transformers.AutoModelForCausalLM.from_config(config).parameters()
        if sum(parameter.numel() for parameter in parameters) > 2e7:
            raise ValueError("It has more parameters than these sizes speak of.")
    return models.build(config)


def placed(model: Any, places: list[str]) -> dict[str, str]:
    """A device map as `device_map="auto"` makes it for two GPUs that each have room for the half."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    blocks = {type(model.get_submodule(name)).__name__ for name in models.block_names(model)}
    whole = sorted(blocks | set(model._no_split_modules or ()))
    memory = get_balanced_memory(model, dict.fromkeys(range(2), size), whole)
    return {name: places[device] for name, device in infer_auto_device_map(model, memory, whole).items()}


def reply(model: Any, place: str) -> list[list[int]]:
    inputs = {name: tensor.to(place) for name, tensor in support.prompts(2).items()}
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    replied: list[list[int]] = out.tolist()
    return replied


# On real GPUs torch fills masked places with a number of the host, which simulated ones take for a GPU's.
REFUSED_BY_SIMULATED_DEVICES = frozenset({"Gemma3ForConditionalGeneration"})


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_accelerates_tokens_in_every_mode(
    devices: support.Devices, replays: list[object], name: str
) -> None:
    places = devices(2)
    model = build(name)
    model = support.spread(model, places, device_map=placed(model, places))
    right = reply(model, places[0])
    sharding = shard(model)
    assert reply(model, places[0]) == right
    sharding.mode = "graph"
    assert reply(model, places[0]) == right
    assert sharding.failure == ""
    assert bool(replays) != bool(sharding.reason_for_eager)
    without = WITHOUT_GRAPHS if devices.kind == "sim" else WITHOUT_GRAPHS - REFUSED_BY_SIMULATED_DEVICES
    assert bool(replays) == (name not in without)
    sharding.detach()


def test_most_classes_have_graphs() -> None:
    with_graphs = [name for name in CLASSES if name not in WITHOUT_GRAPHS]
    print(f"{len(with_graphs)} of {len(CLASSES)} classes have graphs")
    assert set(CLASSES) >= WITHOUT_GRAPHS
    assert len(with_graphs) >= 107
