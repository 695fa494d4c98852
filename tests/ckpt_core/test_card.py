"""A release's card: what it says, that text stays text, and templates."""

import dataclasses
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckpt_core.errors import ArgumentError
from ckpt_core.format.manifest import Manifest
from ckpt_core.hub.card import render_card
from ckpt_core.hub.card_facts import checkpoint_facts, export_facts
from ckpt_core.hub.picture import CURVE_NAME, loss_curve

REPO = "team/model"
HOSTILE = 'x: [1]\n---\n| <b>"\\`*_#{{ 7 * 7 }}'
ESCAPED = r'x: \[1\] --- \| \<b\>"\\\`\*\_\#{{ 7 \* 7 }}'
TRAIN, HELDOUT = [[1, 3.0], [2, 2.5], [3, 2.25]], [[3, 2.75]]


def card(**options):
    """Render a card of which a test changes some arguments."""
    given = {"title": "Tiny", "summary": "A model.\n\nSecond.", "repo_id": REPO}
    return render_card(**{**given, **options})


def test_a_card_without_facts_says_how_to_load_it():
    """With nothing but a title, a summary and a repository it has the Hub's metadata, and is not evaluated."""
    assert card(license="apache-2.0", tags=["tiny", "safetensors"]) == (
        "---\nlibrary_name: transformers\nlicense: apache-2.0\npipeline_tag: text-generation\n"
        "tags:\n- ckptflow\n- safetensors\n- tiny\n---\n\n# Tiny\n\nA model.\n\nSecond.\n\n"
        "## Evaluation\n\nNot evaluated.\n\n"
        "## How to load\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'repository = "team/model"\n'
        'model = AutoModelForCausalLM.from_pretrained(repository)  # revision="v1" stays with that version\n'
        "tokenizer = AutoTokenizer.from_pretrained(repository)\n```\n"
    )


def test_a_card_shows_what_was_measured_and_where_it_comes_from():
    """Figures stand beside those of others; decision, curve, lineage, libraries and hardware follow in their order."""
    text = card(
        metrics={"heldout_loss": 2.5, "accuracy": 1 / 3, "perplexity": None, "score": 7},
        compared={"the release before (v3)": {"heldout_loss": 2.75, "accuracy": None}, "untrained": {"score": 0}},
        evaluated_on={"name": "news", "split": "test"},
        decision="It is better by 0.25.",
        curve=CURVE_NAME,
        lineage={"checkpoint": "sha256:ab", "step": 500},
        libraries={"torch": "2.13"},
        hardware={"device": "H200"},
    )
    evaluation, loading, *tables = text.split("\n## ")[1:]
    assert evaluation == (
        "Evaluation\n\nOn news, test:\n\n"
        "| Metric | This model | the release before (v3) | untrained |\n| --- | ---: | ---: | ---: |\n"
        "| held-out loss (nats a token) | 2.5 | 2.75 | not measured |\n"
        "| accuracy of the next token | 0.333333 | not measured | not measured |\n"
        "| score | 7 | not measured | 0 |\n\n"
        "It is better by 0.25.\n\n![Loss over the steps of training](./loss_curve.png)\n"
    )
    assert loading.startswith("How to load\n")
    assert tables == [
        "Lineage\n\n| What | Value |\n| --- | --- |\n| checkpoint | sha256:ab |\n| step | 500 |\n",
        "Libraries\n\n| What | Value |\n| --- | --- |\n| torch | 2.13 |\n",
        "Hardware\n\n| What | Value |\n| --- | --- |\n| device | H200 |\n",
    ]


