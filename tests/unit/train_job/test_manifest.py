"""Every setting reaches the manifest, and the committed manifests are up to date."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from syrupy.assertion import SnapshotAssertion

from resources.kubernetes.config import render_manifest
from resources.kubernetes.errors import SettingsError
from resources.kubernetes.job_config import SecretKey
from resources.train_job import TrainJobConfig, build_train_job_manifest
from resources.train_job import __main__ as command

K8S = Path(__file__).parents[3] / "k8s/trainjob"
COMMITTED = K8S / "training/trainer.yaml"


def build(config: TrainJobConfig, **kwargs: Any) -> dict[str, Any]:
    return build_train_job_manifest(config, name="job", namespace="space", **kwargs)


def minimal(**settings: Any) -> TrainJobConfig:
    return TrainJobConfig(image="image:1", **settings)


def patched(manifest: dict[str, Any]) -> dict[str, Any]:
    """The pod template of the one patch."""
    (patch,) = manifest["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == "node"
    return node["template"]["spec"]["template"]


# One value of each field that occurs nowhere else in a manifest, and the text by which it is found there.
SENTINELS: dict[str, tuple[Any, str]] = {
    "image": ("sentinel/image:7", '"image": "sentinel/image:7"'),
    "image_pull_secrets": (["pull-sentinel"], '"imagePullSecrets": [{"name": "pull-sentinel"}]'),
    "command": (["command-sentinel"], '"command": ["command-sentinel"]'),
    "args": (["args-sentinel"], '"args": ["args-sentinel"]'),
    "env": ({"ENV_SENTINEL": "x"}, '{"name": "ENV_SENTINEL", "value": "x"}'),
    "secret_env": ({"S": SecretKey(secret="a", key="b")}, '"valueFrom": {"secretKeyRef": {"key": "b", "name": "a"}}'),
    "replicas": (8, '"numNodes": 8'),
    "nproc_per_node": (13, '"numProcPerNode": 13'),
    "cpu": ("1230m", '"requests": {"cpu": "1230m"}'),
    "cpu_limit": ("4560m", '"limits": {"cpu": "4560m"}'),
    "memory": ("77Mi", '"resourcesPerNode": {"limits": {"memory": "77Mi"}, "requests": {"memory": "77Mi"}}'),
    "gpu": (3, '"nvidia.com/gpu": "3"'),
    "gpu_resource": ("sentinel.com/gpu", '"sentinel.com/gpu": "1"'),
    "shared_memory": ("88Mi", '{"medium": "Memory", "sizeLimit": "88Mi"}'),
    "scratch": ("99Mi", '"emptyDir": {"sizeLimit": "99Mi"}'),
    "config_map_mounts": ({"/ca": "sentinel"}, '{"configMap": {"name": "sentinel", "optional": true}'),
    "node_selector": ({"node": "sentinel"}, '"nodeSelector": {"node": "sentinel"}'),
    "tolerations": ([{"key": "taint-sentinel"}], '"tolerations": [{"key": "taint-sentinel", "operator": "Exists"'),
    "service_account_name": ("account-sentinel", '"serviceAccountName": "account-sentinel"'),
    "run_as_user": (1234, '"runAsUser": 1234'),
    "termination_grace_seconds": (43, '"terminationGracePeriodSeconds": 43'),
    "queue": ("queue-sentinel", '"labels": {"kueue.x-k8s.io/queue-name": "queue-sentinel"}'),
    "labels": ({"label": "sentinel"}, '"labels": {"label": "sentinel"}'),
    "runtime": ("runtime-sentinel", '"name": "runtime-sentinel"'),
    "runtime_kind": ("TrainingRuntime", '"kind": "TrainingRuntime"'),
    "active_deadline_seconds": (101, '"activeDeadlineSeconds": 101'),
    "extra_spec": ({"sentinel": 1}, '"sentinel": 1'),
}
COMPANIONS: dict[str, dict[str, Any]] = {"gpu_resource": {"gpu": 1}}


@pytest.mark.parametrize("name", SENTINELS)
def test_every_setting_reaches_the_manifest(name: str) -> None:
    value, expected = SENTINELS[name]
    assert expected in json.dumps(build(minimal_with(name, value)))


def minimal_with(name: str, value: Any) -> TrainJobConfig:
    return TrainJobConfig(**{"image": "image:1", **COMPANIONS.get(name, {}), name: value})


def test_sentinel_table_covers_every_field() -> None:
    assert set(SENTINELS) == set(TrainJobConfig.model_fields)


def test_labels_reach_the_job_its_jobset_and_its_pods() -> None:
    manifest = build(minimal(labels={"a": "1"}), labels={"b": "2"})
    (patch,) = manifest["spec"]["runtimePatches"]
    wanted = {"a": "1", "b": "2"}
    assert manifest["metadata"]["labels"] == wanted
    assert patch["trainingRuntimeSpec"]["template"]["metadata"]["labels"] == wanted
    assert patched(manifest)["metadata"]["labels"] == wanted


def test_patch_sets_only_what_a_patch_may_set() -> None:
    """Trainer refuses an environment in a patch of the container `node`, and unknown fields are dropped."""
    config = minimal(
        command=["a"], args=["b"], env={"A": "1"}, memory="1Gi", shared_memory="1Mi", node_selector={"a": "b"}
    )
    template = patched(build(config, env={"B": "2"}))
    (container,) = template["spec"].pop("containers")
    assert set(container) == {"name", "securityContext", "volumeMounts"}
    assert set(template["spec"]) == {"nodeSelector", "securityContext", "volumes"}


def test_number_of_processes_is_always_set() -> None:
    """Without it Trainer starts one process for each CPU that a node requests."""
    assert build(minimal(cpu="8"))["spec"]["trainer"]["numProcPerNode"] == 1


def test_patches_of_extra_spec_are_appended() -> None:
    theirs = {"manager": "my.org/mine", "trainingRuntimeSpec": {}}
    spec = build(minimal(extra_spec={"runtimePatches": [theirs], "suspend": True}))["spec"]
    assert [patch["manager"] for patch in spec["runtimePatches"]] == ["dagster/train-job", "my.org/mine"]
    assert spec["suspend"] is True


def test_builder_does_not_change_its_inputs() -> None:
    config = minimal(env={"A": "1"}, labels={"a": "b"}, extra_spec={"runtimePatches": [{"manager": "x/y"}]})
    before = copy.deepcopy(config.model_dump())
    env, labels = {"C": "3"}, {"c": "d"}
    first = build(config, env=env, labels=labels)
    first["spec"]["trainer"]["env"].clear()
    first["spec"]["runtimePatches"].clear()
    second = build(config, env=env, labels=labels)
    assert (config.model_dump(), env, labels) == (before, {"C": "3"}, {"c": "d"})
    assert [each["name"] for each in second["spec"]["trainer"]["env"]] == ["A", "C"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": ""}, "runtime"),
        ({"runtime_kind": "Runtime"}, "runtime_kind"),
        ({"active_deadline_seconds": 0}, "active_deadline_seconds"),
        ({"env_secrets": ["x"]}, "env_secrets"),
        ({"env": {"PET_NNODES": "2"}}, "PET_NNODES is set by Trainer"),
        ({"secret_env": {"PET_MASTER_ADDR": {"secret": "a", "key": "b"}}}, "PET_MASTER_ADDR is set by Trainer"),
        ({"env": {"DAGSTER_PIPES_CONTEXT": "x"}}, "set by Dagster Pipes"),
        ({"queue": "q", "termination_grace_seconds": 60}, "set terminationGracePeriodSeconds in the runtime"),
        ({"config_map_mounts": {"/tmp": "ca"}}, "/tmp is a folder that the pods already have"),
        ({"memory": "4 GB"}, "memory '4 GB' is not a Kubernetes quantity"),
    ],
)
def test_settings_that_trainer_would_refuse_or_ignore_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        minimal(**settings)


def test_name_too_long_for_its_pods_is_rejected() -> None:
    longest = "j" * (63 - len("-node-0-9-abcde"))
    build_train_job_manifest(minimal(replicas=10), name=longest, namespace="space")
    with pytest.raises(SettingsError, match=r"too long.*-node-0-10-abcde"):
        build_train_job_manifest(minimal(replicas=11), name=longest, namespace="space")


def test_whole_manifest(snapshot: SnapshotAssertion) -> None:
    config = minimal(
        runtime="runtime",
        runtime_kind="TrainingRuntime",
        replicas=2,
        command=["python", "-m", "train"],
        env={"MODE": "test"},
        secret_env={"TOKEN": SecretKey(secret="tokens", key="train")},
        cpu="1",
        memory="2Gi",
        gpu=1,
        shared_memory="256Mi",
        node_selector={"pool": "gpu"},
        tolerations=[{"key": "nvidia.com/gpu"}],
    )
    assert build(config, env={"DAGSTER_PIPES_CONTEXT": "..."}, labels={"dagster/run-id": "run"}) == snapshot


def test_committed_manifest_is_up_to_date() -> None:
    settings = COMMITTED.with_name("trainer.settings.yaml")
    text = render_manifest(command.COMMAND, command.build, settings)
    assert COMMITTED.read_text() == text, f"Run: {command.COMMAND} {settings} > {COMMITTED}"


def test_committed_runtime_never_restarts_a_node_and_pods_are_restricted() -> None:
    runtime = yaml.safe_load((K8S / "runtime.yaml").read_text())
    job = yaml.safe_load(COMMITTED.read_text())
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    jobset = runtime["spec"]["template"]["spec"]
    assert jobset["failurePolicy"] == {"maxRestarts": 0}
    (node,) = jobset["replicatedJobs"]
    assert node["template"]["spec"]["backoffLimit"] == 0
    pod = node["template"]["spec"]["template"]["spec"]
    assert (pod["restartPolicy"], pod["automountServiceAccountToken"]) == ("Never", False)
    (container,) = pod["containers"]
    assert container["imagePullPolicy"] == "IfNotPresent"
    assert {"secretRef": {"name": "object-store-trainer"}} in container["envFrom"]
    patch = patched(job)["spec"]
    assert patch["securityContext"]["runAsNonRoot"] is True
    assert patch["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = patch["containers"][0]["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert "memory" in job["spec"]["trainer"]["resourcesPerNode"]["limits"]
