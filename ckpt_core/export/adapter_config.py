"""`adapter_config.json`: how PEFT attached an adapter to a model, as far as an export depends on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from ckpt_core import documents
from ckpt_core.durable import file_size
from ckpt_core.errors import DamagedError, MismatchError, NotACheckpointError
from ckpt_core.export.assets import Assets, read_assets, read_files
from ckpt_core.export.carried import CONFIG_NAME, EXPORT_NAME
from ckpt_core.export.patterns import PatternError, Patterns
from ckpt_core.export.vocabulary import count_tokens, read_tokenizer
from ckpt_core.export.weight_conversions import RECORD_NAME

if TYPE_CHECKING:
    from ckpt_core.urls import Place

ADAPTER_CONFIG_NAME = "adapter_config.json"
_EMBEDDINGS = ("embed_tokens", "lm_head")

_UNDERSTOOD = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Fields that are taken into account, or change neither names nor what is added to a weight."""

_ONLY_NAMED = frozenset({"alora_invocation_tokens", "layer_replication", "lora_bias", "use_dora"})
"""Fields that change what an adapter does, but not how its tensors are named."""

_LEAVING_OUT = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields because of which a module that is named may have no factors."""

_NOT_CARRIED = frozenset({CONFIG_NAME, EXPORT_NAME, RECORD_NAME, "generation_config.json", "trainer_state.json"})

_OFF: tuple[Any, ...] = (None, False, "none", [], {})


@dataclass(frozen=True)
class AdapterConfig:
    """The config of a LoRA adapter."""

    where: str
    fields: Mapping[str, Any]
    patterns: Patterns = field(default_factory=Patterns, compare=False, repr=False)

    def check_supported(self, *, merge: bool) -> None:
        """Check that it has nothing that an export would have to know and does not.

        Raises:
            MismatchError: it has.
        """
        kind = self.fields.get("peft_type")
        if kind != "LORA":
            raise MismatchError(f"{self.where}: peft_type {kind!r}; only adapters of the type 'LORA' are converted.")
        fine = _UNDERSTOOD if merge else _UNDERSTOOD | _ONLY_NAMED
        for name, value in self.fields.items():
            if name not in fine and value not in _OFF:
                what = "merged" if merge else "exported"
                raise MismatchError(
                    f"{self.where}: {name} is {value!r}, and adapters with it are not {what}; use PEFT's "
                    f"{'merge_and_unload' if merge else 'save_pretrained'}."
                )

    @property
    def base(self) -> str:
        """The class of the model below, or where it came from, as far as the config says it."""
        mapping: Any = self.fields.get("auto_mapping")
        cls = cast("dict[str, Any]", mapping).get("base_model_class") if isinstance(mapping, dict) else None
        return str(cls or self.fields.get("base_model_name_or_path") or "a model")

    def rank(self, module: str) -> int:
        """Return the rank of a module's factors."""
        return self._number("r", "rank_pattern", module, int)

    def scaling(self, module: str) -> float:
        """Return what the product of a module's factors is multiplied with."""
        alpha, rank = self._number("lora_alpha", "alpha_pattern", module, float), self.rank(module)
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def targets(self, module: str) -> bool:
        """Whether the config says that a module has factors."""
        wanted = self.fields.get("target_modules")
        if isinstance(wanted, str):
            return wanted == "all-linear" or self._matches(self.patterns.fullmatch, wanted, module)
        return any(module == name or module.endswith(f".{name}") for name in self._target_names)

    def expects(self, module: str) -> bool:
        """Whether a module must have factors: it is named, and nothing in the config may leave it out."""
        may_be_left_out = any(self.fields.get(name) not in _OFF for name in _LEAVING_OUT)
        return not may_be_left_out and self.fields.get("target_modules") != "all-linear" and self.targets(module)

    @property
    def _target_names(self) -> list[str]:
        """Ends of the names of the modules that have factors; none where they are told by a pattern."""
        wanted = self.fields.get("target_modules")
        return _names(wanted, "target_modules", self.where) if not isinstance(wanted, str) else []

    def keeps_base(self, module: str) -> bool:
        """Whether PEFT saves the frozen weight of a module that has factors with them, as it does with embeddings."""
        named = isinstance(self.fields.get("target_modules"), str) or set(self._target_names) & set(_EMBEDDINGS)
        return bool(named) and module.rpartition(".")[2] in _EMBEDDINGS

    def trains(self, module: str) -> bool:
        """Whether the config says that a module was trained as a whole."""
        return any(f"{name}." in f"{module}." for name in self.trained_names)

    @property
    def trained_names(self) -> list[str]:
        """Ends of the names of the modules that were trained as a whole."""
        return _names(self.fields.get("modules_to_save"), "modules_to_save", self.where)

    def _number(self, name: str, pattern_name: str, module: str, kind: type[int | float]) -> Any:
        patterns: Any = self.fields.get(pattern_name) or {}
        if not isinstance(patterns, dict):
            raise MismatchError(f"{self.where}: {pattern_name} is {patterns!r}, expected an object.")
        found = self.fields.get(name)
        for pattern, value in cast("dict[str, Any]", patterns).items():
            if self._matches(self.patterns.match, rf"(.*\.)?({pattern})$", module):
                found = value
                break
        if isinstance(found, bool) or not isinstance(found, (int, kind)) or found <= 0:
            raise MismatchError(f"{self.where}: {name} of {module} is {found!r}, expected a positive number.")
        return found

    def _matches(self, match: Callable[[str, str], bool], pattern: str, module: str) -> bool:
        try:
            return match(pattern, module)
        except PatternError as error:
            raise MismatchError(f"{self.where}: {error}; list the modules by name.") from None


