"""Random-weight models of many architectures, tiny or of real size, with checkpoints and device maps, without the hub.

`build("llama")` is a six-layer model that generates in milliseconds on a CPU and still takes the same code path through
transformers and accelerate as the real one; `build(real_config("llama-7b"), ...)` has a real model's shapes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Device = torch.device | str | int

# The ids every tiny config and its tokenizer agree on.
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = 160
MAX_POSITIONS = 512

# Weights are drawn with a standard deviation of GAIN / sqrt(inputs): 0.28 at 64 inputs. Chosen by trial over families
# and seeds: smaller, a random model repeats one token for ever and a wrong cache goes unnoticed; larger, fp16 and fp32
# disagree.
GAIN = 2.2
# Embeddings are smaller by this factor: a token's own embedding, handed on by the residuals, makes a tied head repeat
# the token.
EMBEDDING_GAIN = 0.25
# One-dimensional parameters (norm weights, biases) keep their initial value plus this much noise, so that they matter.
JITTER = 0.1
# Drawing is serial on the CPU (about 1e8 numbers a second): larger parameters repeat their first 2**20 numbers.
MAX_DRAWN = 2**20


@dataclass(frozen=True)
class Family:
    """One architecture: what transformers calls it and the settings that make it tiny.

    Args:
        name: the name in `ALL_FAMILIES`; two families may share a `model_type`.
        model_type: transformers' name of the architecture.
        settings: config fields beyond the ones all families share.
        needs: fields that the architecture's config must know, for variants that came after the architecture did
            (grouped-query LLaMA came three releases after LLaMA).
        is_encoder_decoder: whether it has an encoder and is built as a sequence-to-sequence model.
        gain: how large the weights are, see `GAIN`.
    """

    name: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    is_encoder_decoder: bool = False
    gain: float = GAIN


# Window 16: shorter than the prompts and generations of the tests, so that it slides.
_WINDOW = {"sliding_window": 16}
_GROUPED = {"num_key_value_heads": 2}
_GATED = {"intermediate_size": 128}

# The families that everything is tried on.
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "llama", _GATED),
        Family("llama-gqa", "llama", {**_GATED, **_GROUPED}, needs=("num_key_value_heads",)),
        Family("gptj", "gptj", {"rotary_dim": 8}),
        Family("gpt-neox", "gpt_neox", _GATED),
        Family("opt", "opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
        # An embedding norm undoes EMBEDDING_GAIN: larger weights have to outweigh the residual.
        Family("bloom", "bloom", gain=3.0),
        Family("mpt", "mpt", {"max_seq_len": MAX_POSITIONS, "expansion_ratio": 2}),
        Family("falcon", "falcon", {"multi_query": True}),
        Family("mistral-sliding", "mistral", {**_GATED, **_GROUPED, **_WINDOW}),
        Family("mixtral", "mixtral", {**_GATED, **_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
        Family("gemma2", "gemma2", {**_GATED, **_GROUPED, **_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16}),
        Family("gemma3", "gemma3_text", {**_GATED, **_GROUPED, **_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16}),
        Family(
            "t5",
            "t5",
            # T5 does not divide by sqrt(head size): with larger heads or weights, its softmax is all or nothing.
            {
                "d_kv": 4,
                "d_ff": 128,
                "feed_forward_proj": "gated-gelu",
                "num_decoder_layers": 6,
                "decoder_start_token_id": PAD_ID,
            },
            is_encoder_decoder=True,
            gain=1.2,
        ),
        Family("qwen2", "qwen2", {**_GATED, **_GROUPED}),
        Family("phi", "phi", _GATED),
    )
}

# As few layers as most families' patterns need, and as there are devices to spread them over: these families are many.
_FEW = {"num_hidden_layers": 4}
_DENSE = {**_FEW, **_GATED, **_GROUPED}
_SIZED = {**_DENSE, "head_dim": 16}
_BY_TURNS = {"layer_types": ["sliding_attention", "full_attention"] * 2, **_WINDOW}
_RECURRENT = {"layer_types": ["linear_attention", "full_attention"] * 2}
# Experts, as Mixtral, Qwen and DeepSeek call them.
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = {"shared_expert_intermediate_size": 32}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_EACH_LAYER = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 16}

# What else people load today: built, saved, spread and tried in graph mode.
MORE_FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama4",
            "llama4_text",
            {
                **_SIZED,
                **_LOCAL,
                "layer_types": ["chunked_attention", "full_attention"] * 2,
                "attention_chunk_size": 16,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 128,
            },
        ),
        Family("ministral", "ministral", {**_SIZED, **_WINDOW}),
        Family("qwen2-moe", "qwen2_moe", {**_DENSE, **_EXPERTS, **_SHARED}),
        Family("qwen3", "qwen3", _SIZED, gain=3.5),
        Family("qwen3-moe", "qwen3_moe", {**_SIZED, **_EXPERTS}),
        Family("qwen3-next", "qwen3_next", {**_SIZED, **_RECURRENT, **_DELTA, **_EXPERTS, **_SHARED}),
        Family("qwen3.5", "qwen3_5_text", {**_SIZED, **_RECURRENT, **_DELTA}, gain=1.8),
        Family("gemma", "gemma", _SIZED),
        Family(
            "gemma3n",
            "gemma3n_text",
            {
                **_SIZED,
                **_BY_TURNS,
                **_EACH_LAYER,
                "num_kv_shared_layers": 2,
                "laurel_rank": 8,
                "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            },
        ),
        Family("gemma4", "gemma4_text", {**_SIZED, **_BY_TURNS, **_EACH_LAYER}),
        Family("gpt-oss", "gpt_oss", {**_SIZED, **_BY_TURNS, **_LOCAL}),
        Family("phi3", "phi3", {**_DENSE, **_WINDOW}),
        Family("phimoe", "phimoe", {**_DENSE, **_LOCAL}),
        Family("cohere", "cohere", _DENSE),
        Family("cohere2", "cohere2", {**_SIZED, **_BY_TURNS}),
        Family("olmo", "olmo", _DENSE),
        # Both norm what a layer adds, and what attention reads: how much depends on the weights in another way.
        Family("olmo2", "olmo2", _DENSE, gain=1.2),
        Family("olmo3", "olmo3", {**_DENSE, **_BY_TURNS}, gain=4.0),
        Family("olmoe", "olmoe", {**_DENSE, **_EXPERTS}),
        Family("granite", "granite", _DENSE),
        Family("granite-moe", "granitemoe", {**_DENSE, **_LOCAL}),
        Family(
            "granite-hybrid",
            "granitemoehybrid",
            {**_DENSE, **_RECURRENT, **_MAMBA, **_LOCAL, "shared_intermediate_size": 64},
        ),
        Family("glm", "glm", _SIZED),
        Family("glm4", "glm4", _SIZED),
        Family("glm4-moe", "glm4_moe", {**_SIZED, **_ROUTED}),
        Family("deepseek-v2", "deepseek_v2", {**_FEW, **_GATED, **_LATENT, **_ROUTED}),
        Family("deepseek-v3", "deepseek_v3", {**_FEW, **_GATED, **_LATENT, **_ROUTED}),
        Family("minicpm3", "minicpm3", {**_FEW, **_GATED, **_LATENT}),
        Family("starcoder2", "starcoder2", {**_DENSE, **_WINDOW}),
        Family("stablelm", "stablelm", _DENSE),
        Family("falcon-alibi", "falcon", {**_FEW, "multi_query": True, "alibi": True}),
        Family("falcon-h1", "falcon_h1", {**_SIZED, **_MAMBA, "mamba_d_ssm": 128}),
        Family("gpt2", "gpt2", _FEW, gain=3.0),
        Family("gpt-neo", "gpt_neo", {**_FEW, "attention_types": [[["global", "local"], 2]], "window_size": 16}),
        Family("gpt-bigcode", "gpt_bigcode", _FEW),
        Family("codegen", "codegen", {**_FEW, "rotary_dim": 8}, gain=2.6),
        Family("smollm3", "smollm3", _DENSE),
        Family("exaone4", "exaone4", {**_DENSE, **_BY_TURNS}),
        Family("nemotron", "nemotron", _SIZED),
        Family(
            "nemotron-h",
            "nemotron_h",
            {
                **_SIZED,
                **_ROUTED,
                "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
                "mamba_num_heads": 8,
                "mamba_head_dim": 16,
                "ssm_state_size": 8,
                "n_groups": 1,
                "chunk_size": 16,
                "moe_shared_expert_intermediate_size": 32,
            },
        ),
        Family(
            "jamba",
            "jamba",
            {
                **_DENSE,
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "num_experts": 4,
                "use_mamba_kernels": False,
                "mamba_d_state": 8,
                "mamba_dt_rank": 8,
            },
        ),
        Family("bamba", "bamba", {**_DENSE, **_MAMBA, "attn_layer_indices": [1, 3]}),
        # Before it had this field, it took no attention mask.
        Family("mamba", "mamba", {**_FEW, "state_size": 8, "time_step_rank": 8}, needs=("use_associative_scan",)),
        Family(
            "mamba2",
            "mamba2",
            {**_FEW, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
        ),
        Family("recurrent-gemma", "recurrent_gemma", {**_FEW, **_GATED, "lru_width": 64, "attention_window_size": 16}),
        Family(
            "lfm2",
            "lfm2",
            {**_DENSE, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
        ),
        Family("minimax", "minimax", {**_SIZED, **_LOCAL, "block_size": 16}),
        Family("minimax-m2", "minimax_m2", {**_SIZED, **_LOCAL}),
        Family("seed-oss", "seed_oss", _SIZED),
        Family("ernie4.5", "ernie4_5", _SIZED),
        Family("hunyuan", "hunyuan_v1_dense", _SIZED),
        # Its activation grows with the square: that of a larger MLP drowns what attention adds.
        Family("apertus", "apertus", {**_DENSE, "intermediate_size": 32}, gain=1.4),
        Family("arcee", "arcee", _SIZED),
        Family("helium", "helium", _SIZED),
    )
}
ALL_FAMILIES: Mapping[str, Family] = {**FAMILIES, **MORE_FAMILIES}
# Without T5, which has an encoder as well.
DECODERS = tuple(name for name, family in ALL_FAMILIES.items() if not family.is_encoder_decoder)

_TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "use_cache": True,
}

# The shapes of the published config.json files of LLaMA-7B and -13B, Llama-3-8B, GPT-J-6B, Llama-2-70B and of the text
# part of Gemma-3-12B.
_REAL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-7b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
    "llama-13b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "max_position_embeddings": 2048,
        },
    ),
    "llama-3-8b": (
        "llama-gqa",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "gptj-6b": (
        "gptj",
        {
            "vocab_size": 50400,
            "hidden_size": 4096,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "rotary_dim": 64,
            "max_position_embeddings": 2048,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
    ),
    "gemma-3-12b": (
        "gemma3",
        {
            "vocab_size": 262208,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "max_position_embeddings": 131072,
        },
    ),
    "llama-70b-shape": (
        "llama-gqa",
        {
            "vocab_size": 32000,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
        },
    ),
}
REAL_SIZES = tuple(_REAL)


def available(name: str) -> bool:
    """Whether the installed transformers knows the family, its generation and the config fields it needs.

    Raises:
        KeyError: `name` is none of `ALL_FAMILIES`.
    """
    family = _family(name)
    if family.model_type not in CONFIG_MAPPING:
        return False
    defaults = CONFIG_MAPPING[family.model_type]()
    return all(hasattr(defaults, name) for name in family.needs)


def config(name: str, **overrides: Any) -> PretrainedConfig:
    """The config of a tiny model: hidden size 64, four heads, 160 tokens, 512 positions.

    It has six layers (T5: six and six), and four in `MORE_FAMILIES`. Where layers differ, a setting says what each of
    them is (`layer_types`): who overrides their number overrides that as well.

    Args:
        name: one of `ALL_FAMILIES`.
        overrides: config fields to set instead, by the common names (`num_hidden_layers`) or the family's (`n_layer`).

    Raises:
        KeyError: `name` is none of `ALL_FAMILIES`.
        NotImplementedError: the installed transformers does not have this family.
    """
    family = _family(name)
    return _make_config(family, {**_TINY, **family.settings}, overrides)


def real_config(name: str, **overrides: Any) -> PretrainedConfig:
    """The config of a published model: true head counts, intermediate sizes, vocabulary and number of layers.

    Args:
        name: one of `REAL_SIZES`.
        overrides: config fields to set instead, e.g. `num_hidden_layers=8` for as much of a 70B model as fits.

    Raises:
        KeyError: `name` is none of `REAL_SIZES`.
        NotImplementedError: the installed transformers does not have the model's family.
    """
    if name not in _REAL:
        raise KeyError(f"No real-size config is called {name!r}. There are: {', '.join(REAL_SIZES)}.")
    family_name, settings = _REAL[name]
    return _make_config(_family(family_name), settings, overrides)


def build(
    model: str | PretrainedConfig,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A model in eval mode whose weights are random but always the same, on every device and however often it is built.

    Only vectors that transformers initialises at random (time steps of recurrent layers, attention sinks) differ
    between CPU and GPU.

    Args:
        model: one of `ALL_FAMILIES`, or a config as from `real_config`.
        dtype: of the weights; they are drawn in fp32, so models of two dtypes differ by rounding alone.
        device: where the weights are made: a real-size model needs no room on the CPU.
        seed: other seed, other weights. The global random state is left as it was.
        overrides: config fields to set instead (with a family's name only).

    Raises:
        KeyError: `model` is a string and none of `ALL_FAMILIES`.
        NotImplementedError: the installed transformers does not have this family.
        TypeError: overrides together with a config.
    """
    if isinstance(model, str):
        made, gain = config(model, **overrides), _family(model).gain
    elif overrides:
        raise TypeError(f"Set {', '.join(overrides)} when making the config: overrides go with a family's name.")
    else:
        made, gain = model, GAIN
    auto = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    device = _as_device(device)
    with _random_state_of(seed, device), torch.device(device):
        built = auto.from_config(made, torch_dtype=dtype)
    _draw_weights(built, seed, gain)
    return built.eval()


