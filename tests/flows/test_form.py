"""The form of each flow's parameters, as somebody sees it who has not read the code; and what a wrong value is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ParameterTypeError, PrefectHTTPStatusError
from prefect.utilities.callables import parameter_schema

from flows.convert import convert
from flows.maintain import maintain
from flows.publish import publish
from flows.retrain import retrain
from flows.rollback import rollback

FLOWS = [retrain, convert, publish, rollback, maintain]


def schema(flow: Flow[..., Any]) -> dict[str, Any]:
    """Return the schema that the UI makes a flow's form from."""
    return parameter_schema(flow.fn).model_dump()


def fields(whole: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each field of a form by its path, those of the groups too."""
    groups = {"": whole, **{f"{name}.": group for name, group in whole["definitions"].items()}}
    for prefix, group in groups.items():
        for name, field in group["properties"].items():
            yield prefix + name, field


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_each_field_is_described(flow: Flow[..., Any]):
    """A text stands beside each parameter of a flow, and beside each field of its groups."""
    undescribed = [name for name, field in fields(schema(flow)) if not field.get("description")]
    assert undescribed == []


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_only_what_nobody_can_guess_is_required(flow: Flow[..., Any]):
    """All else has a default that the form shows."""
    required = {
        "retrain": [],
        "convert": ["checkpoint"],
        "publish": ["export"],
        "rollback": ["store", "run", "repo", "to"],
        "maintain": [],
    }
    whole = schema(flow)
    assert whole.get("required", []) == required[flow.name]
    shown = {name for name, field in whole["properties"].items() if "default" in field}
    assert shown == set(whole["properties"]) - set(required[flow.name])


def test_what_has_choices_offers_them():
    """Device, cast, metric, direction and what becomes of a worse model are chosen from a list."""
    offered = {name: values for name, field in fields(schema(retrain)) if (values := choices(field))}
    assert offered == {
        "ComputeSettings.device": ["auto", "cpu", "cuda"],
        "ExportSettings.dtype": ["float32", "bfloat16", "float16"],
        "HubSettings.on_worse": ["stop", "branch", "approve"],
        "PolicySettings.metric": ["heldout_loss", "perplexity", "bits_per_byte", "accuracy"],
        "PolicySettings.direction": ["lower", "higher"],
    }


def choices(field: dict[str, Any]) -> list[str]:
    """Return what a field lets a person choose from."""
    return next((kind["enum"] for kind in [field, *field.get("anyOf", [])] if "enum" in kind), [])


WRONG = [
    ({"run": "../elsewhere"}, "run", "expected 1 to 64 letters, digits, '.', '_' or '-', the first"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"keep_checkpoints": 0}, "keep_checkpoints", "greater than or equal to 1"),
    ({"compute": {"ranks": 0}}, "compute.ranks", "greater than or equal to 1"),
    ({"compute": {"device": "tpu"}}, "compute.device", "'auto', 'cpu' or 'cuda'"),
    ({"compute": {"gpus": 8}}, "compute.gpus", "Extra inputs are not permitted"),
    ({"compute": {"trainer": "my trainer.py"}}, "compute.trainer", "expected a module's name, such as"),
    ({"steps": [{"learning_rate": "fast"}]}, "steps.0.learning_rate", "valid number"),
    ({"data": {"heldout_every": 1}}, "data.heldout_every", "greater than or equal to 2"),
    ({"export": {"dtype": "int4"}}, "export.dtype", "'float32', 'bfloat16' or 'float16'"),
    ({"hub": {"repo_id": "no-owner"}}, "hub.repo_id", "expected owner/name, an absolute path or a URL"),
    ({"hub": {"policy": {"margin": -1}}}, "hub.policy.margin", "greater than or equal to 0"),
]


@pytest.mark.parametrize(("parameters", "field", "expected"), WRONG, ids=[field for _, field, _ in WRONG])
def test_a_wrong_value_is_told_by_field_and_expectation(parameters: dict[str, Any], field: str, expected: str):
    """The flow's own validation names the field as a person would, and says what it expected there."""
    with pytest.raises(ParameterTypeError) as told:
        retrain.validate_parameters(parameters)
    [line] = [line for line in str(told.value).splitlines() if line.startswith(" - ")]
    assert line.startswith(f" - {field}: ")
    assert expected in line


@pytest.mark.parametrize(
    ("flow", "parameters", "field", "expected"),
    [
        (convert, {"checkpoint": "a", "export": {"max_shard_megabytes": 0}}, "export.max_shard_megabytes", "than 0"),
        (convert, {"checkpoint": "a", "allow_nonfinite": "perhaps"}, "allow_nonfinite", "valid boolean"),
        (publish, {"export": "out", "hub": {"on_worse": "shrug"}}, "hub.on_worse", "'stop', 'branch' or 'approve'"),
        (rollback, {"store": "runs", "run": "a/b", "repo": "me/it", "to": "v1"}, "run", "expected 1 to 64 letters"),
        (rollback, {"store": "runs", "run": "a", "repo": "it", "to": "v1"}, "repo", "expected owner/name, an absolute"),
    ],
)  # fmt: skip
def test_the_other_flows_name_the_field_too(
    flow: Flow[..., Any], parameters: dict[str, Any], field: str, expected: str
):
    """Each flow says what it expected of a wrong value, and where."""
    with pytest.raises(ParameterTypeError) as told:
        flow.validate_parameters(parameters)
    [line] = [line for line in str(told.value).splitlines() if line.startswith(" - ")]
    assert line.startswith(f" - {field}: ")
    assert expected in line


@pytest.fixture(scope="module")
def deployed(prefect_home: Any) -> Iterator[tuple[SyncPrefectClient, Any]]:
    """A client, and the id of a deployment of `retrain` that checks its parameters, as those of prefect.yaml do."""
    with get_client(sync_client=True) as client:
        yield (
            client,
            client.create_deployment(
                flow_id=client.create_flow(retrain),
                name="form",
                parameter_openapi_schema=parameter_schema(retrain.fn).model_dump_for_openapi(),
                enforce_parameter_schema=True,
            ),
        )


@pytest.mark.parametrize(("parameters", "field", "expected"), WRONG[:8], ids=[field for _, field, _ in WRONG[:8]])
def test_the_server_refuses_a_wrong_value(
    deployed: tuple[SyncPrefectClient, Any], parameters: dict[str, Any], field: str, expected: str
):
    """A run of a deployment with a wrong value is never made: the answer names the field."""
    client, deployment = deployed
    with pytest.raises(PrefectHTTPStatusError) as told:
        client.create_flow_run_from_deployment(deployment, parameters=parameters)
    assert told.value.response.status_code == httpx.codes.CONFLICT
    assert field.rpartition(".")[2] in told.value.response.text