def test_the_hub_reads_the_figures_back():
    """The client's own reader finds each figure at full precision, its data, and every other field."""
    metrics = {"heldout_loss": 0.1 + 0.2, "accuracy": 1 / 3, "steps": 10**12, "small": 1e-7}
    data = {"name": "News: of *today*", "type": "team/news", "split": "test", "fingerprint": "ab" * 32}
    text = card(metrics=metrics, evaluated_on=data, base_model="team/base", datasets=["team/news"], license="mit",
                metadata={"language": ["en", "de"]})  # fmt: skip
    found = ModelCard(text).data
    assert {result.metric_type: result.metric_value for result in found.eval_results} == metrics
    one = dataclasses.asdict(found.eval_results[0])
    assert {name: value for name, value in one.items() if value is not None} == {
        "task_type": "text-generation",
        "dataset_type": "team/news",
        "dataset_name": "News: of *today*",
        "dataset_split": "test",
        "dataset_args": {"fingerprint": "ab" * 32},
        "metric_type": "heldout_loss",
        "metric_name": "held-out loss (nats a token)",
        "metric_value": 0.1 + 0.2,
    }
    assert (found.model_name, found.license, found.base_model) == ("model", "mit", "team/base")
    assert (found.datasets, found.language, found.library_name) == (["team/news"], ["en", "de"], "transformers")
    assert ModelCard(card()).data.eval_results is None


@pytest.mark.parametrize(
    ("repo_id", "tag", "lines"),
    [
        (REPO, "v3", ['model = AutoModelForCausalLM.from_pretrained(repository, revision="v3")']),
        ("s3://bucket/models", "v3", ['where = "s3://bucket/models"', 'directory = download(where, "v3", directory']),
        ("/models/tiny", None, ["import download, served\n", "download(where, served(where).commit, directory"]),
    ],
)
def test_loading_names_the_version_and_the_place(repo_id, tag, lines):
    """The code loads a release by its tag, from the Hub or from a directory or bucket, and is Python."""
    code = card(repo_id=repo_id, tag=tag).split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert all(line in code for line in lines)


def test_hostile_names_stay_text():
    """Names from users change neither the metadata nor headings, tables, code or links, and no template reads them."""
    text = card(
        title=HOSTILE,
        summary=f"- a\n\n2. b\n\n===\n\n{HOSTILE}",
        repo_id=f"/{HOSTILE}",
        tag=HOSTILE,
        license=HOSTILE,
        tags=[HOSTILE],
        metrics={HOSTILE: 1},
        compared={HOSTILE: {HOSTILE: 2}},
        evaluated_on={"name": HOSTILE},
        decision=f"# {HOSTILE}",
        lineage={HOSTILE: HOSTILE},
    )
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    metadata, lines = yaml.safe_load(front), body.splitlines()
    assert (metadata["license"], metadata["tags"][-1]) == (HOSTILE, HOSTILE)
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == HOSTILE
    assert lines[1] == f"# {ESCAPED}"
    assert "\n\n\\- a\n\n2\\. b\n\n\\===\n\n" in body
    assert [line for line in lines if line.startswith("#")] == [
        f"# {ESCAPED}", "## Evaluation", "## How to load", "## Lineage"
    ]  # fmt: skip
    for line in (f"| {ESCAPED} | 1 | 2 |", f"| {ESCAPED} | {ESCAPED} |", f"\\# {ESCAPED}", f"On {ESCAPED}:"):
        assert line in lines
    assert 'where = "/x: [1] --- | <b>\\"\\\\`*_#{{ 7 * 7 }}"' in lines


@settings(max_examples=60, deadline=None)
@example("\x85x")
@example("x \u2028\x85 y")
@given(st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: text + "x"))
def test_any_text_stays_text(name):
    """Whatever a name holds, the metadata gives it back, and the body has the same lines as with a plain one."""
    fields = ("title", "summary", "license", "decision")
    shown = {"metrics": {name: 1}, "lineage": {"run": name}, "evaluated_on": {"name": name}}
    text = card(**dict.fromkeys(fields, name), **shown)
    found = ModelCard(text).data
    assert (found.license, found.eval_results[0].metric_type, found.eval_results[0].dataset_name) == (name,) * 3
    starts = [line[:2] for line in text[text.index("\n---\n\n") + 6 :].split("\n")]
    assert starts.count("# ") == 1
    assert [start for start in starts if start in ("##", "``", "| ", "--")] == [
        "##",
        *["| "] * 3,
        "##",
        "``",
        "``",
        "##",
        *["| "] * 3,
    ]


