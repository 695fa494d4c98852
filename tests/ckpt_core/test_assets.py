"""Files beside weights: carried byte for byte, refused by name, or left out with a word; never lost in silence."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from small_transformers import MODELS, model_of, read_json, tokenizer
from transformers.decision import DecisionConfig

from ckpt_core import errors
from ckpt_core.export import assets as assets_module
from ckpt_core.export.assets import Assets, check_generation_config, fetch_assets, read_assets, write_configs
from ckpt_core.export.foreign import foreign_errors
from ckpt_core.testing.hub_server import hub_server

CONFIG = MODELS["llama"][1].to_json_string().encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n"

READERS: dict[str, Callable[[Path], Assets]] = {
    "a step's assets": read_assets,
    "--model": lambda directory: fetch_assets(str(directory)),
}


def model_directory(directory: Path, files: dict[str, bytes | str]) -> Path:
    """Write a model's directory with a config and other files."""
    for name, content in {"config.json": CONFIG, **files}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


@pytest.mark.parametrize("reader", READERS)
class TestCarried:
    """What comes along."""

    def test_every_file_of_a_tokenizer_and_a_processor(self, tmp_path: Path, reader: str) -> None:
        """Bytes are the source's, whether or not any library here could load them."""
        files: dict[str, bytes | str] = {
            "tokenizer.model": b"\x0a\x03\xff\x00", "spiece.model": b"\x0a", "sentencepiece.bpe.model": b"\x0a",
            "source.spm": b"\x0a", "qwen.tiktoken": "IQ== 0\n", "tokenizer.model.v3": b"\x00", "tekken.json": "{}",
            "vocab.txt": "a\nb\n", "vocab.bpe": "#version\n", "merges.txt": "", "bpe.codes": "a b 1\n",
            "tokenizer_config.json": '{"tokenizer_class":"LlamaTokenizer", "chat_template": "{{ messages }}猫"}',
            "special_tokens_map.json": '{ "eos_token" : "</s>" }', "chat_template.jinja": "{{ messages }}",
            "chat_template.json": '{"chat_template": "x"}', "additional_chat_templates/tool_use.jinja": "{{ tools }}",
            "preprocessor_config.json": '{"image_processor_type":   "CLIPImageProcessor"}',
            "processor_config.json": '{"processor_class": "LlavaProcessor"}', "video_preprocessor_config.json": "{}",
            "LICENSE": "x", "NOTICE.txt": "x", "USE_POLICY.md": "x", "README.md": "x", "figures/a.png": b"\x89PNG",
            "1_Pooling/config.json": "{ }",
        }  # fmt: skip
        directory = model_directory(tmp_path, files)
        found = READERS[reader](directory)
        assert found.files == {name: c if isinstance(c, bytes) else c.encode() for name, c in files.items()}
        [unchecked] = found.rules
        assert "copied as they are, and not looked into, as there is no tokenizer.json" in unchecked

    def test_a_tokenizer_of_a_known_form(self, tmp_path: Path, reader: str) -> None:
        """Its tokens are counted, and there is nothing to say; code that it names is said to be missing."""
        tokenizer().save_pretrained(model_directory(tmp_path, {}))
        found = READERS[reader](tmp_path)
        assert (found.rules, found.tokens) == ((), 40)
        assert found.files.keys() == {"tokenizer.json", "tokenizer_config.json"}
        named = {"auto_map": {"AutoTokenizer": ["tokenization_my.My", None]}}
        model_directory(
            tmp_path, {"tokenizer_config.json": json.dumps(named), "tokenization_my.py": "raise SystemExit"}
        )
        found = READERS[reader](tmp_path)
        assert found.tokens == 40
        assert ["auto_map" in rule or "tokenization_my.py" in rule for rule in found.rules] == [True, True]

    @pytest.mark.parametrize("change", [{"model": 3}, {"model": {"type": "Future", "vocab": {}}}, {"added_tokens": 3}])
    def test_a_tokenizer_of_a_form_that_is_not_known(self, tmp_path: Path, reader: str, change: Any) -> None:
        """It is carried with a word, as a newer library may load it."""
        directory = model_directory(tmp_path, {})
        tokenizer().save_pretrained(directory)
        data = json.dumps({**read_json(directory / "tokenizer.json"), **change})
        (directory / "tokenizer.json").write_text(data)
        found = READERS[reader](directory)
        assert found.files["tokenizer.json"] == data.encode()
        assert any("tokenizer.json is copied as it is" in rule for rule in found.rules) == ("model" in change)

    @pytest.mark.parametrize(
        "change",
        [
            {"max_new_tokens": 0},
            {"num_beams": 1, "num_return_sequences": 3},
            {"cache_implementation": "foo"},
            {"compile_config": 3},
            {"watermarking_config": 3},
            {"early_stopping": "x"},
        ],
    )
    def test_a_generation_config_that_is_not_taken(self, tmp_path: Path, reader: str, change: Any) -> None:
        """It is carried as it is, with what transformers says of it."""
        data = json.dumps({**change, "my_own": 1}).encode()
        found = READERS[reader](model_directory(tmp_path, {"generation_config.json": data}))
        assert found.files == {"generation_config.json": data}
        assert found.rules == ()
        [said] = check_generation_config(found.files)
        assert said.startswith("assets: generation_config.json is copied as it is, though transformers does not")

    def test_links_are_followed(self, tmp_path: Path, reader: str) -> None:
        """The directory, one in it, and files of it may be links; one that leads to a directory above stays behind."""
        files = {"tokenizer.json": "{}", "2_Dense/config.json": "{}", "elsewhere/special.json": "{}"}
        real = model_directory(tmp_path / "real", {"1_Pooling/config.json": "{}"})
        there = model_directory(tmp_path / "there", dict(files))
        (real / "2_Dense").symlink_to("../there/2_Dense")
        (real / "more").symlink_to(there / "elsewhere")
        (real / "tokenizer.json").symlink_to(there / "tokenizer.json")
        (there / "elsewhere/back").symlink_to(real)
        (tmp_path / "link").symlink_to("real")
        found = READERS[reader](tmp_path / "link")
        assert found.files.keys() == {
            "1_Pooling/config.json", "2_Dense/config.json", "more/special.json", "tokenizer.json"
        }  # fmt: skip
        assert any("left out: more/back" in rule for rule in found.rules)

    def test_what_stays_behind(self, tmp_path: Path, reader: str) -> None:
        """Weights in any format, archives, code and what is unknown never come along, and what is left out is named."""
        weights = [
            "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
            "bert_model.ckpt.data-00000-of-00001", "bert_model.ckpt.index", "model.ckpt", "weights.npz", "model.pkl",
            "rust_model.ot", "tf_model.h5", "flax_model.msgpack", "optimizer.pt", "rng_state.pth", "model.nemo",
            "model.tar.gz", "model.zip", "model.GGUF", "saved_model.pb", "model.llamafile", "training_args.bin",
        ]  # fmt: skip
        unknown = ["data.parquet", "events.out.tfevents.1", "openvino_model.xml", "modeling.py", "a\tb.json"]
        old = ["export.json", "trainer_state.json", ".gitattributes", ".cache/huggingface/x.json"]
        apart = ["onnx/model.onnx", "onnx/config.json", "original/params.json", "original/consolidated.00.pth"]
        model_directory(tmp_path, dict.fromkeys([*weights, *unknown, *old, *apart], "x"))
        found = READERS[reader](tmp_path)
        assert found.files == {}
        said = "\n".join(found.rules)
        for name in (*unknown[:-1], "a\\tb.json", "model.nemo", "rust_model.ot", "onnx/", "original/"):
            assert name in said
        assert "\t" not in said
        assert "model.safetensors" not in said.replace("model.safetensors.index", "")

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            ("tokenizer.json", '{"version": "1.0", "model"', "not JSON"),
            ("tokenizer.json", "[" * 100_000, "not JSON"),
            ("tokenizer.json", "", "not JSON"),
            ("tokenizer_config.json", '{"a": ', "not JSON"),
            ("special_tokens_map.json", b"\xff\xfe\x00", "not JSON"),
            ("preprocessor_config.json", "{", "not JSON"),
            ("generation_config.json", "{", "not JSON"),
            ("generation_config.json", "[1]", "a list"),
            ("tokenizer.json", POINTER, "Git LFS"),
            ("tokenizer.model", POINTER, "Git LFS"),
            ("config.json", POINTER, "Git LFS"),
            ("config.json", b'{"author": "J\xf6rg"}', "not JSON"),
        ],
    )
    def test_damage_is_refused_by_name(
        self, tmp_path: Path, reader: str, name: str, content: bytes | str, text: str
    ) -> None:
        """A file that is cut short, or a pointer to one, is a DamagedError with its path."""
        model_directory(tmp_path, {name: content})
        with pytest.raises(errors.DamagedError, match=rf"{tmp_path}/{name}: .*{text}"):
            READERS[reader](tmp_path)

    def test_what_is_no_file(self, tmp_path: Path, reader: str) -> None:
        """A link that leads nowhere and a named pipe are DamagedErrors, and nothing waits for the pipe."""
        model_directory(tmp_path, {})
        (tmp_path / "merges.txt").symlink_to("gone")
        os.mkfifo(tmp_path / "vocab.txt")
        for name in ("merges.txt", "vocab.txt"):
            with pytest.raises(errors.DamagedError, match=rf"{name}: not a regular file"):
                READERS[reader](tmp_path)
            (tmp_path / name).unlink()
        assert READERS[reader](tmp_path).files == {}

    def test_a_file_without_an_end(self, tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file too large to be one beside weights is refused before it is read."""
        model_directory(tmp_path, {"notes.txt": "longer"})
        monkeypatch.setattr(assets_module, "_MAX_BYTES", 5_000)
        assert READERS[reader](tmp_path).files
        os.truncate(tmp_path / "notes.txt", 5_001)
        with pytest.raises(errors.MismatchError, match=r"notes\.txt: 5001 bytes"):
            READERS[reader](tmp_path)


class TestFetched:
    """Configs and tokenizers from several places."""

    def test_another_tokenizer_replaces_all_files_of_the_models(self, tmp_path: Path) -> None:
        """No file of the model's tokenizer stays; its other files do; of the other model nothing but the tokenizer."""
        model = {"vocab.txt": "old", "tokenizer.model": "old", "chat_template.jinja": "old", "LICENSE": "old"}
        other = {"source.spm": "new", "processor_config.json": "{}", "LICENSE": "new", "generation_config.json": "{}"}
        model_directory(tmp_path / "model", {**model, "processor_config.json": '{"old": 1}'})
        model_directory(tmp_path / "other", {**other, "config.json": "{"})
        found = fetch_assets(str(tmp_path / "model"), str(tmp_path / "other"))
        assert found.files == {"LICENSE": b"old", "source.spm": b"new", "processor_config.json": b"{}"}
        with pytest.raises(errors.NotACheckpointError, match="no files of a tokenizer there"):
            fetch_assets(str(tmp_path / "model"), str(model_directory(tmp_path / "bare", {})))

    @pytest.mark.parametrize("name", ["no/such", "no such", "a\0b", "x" * 5000, "a/b/c", "../x", "", "s3x://a"])
    def test_what_is_not_there(self, name: str) -> None:
        """No directory, no repository that can be reached, and no name at all are errors of this library."""
        with pytest.raises(errors.CkptError):
            fetch_assets(name)

    def test_a_repository_on_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All that a directory would give comes from a Hub id, and no byte of weights; later also without the Hub."""
        tokenizer().save_pretrained(tmp_path / "here")
        modules = json.dumps([{"path": "1_Dense"}])
        text = {
            "preprocessor_config.json": "{}", "chat_template.jinja": "猫", "spiece.model": "x", "[a] b.txt": "x",
            "additional_chat_templates/x.jinja": "y", "modules.json": modules, "1_Dense/model.safetensors": "z",
        }  # fmt: skip
        weights = ["model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "odd.kind", "a.py"]
        directory = model_directory(tmp_path / "here", {**text, **dict.fromkeys(weights, "weights")})
        expected = read_assets(directory)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        with hub_server(tmp_path / "hub") as server:
            template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
            api = HfApi(endpoint=server.endpoint)
            api.create_repo("team/model")
            api.upload_folder(repo_id="team/model", folder_path=directory)
            found = fetch_assets("team/model")
            assert (found.config, found.files, found.tokens) == (expected.config, expected.files, 40)
            assert found.rules == expected.rules
            assert fetch_assets(str(directory), "team/model").files == expected.files
            with pytest.raises(errors.NotACheckpointError, match="team/none"):
                fetch_assets("team/none")
        cached = [path.name for path in tmp_path.glob("cache/models--*/snapshots/**/*") if path.is_file()]
        assert sorted(cached) == sorted([*(Path(name).name for name in expected.files), "config.json"])
        assert fetch_assets("team/model").files == expected.files

    def test_a_config_by_itself(self, tmp_path: Path) -> None:
        """A file stands for a config without anything beside it."""
        model_directory(tmp_path, {"vocab.txt": "a"})
        found = fetch_assets(str(tmp_path / "config.json"))
        assert (found.config["model_type"], found.files) == ("llama", {})


def test_a_step_is_saved_whatever_its_generation_config_says(tmp_path: Path) -> None:
    """Values that only generation would refuse do not keep a model from being saved; the file is transformers' own."""
    model = model_of("llama")
    (tmp_path / "good").mkdir()
    write_configs(model, tmp_path / "good")
    model.generation_config.save_pretrained(tmp_path)
    name = "generation_config.json"
    assert (tmp_path / "good" / name).read_bytes() == (tmp_path / name).read_bytes()
    model.generation_config.max_new_tokens = 0
    write_configs(model, tmp_path / "good")
    assert read_json(tmp_path / "good" / name)["max_new_tokens"] == 0


def test_settings_of_a_model_that_decides(tmp_path: Path) -> None:
    """decision.json is written as save_pretrained writes it, next to the other configs."""
    model = model_of("llama")
    model.decision_config = DecisionConfig(noul_options=["false", "true"], chat_template="{{ state }}")
    model.decision_config.save_pretrained(tmp_path)
    (tmp_path / "all").mkdir()
    write_configs(model, tmp_path / "all")
    for name in ("decision.json", "decision_template.jinja"):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / name).read_bytes()


class PanicException(BaseException):
    """What pyo3 raises when Rust code panics."""


@pytest.mark.parametrize(
    "error", [KeyError("config"), ImportError("needs sentencepiece"), RecursionError(), PanicException("x" * 9999)]
)
def test_whatever_a_library_raises(error: BaseException) -> None:
    """Any exception of a parser becomes one of this library that names the file; what stops the process passes."""
    said = rf"tokenizer\.json: {type(error).__name__}.*; look"
    with pytest.raises(errors.MismatchError, match=said) as caught, foreign_errors("tokenizer.json", "look"):
        raise error
    assert len(str(caught.value)) < 1000
    for stop in (KeyboardInterrupt(), SystemExit(1), errors.DamagedError("mine")):
        with pytest.raises(type(stop)), foreign_errors("tokenizer.json", "look"):
            raise stop
