"""Transformers models of a few thousand numbers, a tokenizer, and checkpoints of them."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BarkConfig,
    BarkModel,
    BarkSemanticConfig,
    BarkSemanticModel,
    BertConfig,
    BertForMaskedLM,
    ClapConfig,
    ClapModel,
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    EncodecConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from ckpt_core.export import Assets
from ckpt_core.export.assets import read_assets, write_configs
from ckpt_core.native_checkpoint import save_checkpoint

_LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_WORDS = {"vocab_size": 40, "max_position_embeddings": 33}
_TEXT = {**_LAYERS, **_WORDS, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
_IMAGE = {**_LAYERS, "image_size": 16, "patch_size": 8}
_BARK = {"block_size": 9, "vocab_size": 40, "output_vocab_size": 40, "num_layers": 1, "num_heads": 2, "hidden_size": 16}

MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_TEXT)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**_TEXT, tie_word_embeddings=True)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=33)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_TEXT, head_dim=8)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=8)),
    "bert": (BertForMaskedLM, BertConfig(**_LAYERS, **_WORDS)),
    "t5": (T5ForConditionalGeneration, T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40)),
    "vit": (ViTForImageClassification, ViTConfig(**_IMAGE)),
    "resnet": (  # 0-d integers
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    ),
    "llava": (
        LlavaForConditionalGeneration,
        LlavaConfig(
            text_config=LlamaConfig(**_TEXT),
            vision_config=CLIPVisionConfig(**_IMAGE, projection_dim=8),
            image_token_index=39,
        ),
    ),
    "gemma3 with images": (
        Gemma3ForConditionalGeneration,
        Gemma3Config(
            text_config=Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=8),
            vision_config=SiglipVisionConfig(**_IMAGE),
            mm_tokens_per_image=4,
            image_token_index=39,
        ),
    ),
    "whisper": (
        WhisperForConditionalGeneration,
        WhisperConfig(
            vocab_size=40, d_model=16, num_mel_bins=8, max_source_positions=13, max_target_positions=17,
            encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
    ),
    "clap": (  # 0-d numbers of both kinds, and matrices of integers
        ClapModel,
        ClapConfig(
            text_config={**_LAYERS, **_WORDS, "projection_dim": 8},
            audio_config={
                "num_mel_bins": 8, "spec_size": 16, "patch_size": 4, "patch_stride": [4, 4], "window_size": 2,
                "num_classes": 3, "patch_embeds_hidden_size": 8, "hidden_size": 16, "projection_dim": 8,
                "depths": [1, 1], "num_hidden_layers": 2, "num_attention_heads": [1, 2], "aff_block_r": 2,
            },
            projection_dim=8,
        ),
    ),
    "bark": (  # booleans, and a scale apart from its direction
        BarkModel,
        BarkConfig(
            semantic_config=_BARK,
            coarse_acoustics_config=_BARK,
            fine_acoustics_config={**_BARK, "n_codes_total": 2, "n_codes_given": 1},
            codec_config=EncodecConfig(
                upsampling_ratios=[2], num_filters=4, hidden_size=8, codebook_size=4, num_lstm_layers=1,
                target_bandwidths=[1.5],
            ),
        ),
    ),
    "semantic bark": (BarkSemanticModel, BarkSemanticConfig(**_BARK)),  # a config that is of no AutoConfig
    "granite hybrid": (  # Infinity in its config
        GraniteMoeHybridForCausalLM,
        GraniteMoeHybridConfig(
            **_TEXT, layer_types=["mamba", "attention"], num_local_experts=3, num_experts_per_tok=2,
            shared_intermediate_size=8, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4,
        ),
    ),
    "marian": (  # positions that are computed, not saved
        MarianMTModel,
        MarianConfig(
            vocab_size=40, d_model=16, max_position_embeddings=33, pad_token_id=39, decoder_start_token_id=39,
            eos_token_id=0, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
        ),
    ),
    "idefics2": (  # a config class that changes what it is made of
        Idefics2ForConditionalGeneration,
        Idefics2Config(
            text_config=MistralConfig(**_TEXT),
            vision_config={**_IMAGE},
            perceiver_config={"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
                              "resampler_head_dim": 8, "num_key_value_heads": 1, "hidden_size": 16},
            image_token_id=39,
        ),
    ),
    "olmo hybrid": (  # numbers that are float32 whatever the rest is
        OlmoHybridForCausalLM,
        OlmoHybridConfig(
            **_TEXT, pad_token_id=0, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
            linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=8,
        ),
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**_TEXT, num_local_experts=3)),
    "qwen3 moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**_TEXT, **_EXPERTS, head_dim=8, num_experts=3, mlp_only_layers=[0]),
    ),
    "deepseek v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **_TEXT, **_EXPERTS, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1,
            first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, v_head_dim=8, qk_rope_head_dim=4,
            qk_nope_head_dim=8,
        ),
    ),
}  # fmt: skip


def model_of(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a model with random weights: no two floating-point tensors hold the same, and no counter is 0."""
    cls, config = MODELS[name]
    torch.manual_seed(seed)
    model = cls(copy.deepcopy(config))
    saved = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in model._keys_to_ignore_on_save}
    with torch.no_grad():
        for tensor in dict.fromkeys(saved.values()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
            elif tensor.dim() == 0:
                tensor.add_(7)
    return model


def checkpoint_of(model: PreTrainedModel, directory: Path) -> tuple[Path, Assets]:
    """Save a model below `directory`; return its DCP directory and its assets."""
    (directory / "assets").mkdir(parents=True)
    write_configs(model, directory / "assets")
    save_checkpoint(model, str(directory / "dcp"))
    return directory / "dcp", read_assets(directory / "assets")


def save_pretrained(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    """Save a model as transformers does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory, **options)
    return directory


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 40 words."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def config_directory(model: PreTrainedModel, directory: Path) -> Path:
    """Write a model's config and a tokenizer, as users have them."""
    model.config.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_bytes())
