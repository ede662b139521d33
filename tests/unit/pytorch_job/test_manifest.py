"""The manifest: every setting reaches it, nothing else does, and it equals what is committed."""

import copy
import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import BaseModel, ValidationError
from syrupy.assertion import SnapshotAssertion

from resources.kubernetes.config import StrictConfig, print_manifest, render_manifest
from resources.kubernetes.errors import SettingsError
from resources.kubernetes.job_config import SecretKey
from resources.pytorch_job import __main__ as command
from resources.pytorch_job.config import PodTemplate, PyTorchJobConfig, RunPolicy
from resources.pytorch_job.manifest import build_pytorch_job_manifest

COMMITTED = Path(__file__).parents[3] / "k8s/pytorchjob"


def build(config: PyTorchJobConfig, **kwargs: Any) -> dict[str, Any]:
    return build_pytorch_job_manifest(config, name="job", namespace="space", **kwargs)


def minimal(**settings: Any) -> PyTorchJobConfig:
    return PyTorchJobConfig(image="image:1", **settings)


# One value of each field that occurs nowhere else in a manifest, and the text by which it is found there.
SENTINELS: dict[type[BaseModel], dict[str, tuple[Any, str]]] = {
    PyTorchJobConfig: {
        "image": ("sentinel/image:7", '"image": "sentinel/image:7"'),
        "image_pull_policy": ("Never", '"imagePullPolicy": "Never"'),
        "image_pull_secrets": (["pull-sentinel"], '"imagePullSecrets": [{"name": "pull-sentinel"}]'),
        "command": (["command-sentinel"], '"command": ["command-sentinel"]'),
        "args": (["args-sentinel"], '"args": ["args-sentinel"]'),
        "env": ({"ENV_SENTINEL": "x"}, '{"name": "ENV_SENTINEL", "value": "x"}'),
        "secret_env": ({"SECRET_SENTINEL": SecretKey(secret="a", key="b")}, '"name": "SECRET_SENTINEL"'),
        "env_secrets": (["secrets-sentinel"], '{"secretRef": {"name": "secrets-sentinel"}}'),
        "env_config_maps": (["maps-sentinel"], '{"configMapRef": {"name": "maps-sentinel"}}'),
        "replicas": (8, '"replicas": 7'),
        "nproc_per_node": (13, '"nprocPerNode": "13"'),
        "restart_policy": ("ExitCode", '"restartPolicy": "ExitCode"'),
        "run_policy": (RunPolicy(backoff_limit=19), '"backoffLimit": 19'),
        "cpu": ("1230m", '"requests": {"cpu": "1230m"}'),
        "cpu_limit": ("4560m", '"limits": {"cpu": "4560m"}'),
        "memory": ("77Mi", '"limits": {"memory": "77Mi"}, "requests": {"memory": "77Mi"}'),
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
        "pod_template": (PodTemplate(container_config={"tty": True}), '"tty": true'),
        "extra_spec": ({"sentinel": 1}, '"sentinel": 1'),
    },
    RunPolicy: {
        "active_deadline_seconds": (101, '"activeDeadlineSeconds": 101'),
        "ttl_seconds_after_finished": (103, '"ttlSecondsAfterFinished": 103'),
        "backoff_limit": (107, '"backoffLimit": 107'),
        "clean_pod_policy": ("All", '"cleanPodPolicy": "All"'),
    },
    SecretKey: {
        "secret": ("secret-sentinel", '"name": "secret-sentinel"'),
        "key": ("key-of-secret", '"key": "key-of-secret"'),
        "optional": (True, '"optional": true'),
    },
    PodTemplate: {
        "container_config": ({"stdin": True}, '"stdin": true'),
        "pod_spec_config": ({"hostname": "host-sentinel"}, '"hostname": "host-sentinel"'),
        "pod_template_spec_metadata": ({"labels": {"meta": "sentinel"}}, '"meta": "sentinel"'),
    },
}
# Fields without which a sentinel would not be valid.
COMPANIONS: dict[str, dict[str, Any]] = {
    "gpu_resource": {"gpu": 1},
    "secret": {"key": "x"},
    "optional": {"key": "x"},
}


def _config_with(model: type[BaseModel], name: str, value: Any) -> PyTorchJobConfig:
    settings = {**COMPANIONS.get(name, {}), name: value}
    if model is PyTorchJobConfig:
        return PyTorchJobConfig(**{"image": "image:1", **settings})
    if model is RunPolicy:
        return minimal(run_policy=RunPolicy(**settings))
    if model is SecretKey:
        return minimal(secret_env={"NAME": SecretKey(**{"secret": "s", **settings})})
    return minimal(pod_template=PodTemplate(**settings))