def save(name: str, folder: str | Path, shards: int = 3, **build_options: Any) -> Path:
    """Writes a checkpoint with a tokenizer, as the webui or `from_pretrained` loads it.

    The weights are in the format that the installed transformers writes by default (safetensors; pickled before 4.35).

    Args:
        name: one of `ALL_FAMILIES`.
        folder: made if it is not there.
        shards: about how many weight files.
        build_options: passed to `build`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    model = build(name, **build_options)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=math.ceil(size / shards))
    _save_tokenizer(folder)
    return folder


def block_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the repeated layers in the order they run: the members of the outermost module lists.

    An encoder-decoder model gives its encoder's layers, then its decoder's.

    Raises:
        ValueError: the model repeats nothing.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    names = tuple(f"{name}.{child}" for name in outermost for child, _ in model.get_submodule(name).named_children())
    if not names:
        raise ValueError(f"{type(model).__name__} has no list of repeated layers to spread over devices.")
    return names


def device_map(
    model: PreTrainedModel,
    devices: Sequence[Device],
    split: Sequence[int] | None = None,
    head: str = "last",
) -> dict[str, Device]:
    """A full device map for accelerate's `dispatch_model`: every parameter's device, each named once.

    What the model registers before its first layer goes to the first device, what comes after a layer follows that
    layer (so the final norm and the head are on the last), which is the order accelerate itself fills devices in. OPT
    registers its final norm before its layers, so it is on the first device, there as here. Modules without parameters
    of their own (rotary tables) are on the first device. A head sharing the embedding's weights goes where they are.

    Args:
        model: the model to spread, on any device.
        devices: at least one, in the order the layers run. One may come twice.
        split: how many layers each device gets, in order; evenly if not given, earlier devices getting the odd ones.
        head: "last", or "first" for an output head beside the embedding.

    Raises:
        ValueError: no devices, or a `split` that does not add up to the model's layers, or another `head`.
    """
    if head not in ("first", "last"):
        raise ValueError(f'head is "first" or "last", not {head!r}.')
    names = block_names(model)
    blocks = dict(zip(names, _owners(len(names), devices, split), strict=True))
    head_module = model.get_output_embeddings()
    homes: dict[int, Device] = {}  # where each parameter went: a shared one stays with its first owner
    placed: dict[str, Device] = {}
    current = devices[0]
    for name, module in _pieces(model, blocks):
        current = blocks.get(name, current)
        parameters = [id(parameter) for parameter in module.parameters()]
        if not parameters or (module is head_module and head == "first"):
            placed[name] = devices[0]
        else:
            placed[name] = homes.get(parameters[0], current)
        homes.update(dict.fromkeys(parameters, placed[name]))
    return placed


def _family(name: str) -> Family:
    if name not in ALL_FAMILIES:
        raise KeyError(f"No family is called {name!r}. There are: {', '.join(ALL_FAMILIES)}.")
    return ALL_FAMILIES[name]


def _make_config(family: Family, settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> PretrainedConfig:
    """A config from settings under their common names, which each family's `attribute_map` translates into its own."""
    if not available(family.name):
        raise NotImplementedError(f"The installed transformers has no {family.name}; a newer one does.")
    own_names = CONFIG_MAPPING[family.model_type].attribute_map
    fields = {own_names.get(key, key): value for chosen in (settings, overrides) for key, value in chosen.items()}
    return AutoConfig.for_model(family.model_type, **fields)