def test_equal_arguments_give_equal_bytes():
    """Cards and pictures are the same in another process, with another seed of hashes and settings of matplotlib."""
    code = (
        "import sys, hashlib, matplotlib\n"
        "from ckpt_core.hub.card import render_card\n"
        "from ckpt_core.hub.picture import loss_curve\n"
        "matplotlib.rcParams['lines.linewidth'] = float(sys.argv[1])\n"
        "facts = {'metrics': {'b': 1, 'a': 2}, 'lineage': {'y': 1, 'x': 2}, 'tags': ['z', 'c']}\n"
        "text = render_card(title='t', summary='s', repo_id='a/b', **facts)\n"
        f"pictures = [loss_curve({TRAIN}, {HELDOUT}, kind) for kind in ('png', 'svg')]\n"
        "print(*(hashlib.sha256(data).hexdigest() for data in (text.encode(), *pictures)))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(seed)], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": str(seed), "PATH": "", "HOME": "/nonexistent", "SOURCE_DATE_EPOCH": str(seed)},
        ).stdout
        for seed in (1, 2)
    ]  # fmt: skip
    assert runs[0] == runs[1] != ""


def test_the_curve_is_a_picture_of_both_losses():
    """It is a PNG of one size, or an SVG; it holds no date, and a held-out loss that there is changes it."""
    png, svg = loss_curve(TRAIN, HELDOUT), loss_curve(TRAIN, HELDOUT, "svg")
    assert png.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">2I", png[16:24]) == (1050, 450)
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert b"<dc:date>" not in svg
    assert b"<!-- held-out -->" in svg
    assert b"<!-- held-out -->" not in loss_curve(TRAIN, [], "svg")
    assert png != loss_curve(TRAIN, [])


def test_drawing_leaves_settings_alone():
    """A user's settings of matplotlib are as they were after a picture was drawn."""
    with mpl.rc_context({"lines.linewidth": 9.0}):
        loss_curve(TRAIN, [])
        assert mpl.rcParams["lines.linewidth"] == 9.0
        assert mpl.rcParams["svg.hashsalt"] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), True, "1"])