@pytest.mark.parametrize(
    ("model", "name"), [(model, name) for model, fields in SENTINELS.items() for name in fields], ids=str
)
def test_every_setting_reaches_the_manifest(model: type[BaseModel], name: str) -> None:
    value, expected = SENTINELS[model][name]
    text = json.dumps(build(_config_with(model, name, value)))
    assert expected in text


def test_sentinel_tables_cover_every_field_of_every_model() -> None:
    models = {each for each in StrictConfig.__subclasses__() if each.__module__.startswith("resources.pytorch_job.")}
    assert set(SENTINELS) == models | {PyTorchJobConfig, SecretKey}
    for model, fields in SENTINELS.items():
        assert set(fields) == set(model.model_fields), model


def test_one_master_and_workers() -> None:
    spec = build(minimal(replicas=3))["spec"]["pytorchReplicaSpecs"]
    assert spec["Master"]["replicas"] == 1
    assert spec["Worker"]["replicas"] == 2
    assert spec["Master"]["template"] == spec["Worker"]["template"]
    assert set(build(minimal())["spec"]["pytorchReplicaSpecs"]) == {"Master"}


def test_pod_overrides_merge_as_dagster_k8s_does() -> None:
    overrides: dict[str, Any] = {
        "container_config": {
            "env": [{"name": "MORE", "value": "2"}],
            "resources": {"limits": {"hugepages-2Mi": "4Mi"}},
            "securityContext": {"readOnlyRootFilesystem": False},
        },
        "pod_spec_config": {
            "containers": [{"name": "sidecar", "image": "proxy:1"}],
            "tolerations": [{"key": "other", "operator": "Exists"}],
        },
    }
    settings: dict[str, Any] = {"env": {"ONE": "1"}, "memory": "1Gi", "tolerations": [{"key": "gpu"}]}
    deep = build(minimal(**settings, pod_template=PodTemplate(**overrides)))

    def parts(manifest: dict[str, Any]) -> tuple[Any, ...]:
        spec = manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
        main, sidecar = spec["containers"]
        assert (main["name"], sidecar["name"]) == ("pytorch", "sidecar")
        return main, [t["key"] for t in spec["tolerations"]]

    main, tolerations = parts(deep)
    assert [variable["name"] for variable in main["env"]] == ["ONE", "MORE"]
    assert main["resources"]["limits"] == {"memory": "1Gi", "hugepages-2Mi": "4Mi"}
    assert main["securityContext"]["readOnlyRootFilesystem"] is False
    assert main["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert tolerations == ["gpu", "other"]


def test_settings_are_run_config_of_an_asset() -> None:
    seen: list[PyTorchJobConfig] = []

    @dg.asset
    def trained(config: PyTorchJobConfig) -> None:
        seen.append(config)

    config = {"image": "image:1", "replicas": 2, "tolerations": [{"key": "gpu", "effect": "NoSchedule"}]}
    assert dg.materialize([trained], run_config={"ops": {"trained": {"config": config}}}).success
    assert seen == [PyTorchJobConfig(image="image:1", replicas=2, tolerations=[{"key": "gpu", "effect": "NoSchedule"}])]


def test_builder_leaves_its_inputs_alone() -> None:
    config = minimal(
        env={"A": "1"},
        labels={"a": "b"},
        pod_template=PodTemplate(container_config={"env": [{"name": "B", "value": "2"}]}),
    )
    before = copy.deepcopy(config.model_dump())
    env, labels = {"C": "3"}, {"c": "d"}
    first = build(config, env=env, labels=labels)
    first["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["env"].clear()
    second = build(config, env=env, labels=labels)
    assert config.model_dump() == before
    assert (env, labels) == ({"C": "3"}, {"c": "d"})
    names = [
        e["name"] for e in second["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["env"]
    ]
    assert names == ["A", "C", "B"]


def test_pods_are_restricted_and_bounded_by_default() -> None:
    manifest = build(minimal())
    template = manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert template["automountServiceAccountToken"] is False
    assert template["securityContext"]["runAsNonRoot"] is True
    assert template["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert manifest["spec"]["runPolicy"]["activeDeadlineSeconds"] > 0
    assert manifest["spec"]["runPolicy"]["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": ""}, "image"),
        ({"imgae": "x"}, "imgae"),
        ({"replicas": 0}, "replicas"),
        ({"memory": "4 GB"}, "memory '4 GB' is not a Kubernetes quantity"),
        ({"cpu": "two"}, "cpu 'two'"),
        ({"env": {"1A": "x"}}, "'1A' is not a valid name"),
        ({"env": {"DAGSTER_PIPES_CONTEXT": "x"}}, "set by Dagster Pipes"),
        ({"env": {"A": "x"}, "secret_env": {"A": {"secret": "s", "key": "k"}}}, "both set A"),
        ({"env_secrets": ["a/b"]}, "'a/b' is not a DNS subdomain"),
        ({"env_config_maps": ["a..b"]}, "'a..b' is not a DNS subdomain"),
        ({"config_map_mounts": {"/ca": "a" * 254}}, "is not a DNS subdomain"),
        *(
            ({"config_map_mounts": {path: "ca"}}, f"{path!r} is not a folder such as /etc/cifar-ca")
            for path in ("", "ca", "/a:b", "/a/", "/a/../b", "/a//b", "/./a", "//a")
        ),
        *(
            ({"config_map_mounts": {path: "ca"}}, f"{path} is a folder that the pods already have")
            for path in ("/", "/dev/shm", "/tmp")
        ),
        ({"restart_policy": "Sometimes"}, "restart_policy"),
        ({"run_policy": {"clean_pod_policy": "Some"}}, "clean_pod_policy"),
        ({"pod_template": {"container_config": {"name": "trainer"}}}, "supports only one container, 'pytorch'"),
        ({"pod_template": {"container_config": {"imagee": "x"}}}, "imagee"),
        ({"pod_template": {"pod_spec_config": {"restartPolicy": "Never"}}}, "use restart_policy"),
        ({"pod_template": {"pod_spec_config": {"volumes": [{"nme": "x"}]}}}, "nme"),
    ],
)
def test_settings_that_the_operator_would_refuse_or_ignore_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, SettingsError), match=message):
        PyTorchJobConfig(**{"image": "image:1", **settings})


