"""Transformers models of a few thousand numbers, a tokenizer, and checkpoints of them."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from ckpt_core.export import Assets
from ckpt_core.export.assets import read_assets, write_configs
from ckpt_core.native_checkpoint import save_checkpoint

_LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_WORDS = {"vocab_size": 40, "max_position_embeddings": 32}
_TEXT = {**_LAYERS, **_WORDS, "num_key_value_heads": 2}

MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_TEXT)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**_TEXT, tie_word_embeddings=True)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_TEXT, head_dim=8)),
    "bert": (BertForMaskedLM, BertConfig(**_LAYERS, **_WORDS)),
    "t5": (T5ForConditionalGeneration, T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40)),
    "vit": (ViTForImageClassification, ViTConfig(**_LAYERS, image_size=16, patch_size=8)),
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    ),
}
FUSED = (MixtralForCausalLM, MixtralConfig(**_TEXT, num_local_experts=2))


def model_of(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a model with random weights."""
    cls, config = MODELS[name]
    torch.manual_seed(seed)
    return cls(config)


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
