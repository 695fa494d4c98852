"""What the Hub takes as the metadata of a model card."""

import pytest
import yaml

from ckpt_core.card_metadata import find_problems

RESULT = (
    "model-index: [{name: a, results: ["
    "{task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: m, value: 0}]}]}]"
)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "license: apache-2.0",
        "license: [mit, openrail++]",
        "license: other\nlicense_name: my-own\nlicense_link: LICENSE",
        "language: [en, 'no', deu, code, multilingual]",
        "language: null\nlicense: null",
        "tags: [a, b c]\ndatasets: glue\nmetrics: [acc]",
        "base_model: [team/base-1.0, gpt2]",
        "pipeline_tag: text-generation\nlibrary_name: transformers",
        "model-index: []",
        RESULT,
        "anything: {else: [1, 2]}",
    ],
)
def test_sound_metadata_has_no_problems(text):
    """What the Hub's documentation shows is accepted, and so is what it does not speak of."""
    assert find_problems(yaml.safe_load(text)) == []


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("license: Apache-2.0", ['"license" must be one of [']),
        ("license: {a: b}", ['"license" must be one of [']),
        ("license: [mit, [mit]]", ['"license" must be one of [']),
        ("language: no", ['"language" must be a string or an array of strings; quote it']),
        ("language: [en, English]", ['"language" with value "English" is not valid.']),
        ("language: [xx]", ['"language" with value "xx" is not valid.']),
        ("language: zh-CN", ['"language" with value "zh-CN" is not valid.']),
        ("tags: a", ['"tags" must be an array']),
        ("tags: [a, 1]", ['"tags[1]" must be a string']),
        ("datasets: {a: b}", ['"datasets" must be an array']),
        ("base_model: 3", ['"base_model" must be a string or an array of strings']),
        ("base_model: https://hf.co/a/b", ['"base_model" with value "https://hf.co/a/b" is not valid.']),
        ("pipeline_tag: [a]", ['"pipeline_tag" must be a string']),
        ("model-index: foo", ['"model-index" must be an array']),
        ("model-index: [foo]", ['"model-index[0]" must be of type object']),
        ("model-index: [{}]", ['"model-index[0].name" is required', '"model-index[0].results" is required']),
        (RESULT.replace("name: a", "name: 3"), ['"model-index[0].name" must be a string']),
        (RESULT.replace("value: 0", "value: null"), ['"model-index[0].results[0].metrics[0].value" is required']),
        (RESULT.replace(", name: D", ""), ['"model-index[0].results[0].dataset.name" is required']),
        (RESULT.replace("{type: t}", "t"), ['"model-index[0].results[0].task" must be of type object']),
    ],
)
def test_each_problem_is_named(text, problems):
    """Every part that is wrong is named by its place, as the Hub names it."""
    found = find_problems(yaml.safe_load(text))
    assert [each.startswith(start) for each, start in zip(found, problems, strict=True)] == [True] * len(problems)
