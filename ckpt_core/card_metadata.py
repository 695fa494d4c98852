"""The Hub's rules for the metadata of a model card: licenses, languages, and the structure of evaluation results.

The licenses are those of https://huggingface.co/docs/hub/repositories-licenses, the structure is that of `modelcard.md`
in the Hub's documentation.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

_LICENSE_IDS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2
    llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSE_IDS.split())

_LANGUAGE_CODES = """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee
    el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is
    it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms
    mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si
    sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh
    yi yo za zh zu
"""
_LANGUAGES = frozenset(_LANGUAGE_CODES.split())
"""ISO 639-1's codes, with the withdrawn ones that are still in use."""

_SPECIAL_LANGUAGES = frozenset({"code", "multilingual"})
_LONG_CODE = re.compile(r"[a-z]{3}")
_MODEL_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
_TEXTS = ("library_name", "license_link", "license_name", "pipeline_tag", "thumbnail")
_LISTS_OR_TEXTS = ("datasets", "metrics")


def find_problems(metadata: Mapping[str, Any]) -> list[str]:
    """Return what the Hub would not accept in a card's metadata, a sentence each; nothing where it accepts it."""
    problems = list(_license(metadata))
    problems += _language(metadata)
    problems += _base_model(metadata)
    problems += [f'"{name}" must be a string' for name in _TEXTS if not isinstance(_given(metadata, name, ""), str)]
    problems += _each_text("tags", _given(metadata, "tags", []))
    for name in _LISTS_OR_TEXTS:
        problems += _each_text(name, _listed(_given(metadata, name, [])))
    problems += _mismatches(_given(metadata, "model-index", []), "model-index", _MODEL_INDEX)
    return problems


def _given(metadata: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a value of the metadata; one that is null counts as not given."""
    value = metadata.get(name)
    return default if value is None else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _each_text(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, list):
        yield f'"{name}" must be an array'
        return
    for number, item in enumerate(cast("list[Any]", value)):
        if not isinstance(item, str):
            yield f'"{name}[{number}]" must be a string'


def _license(metadata: Mapping[str, Any]) -> Iterator[str]:
    given = _listed(_given(metadata, "license", []))
    if not isinstance(given, list) or not all(
        isinstance(each, str) and each in LICENSES for each in cast("list[Any]", given)
    ):
        yield f'"license" must be one of [{", ".join(sorted(LICENSES))}]'


def _language(metadata: Mapping[str, Any]) -> Iterator[str]:
    given = _listed(_given(metadata, "language", []))
    if not isinstance(given, list):
        yield '"language" must be a string or an array of strings; quote it in YAML, where a bare no is false'
        return
    for code in cast("list[Any]", given):
        known = isinstance(code, str) and (code in _LANGUAGES | _SPECIAL_LANGUAGES or _LONG_CODE.fullmatch(code))
        if not known:
            yield (
                f'"language" with value "{code}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code (two/three'
                ' letters), or a special value like "code", "multilingual". If you want to use BCP-47 identifiers, you'
                " can specify them in language_bcp47"
            )


def _base_model(metadata: Mapping[str, Any]) -> Iterator[str]:
    given = _listed(_given(metadata, "base_model", []))
    if not isinstance(given, list):
        yield '"base_model" must be a string or an array of strings'
        return
    for name in cast("list[Any]", given):
        if not isinstance(name, str) or not _MODEL_ID.fullmatch(name):
            yield f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models'


_RESULT = {
    "task": {"type": str},
    "dataset": {"type": str, "name": str},
    "metrics": [{"type": str, "value": object}],
}
_MODEL_INDEX = [{"name": str, "results": [_RESULT]}]
"""What `model-index` must hold: of a list any number of such items, of a mapping at least these keys."""


def _mismatches(value: Any, place: str, expected: Any) -> Iterator[str]:
    if value is None:
        yield f'"{place}" is required'
    elif isinstance(expected, list):
        if not isinstance(value, list):
            yield f'"{place}" must be an array'
            return
        [each] = cast("list[Any]", expected)
        for number, item in enumerate(cast("list[Any]", value)):
            yield from _mismatches(item, f"{place}[{number}]", each)
    elif isinstance(expected, dict):
        if not isinstance(value, Mapping):
            yield f'"{place}" must be of type object'
            return
        for key, inner in cast("dict[str, Any]", expected).items():
            yield from _mismatches(cast("Mapping[str, Any]", value).get(key), f"{place}.{key}", inner)
    elif not isinstance(value, expected):
        yield f'"{place}" must be a string'
