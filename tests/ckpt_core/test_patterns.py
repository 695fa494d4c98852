"""Regular expressions of a checkpoint's maker match as Python's, and end soon whatever they are."""

import json
import re
import time
from contextlib import suppress

import pytest
import torch

from ckpt_core import io
from ckpt_core.errors import ArgumentError, CkptError
from ckpt_core.export import patterns, plan_export
from ckpt_core.export.adapter_config import adapter_assets
from ckpt_core.export.names import Table, read_table
from ckpt_core.export.patterns import PatternError, Patterns

USUAL = [
    r".*\.(q|k|v|o)_proj", r"^(?!.*visual).*(?:q_proj|down_proj)$", r"model\.layers\.([0-9]|1[0-5])\.mlp\..*", "q_proj",
    r"^language_model(?=\.).*\.(o_proj|gate_proj)$", r"[a-z_.]+\d{1,2}[^x]*", r"(?i)MODEL.*", r"a{e}", r"\w+(\.\w+)*",
]  # fmt: skip
NAMES = [
    "model.layers.3.self_attn.q_proj",
    "visual.blocks.0.q_proj",
    "language_model.a.o_proj",
    "q_proj",
    "a{e}",
    "ae",
    "",
]
SLOW = "((a{1,5000}){1,5000}){1,5000}b"
"""A pattern that even an engine with guards needs for ever."""


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_mean_what_they_mean_to_python(pattern):
    """Matching, searching and replacing give what `re` gives."""
    made, compiled = Patterns(), re.compile(pattern)
    for name in NAMES:
        assert made.fullmatch(pattern, name) == bool(re.fullmatch(pattern, name))
        assert made.match(pattern, name) == bool(re.match(pattern, name))
        assert made.search(compiled, name) == bool(compiled.search(name))
        assert made.replace(compiled, r"x\g<0>y", name) == compiled.sub(r"x\g<0>y", name)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(x+x+)+y", "(.*)*(.*)*z", r"(a+)\1+b", "(a|aa)*c", "(a|b|ab)*c" * 50, "a?" * 30 + "a" * 30, SLOW],
)
def test_each_pattern_ends(pattern):
    """Patterns that take `re` years match, do not, or are an error, in less than seconds for all names together."""
    made, start = Patterns(), time.process_time()
    with suppress(PatternError):
        for count in range(20):
            made.fullmatch(pattern, "a" * 60 + "b" * count)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "pattern", ["(", "*", "(?R)", "(" * 5000 + ")" * 5000, "a" * 200_000, "(?<=a+)b", "[z-a]", "\\"]
)
def test_no_patterns(pattern):
    """What is none to Python, or is too long or too deep, is an error."""
    with pytest.raises(PatternError):
        Patterns().fullmatch(pattern, "a")


def test_time_that_is_used_up_stays_so():
    """Many slow matches take no longer than one."""
    made, start = Patterns(), time.process_time()
    for _ in range(20):
        with pytest.raises(PatternError, match="takes more than"):
            made.fullmatch(SLOW, "a" * 60)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("fields", [{"target_modules": SLOW}, {"target_modules": [], "rank_pattern": {SLOW: 2}}])
def test_an_adapters_patterns(tmp_path, fields):
    """The config of an adapter is whatever its maker wrote: planning ends with an error that names it."""
    module = f"base_model.model.{'a' * 60}"
    factors = {f"{module}.lora_{x}.default.weight": torch.ones(shape) for x, shape in (("A", (2, 4)), ("B", (4, 2)))}
    io.save({"model": factors}, tmp_path / "dcp")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **fields}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    start = time.process_time()
    with pytest.raises(CkptError, match=r"adapter_config\.json"):
        plan_export(tmp_path / "dcp", adapter_assets(tmp_path))
    assert time.process_time() - start < 5


def test_a_table_of_names(tmp_path):
    """So with a table of names; one that is no table is an error that names the file."""
    table = Table(rename=((re.compile(SLOW), "x"),), drop=(re.compile(SLOW),))
    for use in (table.renamed, table.drops):
        with pytest.raises(ArgumentError, match="takes more than"):
            use("a" * 60)
    for text in ("[" * 100_000, "[]", '{"drop": ["("]}', '{"drop": ["' + "(" * 5000 + ")" * 5000 + '"]}'):
        (tmp_path / "names.json").write_text(text)
        with pytest.raises(ArgumentError, match=r"names\.json: not a table"):
            read_table(tmp_path / "names.json")
