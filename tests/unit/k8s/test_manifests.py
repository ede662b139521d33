"""The committed YAML, checked without a cluster. tests/cluster/test_platform.py applies it."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar_assets.deployment import trainer_for
from resources.object_store import FolderStore
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.settings import settings_of

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
UNITS = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30, "": 1.0}


def documents(*folders: str) -> list[tuple[str, dict[str, Any]]]:
    paths = [path for folder in folders for path in sorted((K8S / folder).rglob("*.yaml"))]
    return [
        (f"{path.relative_to(K8S)}:{document['kind']}", document)
        for path in paths
        if not path.name.endswith(".settings.yaml")
        for document in yaml.safe_load_all(path.read_text())
        if document
    ]


BASES = ("platform", "access", "pytorchjob", "trainjob")
FOLDERS = (*BASES, "overlays/kueue", "overlays/seaweedfs")
OBJECTS = [(name, document) for name, document in documents(*FOLDERS) if "Kustom" not in name]


def pod_specs(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if document["kind"] in ("Deployment", "Job"):
        yield document["spec"]["template"]["spec"]
    if document["kind"] == "PyTorchJob":
        for replica in document["spec"]["pytorchReplicaSpecs"].values():
            yield replica["template"]["spec"]


PODS = [(name, spec) for name, document in OBJECTS for spec in pod_specs(document)]


def quantity(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    assert match
    return float(match[1]) * UNITS[match[2]]


def test_no_secret_is_committed() -> None:
    assert not [name for name, document in OBJECTS if document["kind"] == "Secret"]
    text = "\n".join(path.read_text() for path in K8S.rglob("*.yaml"))
    assert "secretGenerator" not in text


@pytest.mark.parametrize(("name", "spec"), PODS, ids=[name for name, _ in PODS])
def test_pods_are_restricted(name: str, spec: dict[str, Any]) -> None:
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"]["drop"] == ["ALL"]
        assert container["imagePullPolicy"] == "IfNotPresent"
        assert "memory" in container["resources"]["limits"]


def test_platform_and_one_training_fit_a_small_minikube() -> None:
    """4 CPU and 8 GB, of which Kubernetes itself, its operators and Dagster take about half."""
    cpu = memory = 0.0
    for name, spec in PODS:
        if name.startswith("overlays/"):
            continue
        for container in spec["containers"]:
            requests = container["resources"]["requests"]
            cpu += quantity(requests["cpu"])
            memory += quantity(requests["memory"])
    assert cpu <= 2
    assert memory <= 4 * 2**30


def test_roles_name_verbs_and_resources_without_wildcards_and_are_in_the_docs() -> None:
    table = "".join((ROOT / "docs" / page).read_text() for page in ("kubernetes.md", "trainjob.md"))
    roles = [document for _, document in OBJECTS if document["kind"] in ("Role", "ClusterRole")]
    assert roles
    for role in roles:
        assert role["kind"] == "Role"
        for rule in role["rules"]:
            for resource in rule["resources"]:
                assert "*" not in (resource, *rule["verbs"], *rule["apiGroups"])
                assert f"| `{resource}` | {', '.join(rule['verbs'])} |" in table


@pytest.mark.parametrize("overlay", ["minikube", "gpu", "kueue", "external-store"])
def test_trainer_settings_of_the_overlays_are_valid(overlay: str) -> None:
    overlays = ["minikube", overlay]
    values: dict[str, str] = {}
    for name in overlays:
        kustomization = yaml.safe_load((K8S / f"overlays/{name}/kustomization.yaml").read_text())
        for patch in kustomization["patches"]:
            for change in yaml.safe_load(patch["patch"]):
                values[change["path"].rpartition("/")[2]] = change["value"]
    trainer = trainer_for(settings_of(values), LocalObjectStore())
    for job in (trainer.pytorch_job, trainer.train_job):
        assert job
        assert job.image == values["TRAINER_IMAGE"]
        assert job.memory == json.loads(values["TRAINER_JOB"])["memory"]
        assert job.gpu == (1 if overlay == "gpu" else 0)
    assert isinstance(trainer.object_store.models, FolderStore)


def test_overlay_kueue_queues_trainings_and_its_quota_admits_one_at_a_time() -> None:
    folder = K8S / "overlays/kueue"
    (patch,) = yaml.safe_load((folder / "kustomization.yaml").read_text())["patches"]
    (change,) = yaml.safe_load(patch["patch"])
    job = json.loads(change["value"])
    queues = {each["kind"]: each for each in yaml.safe_load_all((folder / "queue.yaml").read_text())}
    assert job["queue"] == queues["LocalQueue"]["metadata"]["name"]
    assert queues["LocalQueue"]["spec"]["clusterQueue"] == queues["ClusterQueue"]["metadata"]["name"]
    (group,) = queues["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == queues["ResourceFlavor"]["metadata"]["name"]
    quota = {each["name"]: quantity(each["nominalQuota"]) for each in flavor["resources"]}
    assert set(quota) == set(group["coveredResources"])
    for name, allowed in quota.items():
        assert quantity(job[name]) <= allowed < 2 * quantity(job[name])


def built(overlay: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of an overlay, by kind and name."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    command = ["kubectl", "kustomize", str(K8S / "overlays" / overlay)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}


def test_overlay_seaweedfs_changes_only_the_object_store() -> None:
    before, after = built("minikube"), built("seaweedfs")
    replaced = ("Deployment", "PersistentVolumeClaim")
    assert set(before) - set(after) == {(kind, "minio") for kind in replaced}
    assert set(after) - set(before) == {(kind, "seaweedfs") for kind in replaced}
    changed = {key for key in set(before) & set(after) if before[key] != after[key]}
    assert changed == {("Service", "minio"), ("Job", "store-setup")}
    pods = {
        name: objects["Deployment", name]["spec"]["template"]
        for name, objects in (("minio", before), ("seaweedfs", after))
    }
    labels = {name: set(pod["metadata"]["labels"].items()) for name, pod in pods.items()}
    assert labels["minio"] < labels["seaweedfs"], "the network policies select it"
    selector = set(after["Service", "minio"]["spec"]["selector"].items())
    assert selector <= labels["seaweedfs"]
    assert not selector <= labels["minio"], "a MinIO that still runs gets no requests"
    ports = [pod["spec"]["containers"][0]["ports"] for pod in pods.values()]
    assert ports[0] == ports[1]


@pytest.mark.parametrize(("shown", "code"), [('"fsync": true', 0), ("connection refused", 1)])
def test_seaweedfs_starts_only_with_the_confirmed_setting(shown: str, code: int, tmp_path: Path) -> None:
    """Run the hook with fake commands, where each look at the clock takes 100 s."""
    (deployment,) = (each for _, each in documents("overlays/seaweedfs") if each["kind"] == "Deployment")
    hook = deployment["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["postStart"]["exec"]["command"]
    clock = tmp_path / "clock"
    programs = {
        "date": f"echo >> {clock}; echo $(($(wc -l < {clock}) * 100))",
        "weed": f"cat > {tmp_path / 'command'}; echo '{shown}'",
        "sleep": "true",
        "sync": "true",
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ended = subprocess.run(hook, env={"PATH": path}, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == code
    assert ("did not confirm the setting fsync within 300 s" in ended.stderr) is bool(code)


def test_every_file_belongs_to_a_kustomization() -> None:
    for folder in (*BASES, "trainjob/training"):
        kustomization = yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())
        files = {path.name for path in (K8S / folder).glob("*.yaml")}
        settings = {name for name in files if name.endswith(".settings.yaml")}
        assert files - settings - {"kustomization.yaml"} == set(kustomization["resources"])