def test_a_figure_is_a_finite_number(value):
    """A figure that is not a finite number is refused by name, this model's or another's."""
    with pytest.raises(ArgumentError, match="metric 'loss' is"):
        card(metrics={"loss": value})
    with pytest.raises(ArgumentError, match="metric 'loss of the champion' is"):
        card(metrics={"loss": 1.0}, compared={"the champion": {"loss": value}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auto_class": "Auto\nModel"}, "not the name of a class"),
        ({"curve": "../x.png"}, "not the plain name of a file"),
        ({"base_model": "/home/me/model"}, "base_model '/home/me/model' is no id on the Hub"),
        ({"datasets": ["a/b/c"]}, "data set 'a/b/c' is no id"),
        ({"metadata": {"license": "mit"}}, "metadata: license is an argument of its own"),
        ({"metadata": {"language": {1, 2}}}, "text, numbers, lists and mappings"),
        ({"metadata": {"value": float("nan")}}, "reads back as something else"),
        ({"title": "\ud800"}, "cannot be written as UTF-8"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, message):
    """What cannot be on a card is told by its name."""
    with pytest.raises(ArgumentError, match=message):
        card(**arguments)


@pytest.fixture
def template(tmp_path: Path):
    """Write a template and return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "card.md"
        path.write_text(text)
        return path

    return write


def test_a_template_replaces_all_but_the_metadata(template):
    """A user's template has every argument as a variable; what it prints is escaped, unless it says otherwise."""
    text = card(
        template=template(
            "{# a comment #}\n# {{ title }} {{ tag }}\n{% for name, value in metrics.items() %}\n"
            "{{ labels[name] }}: {{ value }}\n{% endfor %}\n{{ lineage.run }} {{ '<i>' | safe }} {{ license | e }}\n"
            "{% macro bold(x) %}**{{ x }}**{% endmacro %}{{ bold(repo_id) | safe }} {{ title ~ repo_id | safe }}"
        ),
        title="a_b",
        tag="v1",
        license="*",
        metrics={"accuracy": 0.25},
        lineage={"run": "<r>"},
    )
    metadata, body = text.removeprefix("---\n").split("\n---\n\n")
    assert yaml.safe_load(metadata)["license"] == "*"
    assert body == "# a\\_b v1\naccuracy of the next token: 0.25\n\\<r\\> <i> \\*\n**team/model** a\\_bteam/model\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n{% if %}", r"card\.md, line 2: Expected an expression"),
        ("one\ntwo\n{{ nothing }}", r"card\.md, line 3: 'nothing' is undefined"),
        ("{% for x in tags %}\n{{ 1 / 0 }}\n{% endfor %}", r"card\.md, line 2: ZeroDivisionError"),
        (
            "\n{{ title.__class__.__mro__ }}",
            r"card\.md, line 2: access to attribute '__class__' .*unsafe",
        ),
        ("\n{{ tags.append('x') }}", r"card\.md, line 2: .*append"),
        ("{% include '/etc/hostname' %}", r"card\.md, line 1: "),
        ("\n\n{{ 'x'.format_map(tags) }}{{ range(10**9) }}", r"card\.md, line 3: "),
    ],
)
def test_an_error_in_a_template_has_file_and_line(template, text, message):
    """A template that is wrong, asks for what there is not, or reaches beyond its facts is refused at its line."""
    with pytest.raises(ArgumentError, match=message):
        card(template=template(text))


def test_a_template_that_cannot_be_read_is_named(tmp_path):
    """A missing template, and one that is not UTF-8, are told by their path."""
    with pytest.raises(ArgumentError, match=r"none\.md: cannot be read as a template"):
        card(template=tmp_path / "none.md")
    (tmp_path / "bytes.md").write_bytes(b"\xff")
    with pytest.raises(ArgumentError, match=r"bytes\.md: cannot be read as a template"):
        card(template=tmp_path / "bytes.md")


def test_facts_come_from_the_manifest_of_a_step():
    """What a manifest says of its making becomes rows; what a trainer did not record is left out."""
    hardware = {"torch": "2.13", "device": "H200"}
    lineage = {"parent": {"step": 3, "url": "/x"}, "data": "ab", "flow_run": "f", "hardware": hardware, "plan": "p"}
    manifest = Manifest(run="r", step=7, time="", world_size=1, lineage={**lineage, "libraries": {"torch": "2.13"}})
    facts = checkpoint_facts(manifest)
    assert list(facts["lineage"].items()) == [
        ("checkpoint", manifest.digest()),
        ("run", "r"),
        ("step", 7),
        ("parent", "step 3"),
        ("training data", "ab"),
        ("flow run", "f"),
    ]
    assert manifest.digest().startswith("sha256:")
    assert (facts["libraries"], list(facts["hardware"])) == ({"torch": "2.13"}, ["device", "torch"])
    assert checkpoint_facts(Manifest(run="r", step=1, time="", world_size=1))["lineage"]["parent"] == "none"
    assert "| parent | step 3 |" in card(**facts)


def test_facts_come_from_the_record_of_an_export():
    """The digest of the checkpoint, its run and step, and the versions are what `export.json` says."""
    record = {"source": {"run": "r", "step": 7, "digest": "sha256:ab"}, "libraries": {"torch": "2.13"}}
    assert export_facts(record) == {
        "lineage": {"checkpoint": "sha256:ab", "run": "r", "step": 7},
        "libraries": {"torch": "2.13"},
    }
    assert export_facts({"source": [], "libraries": None}) == {"lineage": {}, "libraries": {}}