def test_bad_name_is_refused() -> None:
    with pytest.raises(SettingsError, match="DNS-1035"):
        build_pytorch_job_manifest(minimal(), name="Not_A_Name", namespace="space")


def test_whole_manifest(snapshot: SnapshotAssertion) -> None:
    config = minimal(
        replicas=2,
        command=["python", "-m", "train"],
        env={"MODE": "test"},
        secret_env={"TOKEN": SecretKey(secret="tokens", key="train")},
        env_secrets=["store"],
        cpu="1",
        memory="2Gi",
        gpu=1,
        shared_memory="256Mi",
        node_selector={"pool": "gpu"},
        tolerations=[{"key": "nvidia.com/gpu"}],
    )
    assert build(config, env={"DAGSTER_PIPES_CONTEXT": "..."}, labels={"dagster/run-id": "run"}) == snapshot


@pytest.mark.parametrize("settings", sorted(COMMITTED.glob("*.settings.yaml")), ids=lambda path: path.name)
def test_committed_manifest_equals_what_the_code_builds(settings: Path) -> None:
    committed = settings.with_name(settings.name.replace(".settings.yaml", ".yaml"))
    text = render_manifest(command.COMMAND, command.build, settings)
    assert committed.read_text() == text, f"Run: {command.COMMAND} {settings} > {committed}"


def test_there_is_a_committed_manifest() -> None:
    assert list(COMMITTED.glob("*.settings.yaml"))


def test_command_prints_the_manifest_and_refuses_bad_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        return print_manifest(command.COMMAND, command.build, arguments)

    path = tmp_path / "x.settings.yaml"
    path.write_text("name: job\nnamespace: space\nconfig: {image: 'image:1'}\n")
    assert run(str(path)) == 0
    assert "kind: PyTorchJob" in capsys.readouterr().out
    for text, complaint in (
        ("name: job\nnamespace: space\nconfig: {imgae: 'image:1'}\n", "imgae"),
        ("name: job\nconfig: {image: 'image:1'}\n", "namespace"),
        ("config", "mapping"),
    ):
        path.write_text(text)
        assert run(str(path)) == 2
        error = capsys.readouterr().err
        assert "x.settings.yaml" in error
        assert complaint in error
    assert run(str(tmp_path / "missing.yaml")) == 2
    assert run() == 2
