"""The export gate: what a user's `from_pretrained` gives is what the checkpoint holds."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ckpt_core import PyTorchCheckpoint, open_checkpoint
from ckpt_core.durable import file_system, files_below, make_parents
from ckpt_core.errors import NotACheckpointError
from ckpt_core.verify import Check
from tasks import adapters

if TYPE_CHECKING:
    from ckpt_core.urls import Place

SAMPLE = """def fibonacci(count):
    \"\"\"Return the first numbers of the Fibonacci sequence.\"\"\"
    numbers = [0, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers[:count]
"""
"""Text that both models read; any text would do."""


def compare_with_checkpoint(url: str, export: Place) -> list[Check]:
    """Load an export with `from_pretrained`, restore the checkpoint with torch's own loader, and compare the two.

    Without a cast tensors and logits must be the same bit for bit; with one, the same as the checkpoint's when cast. Of
    a LoRA adapter's export the tensors are the adapter's, and there are no logits where the checkpoint has no model to
    put it on; a merged one is compared with what PEFT merges.
    """
    adapter = adapters.find_stored(url)
    with local_copy(export) as directory:
        exports_adapter = adapters.has_adapter(directory)
        if adapter and adapter.alone and exports_adapter:
            return _same_tensors(adapters.exported_tensors(directory), adapters.stored_tensors(adapter))
        restored = restore_model(url)
        if adapter and exports_adapter:
            exported = adapters.load_adapter(restored, directory, adapter.name)
            ours, theirs = (
                adapters.trained_tensors(stored_tensors(model), adapter.name) for model in (exported, restored)
            )
            adapters.cast_as_stored(theirs, adapter.name, directory)
            return [*_same_tensors(ours, theirs), _logits(exported, restored, directory)]
        restored = adapters.merged(restored)
        exported, info = type(restored).from_pretrained(directory, output_loading_info=True)
        keys = [_keys(name, info[f"{name}_keys"]) for name in ("missing", "unexpected", "mismatched")]
        tensors = _tensors(stored_tensors(exported), stored_tensors(restored))
        return [*keys, tensors, _logits(exported, restored, directory)]


def _same_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[Check]:
    """Compare an export's tensors with those that were restored, and which there are."""
    keys = [_keys("missing", theirs.keys() - ours), _keys("unexpected", ours.keys() - theirs)]
    return [*keys, _tensors(ours, theirs)]


def _tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> Check:
    """Compare an export's tensors with those that were restored, which are cast to its types."""
    for name in theirs.keys() & ours.keys():
        theirs[name].data = theirs[name].data.to(ours[name].dtype)
    different = [name for name in theirs if name not in ours or not torch.equal(theirs[name], ours[name])]
    detail = f"{len(theirs)} tensors, bit for bit" if not different else f"differ: {', '.join(different[:5])}"
    return Check("tensors", not different, detail)


def stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a model, and the buffers that are saved with it."""
    saved = model.state_dict()
    return {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if n in saved}


def restore_model(url: str) -> Any:
    """Return the model of a checkpoint, built from its own config and filled from its DCP shards.

    Raises:
        NotACheckpointError: the checkpoint has no config.
    """
    from transformers import AutoConfig

    from ckpt_core.export.architecture import named_class

    assets = open_checkpoint(url).component("assets")
    if assets is None or not (assets / "config.json").is_file():
        raise NotACheckpointError(f"{url}: has no assets/config.json, so its architecture is not known.")
    with local_copy(assets) as directory:
        config = AutoConfig.from_pretrained(directory)
        named = config.architectures
        if not named:
            raise NotACheckpointError(f"{assets}/config.json: names no architectures, so the model's class is unknown.")
        model = named_class(named[0])(config).eval()
        adapter = adapters.find_stored(url)
        if adapter is not None:
            model = adapters.with_adapter(model, directory, adapter.name)
    PyTorchCheckpoint.from_url(url).restore(model)
    return model


@contextmanager
def local_copy(place: Place) -> Generator[Path]:
    """Give a directory as it is, or a copy of what lies at a URL, meanwhile."""
    if isinstance(place, Path):
        yield place
        return
    with TemporaryDirectory() as temporary:
        for name, _ in files_below(place):
            path = Path(temporary, name)
            make_parents(path)
            file_system(place).get_file((place / name).path, str(path))
        yield Path(temporary)


def _keys(kind: str, keys: Any) -> Check:
    found = sorted(map(str, keys))
    return Check(f"{kind} keys", not found, ", ".join(found[:5]) if found else "none")


def _logits(exported: Any, restored: Any, export: Path) -> Check:
    inputs = _inputs(exported, export)
    with torch.inference_mode():
        pair = [_forward(model, inputs) for model in (exported, restored)]
    same = torch.equal(*pair)
    apart = (pair[0].float() - pair[1].float()).abs().max().item()
    shape = "x".join(map(str, pair[0].shape))
    return Check("logits", same, f"{shape}, bit for bit" if same else f"{shape}, up to {apart:.3g} apart")


def _inputs(model: Any, export: Path) -> torch.Tensor:
    """Return the sample as this export's tokens [1, length]; without a tokenizer, seeded random ones."""
    from transformers import AutoTokenizer

    if (export / "tokenizer_config.json").is_file():
        return torch.tensor([AutoTokenizer.from_pretrained(export)(SAMPLE)["input_ids"]])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.get_text_config().vocab_size, (1, 64), generator=generator)


def _forward(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # where memory begins decides the order of sums in some kernels
    return model.eval()(input_ids=inputs).logits