def _as_device(device: Device) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


@contextlib.contextmanager
def _random_state_of(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the CPU's and the device's random state, and gives them back as they were.

    transformers initialises weights from them, of which those with one dimension are kept.
    """
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        torch.default_generator.manual_seed(seed)
        for gpu in forked:
            torch.cuda.default_generators[gpu.index or 0].manual_seed(seed)
        yield


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int, gain: float) -> None:
    """Overwrites the weights from one CPU generator in the order of registration: the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        noise = _noise_like(parameter, generator)
        if parameter.dim() == 1:
            parameter.add_(noise * JITTER)
        else:
            scale = gain * EMBEDDING_GAIN if id(parameter) in embeddings else gain
            parameter.copy_(noise * (scale / math.sqrt(parameter.shape[-1])))


def _noise_like(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal fp32 numbers of the parameter's shape on its device; after `MAX_DRAWN` they repeat."""
    count = parameter.numel()
    drawn = torch.randn(min(count, MAX_DRAWN), generator=generator, device="cpu").to(parameter.device)
    return drawn.repeat(math.ceil(count / drawn.numel()))[:count].view_as(parameter)


def _save_tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE tokenizer for printable ASCII with the tiny configs' vocabulary size and special ids.

    Its settings are written by hand, not by `save_pretrained`, whose class names transformers 4 and 5 do not share.
    Byte-level, because transformers 5 loads any qwen2 checkpoint's tokenizer as such whatever its files say
    (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS` in tokenization_auto.py).
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=[_NEWLINE, _SPACE, *(chr(code) for code in range(ord("!"), ord("~") + 1))],
    )
    tokenizer.train_from_iterator([_SAMPLE_TEXT], trainer)
    bos = SPECIAL_TOKENS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS_ID)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        # Without token_type_ids, which generate() refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# How a byte-level tokenizer writes these two bytes in its vocabulary.
_NEWLINE, _SPACE = "\u010a", "\u0120"
# What the tokenizer learns its merges from.
_SAMPLE_TEXT = (
    "The cache of a layer stays on the device of the layer, and only the hidden states cross from one device to "
    "another. When the answer is long enough, nothing else is worth moving: the weights are where they are."
)


def _owners(count: int, devices: Sequence[Device], split: Sequence[int] | None) -> list[Device]:
    """The device of each of `count` layers."""
    if not devices:
        raise ValueError("A device map needs at least one device.")
    if split is None:
        split = [count // len(devices) + (index < count % len(devices)) for index in range(len(devices))]
    if len(split) != len(devices) or sum(split) != count:
        raise ValueError(f"split={list(split)} does not spread {count} layers over {len(devices)} devices.")
    return [device for device, share in zip(devices, split, strict=True) for _ in range(share)]


def _pieces(model: nn.Module, blocks: Mapping[str, Device]) -> Iterator[tuple[str, nn.Module]]:
    """The blocks and the largest modules without a block inside, in the order of registration."""
    containers = {name.rsplit(".", depth)[0] for name in blocks for depth in range(1, name.count(".") + 1)} | {""}
    seen: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{piece}.") for piece in seen)
        if name not in containers and not inside:
            seen.add(name)
            yield name, module