def find_adapter_config(directory: Place | None) -> Place | None:
    """Return the directory if there is one and it has an adapter's config."""
    return directory if directory and file_size(directory / ADAPTER_CONFIG_NAME) is not None else None


def adapter_assets(directory: Place, others: Iterable[Place] = ()) -> Assets:
    """Read an adapter's config, and, from its directory or `others`, the tokenizer's files and the model's config.

    Raises:
        NotACheckpointError: there is no `adapter_config.json`, or no such directory.
    """
    found = [_read(place) for place in (*others, directory)]
    configs = [assets.config for assets in found if assets.config]
    files = {name: data for assets in found for name, data in assets.files.items()}
    rules = dict.fromkeys(rule for assets in found for rule in assets.rules)
    tokens = count_tokens(files, read_tokenizer(files))
    return with_adapter_config(Assets(configs[-1] if configs else {}, files, tuple(rules), tokens), directory)


def with_adapter_config(assets: Assets, directory: Place) -> Assets:
    """Return assets with the adapter's config that is in `directory`.

    Raises:
        NotACheckpointError: there is none.
    """
    path = directory / ADAPTER_CONFIG_NAME
    if file_size(path) is None:
        raise NotACheckpointError(
            f"{directory}: no {ADAPTER_CONFIG_NAME} in it; give the directory where PEFT's save_pretrained, or "
            "peft_config.save_pretrained, wrote it."
        )
    return replace(assets, files={**assets.files, ADAPTER_CONFIG_NAME: path.read_bytes()})


def _read(directory: Place) -> Assets:
    if file_size(directory / CONFIG_NAME) is not None:
        return read_assets(directory)
    if not directory.is_dir():
        raise NotACheckpointError(
            f"{directory}: no such directory; an adapter's other files are taken from local ones."
        )
    found = read_files(directory)
    return replace(found, files={name: data for name, data in found.files.items() if name not in _NOT_CARRIED})


def adapter_config(assets: Assets, where: str, *, merge: bool) -> AdapterConfig:
    """Return the adapter's config that is among `assets`.

    Raises:
        NotACheckpointError: there is none.
        DamagedError: it is not readable.
        MismatchError: the adapter is of a kind that is not exported, or not merged if it is to be.
    """
    data = assets.files.get(ADAPTER_CONFIG_NAME)
    if data is None:
        raise NotACheckpointError(
            f"{where}: holds a LoRA adapter, but there is no {ADAPTER_CONFIG_NAME} with it; give the directory that "
            "has it with --adapter."
        )
    try:
        fields = documents.parse_object(data)
    except ValueError as error:
        raise DamagedError(f"{ADAPTER_CONFIG_NAME}: not readable ({error}); restore a copy.") from None
    config = AdapterConfig(ADAPTER_CONFIG_NAME, fields)
    config.check_supported(merge=merge)
    return config


def adapter_files(assets: Assets) -> dict[str, bytes]:
    """Return the files of an adapter's export beside its weights: its config, and the tokenizer's files."""
    return {name: data for name, data in assets.files.items() if name not in _NOT_CARRIED}


def _names(value: Any, field: str, where: str) -> list[str]:
    names = cast("list[Any]", value if isinstance(value, list) else [])
    if value is not None and (not isinstance(value, list) or not all(isinstance(name, str) for name in names)):
        raise MismatchError(f"{where}: {field} is {value!r}, expected a list of names.")
    return names
