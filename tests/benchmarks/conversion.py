"""A checkpoint of a Llama to convert, and the ways in which others convert it, each run in a process of its own."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

MEGABYTES_A_LAYER = 206
_CONFIG = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}


def llama_config(megabytes: int, directory: Path) -> Path:
    """Write the config of a Llama whose float32 parameters take about `megabytes`, in 10^6 bytes."""
    from transformers import LlamaConfig

    layers = max(1, (megabytes - 134) // MEGABYTES_A_LAYER)
    sizes = _CONFIG if megabytes >= 340 else {name: size // 16 for name, size in _CONFIG.items()}
    config = LlamaConfig(**sizes, vocab_size=8192, num_hidden_layers=layers, architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    return directory


def meta_llama(config: Path) -> Any:
    """Return the model of a config, without memory for its parameters."""
    from transformers import AutoConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(AutoConfig.from_pretrained(config))


def through_torch_save(dcp: str, _: str, target: str) -> None:
    """Convert as torch's own tool does, to one file of `torch.save`, and save its tensors again."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = Path(target)
    path.mkdir()
    dcp_to_torch_save(dcp, path / "whole.pt")
    state = torch.load(path / "whole.pt", weights_only=True)["model"]
    torch.save(state, path / "pytorch_model.bin")


def through_a_model(dcp: str, config: str, target: str) -> None:
    """Load into a live model, and save that."""
    import torch.distributed.checkpoint as stock
    from transformers import AutoConfig, LlamaForCausalLM

    model = LlamaForCausalLM(AutoConfig.from_pretrained(config))
    stock.load({"model": model.state_dict()}, checkpoint_id=dcp, no_dist=True)
    model.save_pretrained(target, max_shard_size="900MB")


if __name__ == "__main__":
    import torch.distributed.checkpoint
    from transformers import LlamaForCausalLM  # noqa: F401 - start-up does not count

    began = time.perf_counter()
    globals()[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"write_s": time.perf_counter() - began}))
