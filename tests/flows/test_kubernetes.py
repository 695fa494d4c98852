"""The Kubernetes variant: its template makes jobs that the API takes, its deployments are those of the other pools."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration
from small_retrain import REPOSITORY

pytestmark = pytest.mark.usefixtures("prefect_home")  # making a job asks the API for blocks
DEPLOYMENTS = REPOSITORY / "deployments"
TEMPLATE = json.loads((DEPLOYMENTS / "kubernetes" / "gpu-job-template.json").read_text(encoding="utf-8"))
KUBERNETES = "1.37"
PREFECTS_OWN = ("parallelism", "completions")
"""What Prefect insists on in the pod's part, where Kubernetes has no such fields and drops them."""


def render(**variables: Any) -> dict[str, Any]:
    """Return the job that a worker makes of the template for a flow run."""
    values = {"image": "registry.test/ckptflow:1", **variables}
    configuration = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, values))
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="retrain nightly"))
    return configuration.job_manifest


def pod(job: dict[str, Any]) -> dict[str, Any]:
    """Return the pod's part of a job."""
    return job["spec"]["template"]["spec"]


def check(resource: dict[str, Any]) -> None:
    """Check a resource against Kubernetes' own schema, in which unknown fields are errors."""
    kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def test_a_job_keeps_to_the_schema_of_kubernetes():
    """Each field is one that Kubernetes knows, with the type that it expects, but for two that Prefect insists on."""
    job = render(cluster_config=None, service_account_name="trainer", env={"NCCL_DEBUG": "INFO"})
    for field in PREFECTS_OWN:
        assert pod(job).pop(field) == 1
    check(job)


@pytest.mark.parametrize("broken", [{"terminationGracePeriodSeconds": "soon"}, {"nodeSelecter": {}}, {"volumes": [{}]}])
def test_the_schema_sees_what_is_wrong(broken: dict[str, Any]):
    """A wrong type, an unknown field and a missing one are found."""
    job = render()
    for field in PREFECTS_OWN:
        pod(job).pop(field)
    pod(job).update(broken)
    with pytest.raises(kubernetes_validate.ValidationError):
        check(job)


def test_a_job_gets_gpus_shared_memory_store_and_time_to_stop():
    """What the default template of Prefect has not: ranks need all of it."""
    job = render(gpus=4, shared_memory="16Gi", grace_seconds=150, store_claim="models")
    spec, [container] = pod(job), pod(job)["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert spec["terminationGracePeriodSeconds"] == 150
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert mounts["/store"]["persistentVolumeClaim"]["claimName"] == "models"
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert job["spec"]["backoffLimit"] == 0


def test_a_stopped_pod_is_scheduled_again_by_prefect():
    """A job is not tried again by Kubernetes; Prefect has the flow run scheduled anew when its pod is told to end."""
    environment = {entry["name"]: entry.get("value") for entry in pod(render())["containers"][0]["env"]}
    assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"


def test_the_hubs_token_comes_from_a_secret():
    """It is in no variable and no manifest; without the secret a flow still starts."""
    [token] = [entry for entry in pod(render(hub_secret="hub"))["containers"][0]["env"] if entry["name"] == "HF_TOKEN"]
    assert token == {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token", "optional": True}},
    }
    assert "HF_TOKEN" not in TEMPLATE["variables"]["properties"]


def test_each_variable_is_described_and_used():
    """A person who fills the form reads what each is for, and none is without effect."""
    text = json.dumps(TEMPLATE["job_configuration"])
    for name, variable in TEMPLATE["variables"]["properties"].items():
        assert variable["description"]
        assert f"{{{{ {name} }}}}" in text
    assert set(TEMPLATE["job_configuration"]) == set(
        KubernetesWorker.get_default_base_job_template()["job_configuration"]
    )


def test_further_nodes_keep_to_the_schema_too():
    """The pods of other nodes see the store and GPUs as the flow's pod does, and have as long to stop."""
    service, nodes = yaml.safe_load_all((DEPLOYMENTS / "kubernetes" / "nodes.yaml").read_text(encoding="utf-8"))
    check(service)
    check(nodes)
    own, theirs = pod(render(gpus="2")), pod(nodes)
    for field in ("nodeSelector", "tolerations", "terminationGracePeriodSeconds", "volumes"):
        assert theirs[field] == own[field]
    for field in ("resources", "volumeMounts", "securityContext"):
        assert theirs["containers"][0][field] == own["containers"][0][field]


def deployments(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return a file's deployments by flow and name, without what differs between kinds of pools."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
    return {(entry["entrypoint"].replace(".py:", ".").replace("/", "."), entry["name"]): entry for entry in found}


def apart_from_place(deployment: dict[str, Any]) -> dict[str, Any]:
    """Return a deployment's parameters but for where its flow runs."""
    return {name: value for name, value in deployment.get("parameters", {}).items() if name not in {"store", "compute"}}


def test_the_deployments_are_those_of_the_other_pools():
    """Flows, names, schedules, triggers and limits are the same; flows that do not train ask for no GPU."""
    here, there = (deployments(DEPLOYMENTS / part / "prefect.yaml") for part in ("kubernetes", "."))
    assert set(here) == set(there)
    for key, deployment in here.items():
        other = there[key]
        for field in ("description", "tags", "schedules", "triggers", "concurrency_limit"):
            assert deployment.get(field) == other.get(field), (key, field)
        ranks = deployment.get("parameters", {}).get("compute", {}).get("ranks", 0)
        assert deployment["work_pool"]["job_variables"]["gpus"] == ranks
        assert (ranks > 0) == ("gpu" in deployment["tags"])
        assert apart_from_place(deployment) == apart_from_place(other), key


def test_the_deployments_can_be_made(tmp_path: Path):
    """`prefect deploy --all` makes them on a pool with the template, with the image of the environment."""
    from prefect import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="kubernetes", type="kubernetes", base_job_template=TEMPLATE))
        env = {**os.environ, "PREFECT_API_URL": str(client.api_url), "CKPTFLOW_IMAGE": "registry.test/ckptflow:2"}
        command = ["--no-prompt", "deploy", "--all", "--prefect-file", "deployments/kubernetes/prefect.yaml"]
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *command], cwd=REPOSITORY, env=env, capture_output=True, text=True,
            timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        nightly = client.read_deployment_by_name("retrain/nightly")
    assert nightly.job_variables == {"image": "registry.test/ckptflow:2", "gpus": 2}
    assert nightly.entrypoint == "flows.retrain.retrain"
    assert nightly.pull_steps == [{"prefect.deployments.steps.set_working_directory": {"directory": "/home/ckptflow"}}]


def test_the_dockerfile_has_nothing_to_complain_of():
    """Its linter finds nothing: versions, users, layers and the shell's pitfalls."""
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DEPLOYMENTS / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == ""
    assert done.returncode == 0


def test_the_image_holds_what_is_copied_and_nothing_else():
    """Each path that the Dockerfile copies is let through by its ignore file, and is there."""
    lines = (DEPLOYMENTS / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {part for line in lines if line.startswith("COPY") and "--from" not in line for part in line.split()[1:-1]}
    passed = (DEPLOYMENTS / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{path}" for path in copied} == {line for line in passed if line.startswith("!")}
    assert all((REPOSITORY / path).exists() for path in copied)
