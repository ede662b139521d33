"""The PyTorchJob as a mapping, from typed settings. Pure: no connection, no clock, inputs left as they are."""

import copy
from collections.abc import Mapping
from typing import Any

import kubernetes.client
from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import UserDefinedDagsterK8sConfig
from dagster_k8s.models import k8s_model_from_dict
from kubernetes.client import ApiClient
from pydantic.alias_generators import to_camel

from resources.kubernetes.errors import SettingsError
from resources.kubernetes.naming import MAX_LABEL_LENGTH, check_dns_1035, derive_name
from resources.pytorch_job.config import CONTAINER_NAME, PyTorchJobConfig

GROUP = "kubeflow.org"
VERSION = "v1"
KIND = "PyTorchJob"
PLURAL = "pytorchjobs"
_LONGEST_SUFFIX = "-worker-9999"


def job_name(prefix: str, *, run_id: str, step_key: str, attempt: int) -> str:
    """Name of the PyTorchJob of one attempt at one step of one Dagster run."""
    return derive_name(prefix, run_id, step_key, str(attempt), reserve=len(_LONGEST_SUFFIX))


def check_job_name(name: str, replicas: int) -> None:
    """SettingsError unless the name and everything derived from it is a DNS-1035 label."""
    check_dns_1035(KIND, name)
    longest = f"{name}-worker-{max(replicas - 1, 0)}"
    if len(longest) > MAX_LABEL_LENGTH:
        raise SettingsError(
            f"PyTorchJob name {name!r} is too long: its pod {longest!r} would have {len(longest)} characters, and "
            f"Kubernetes takes {MAX_LABEL_LENGTH}. Shorten it by {len(longest) - MAX_LABEL_LENGTH}."
        )


def build_pytorch_job_manifest(
    config: PyTorchJobConfig,
    *,
    name: str,
    namespace: str,
    env: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The whole custom resource. `env` and `labels` join those of the settings in every replica.

    SettingsError for a name that the operator, or a pod or service named after it, would not take, and for pod
    overrides that would leave the operator without its container.
    """
    check_job_name(name, config.replicas)
    all_labels = {**config.labels, **(labels or {})}
    metadata: dict[str, Any] = {"name": name, "namespace": namespace, "labels": all_labels}
    if annotations:
        metadata["annotations"] = dict(annotations)
    template = _pod_template(config, env or {}, all_labels)
    counts = {"Master": 1, "Worker": config.replicas - 1}
    spec = {
        "nprocPerNode": str(config.nproc_per_node),
        "runPolicy": {to_camel(name): value for name, value in config.run_policy.model_dump().items()},
        "pytorchReplicaSpecs": {
            kind: {"replicas": count, "restartPolicy": config.restart_policy, "template": copy.deepcopy(template)}
            for kind, count in counts.items()
            if count
        },
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": metadata,
        "spec": _deep_merged(spec, config.extra_spec),
    }


def _pod_template(config: PyTorchJobConfig, env: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, Any]:
    base = UserDefinedDagsterK8sConfig(
        container_config=_container(config, env),
        pod_spec_config=_pod_spec(config),
        pod_template_spec_metadata={"labels": dict(labels)} if labels else {},
    )
    overrides = K8sContainerContext(run_k8s_config=config.pod_template.user_config())
    merged = K8sContainerContext(run_k8s_config=base).merge(overrides).run_k8s_config
    pod_spec = dict(merged.pod_spec_config)
    sidecars = pod_spec.pop("containers", [])
    pod_spec["containers"] = [{**merged.container_config, "name": CONTAINER_NAME}, *sidecars]
    template = k8s_model_from_dict(
        kubernetes.client.V1PodTemplateSpec, {"metadata": dict(merged.pod_template_spec_metadata), "spec": pod_spec}
    )
    body: Any = ApiClient().sanitize_for_serialization(template)
    return body


def _container(config: PyTorchJobConfig, env: Mapping[str, str]) -> dict[str, Any]:
    variables: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in {**config.env, **env}.items()]
    variables += [
        {"name": name, "value_from": {"secret_key_ref": {"name": ref.secret, "key": ref.key}}}
        for name, ref in config.secret_env.items()
    ]
    gpus = {config.gpu_resource: str(config.gpu)} if config.gpu else {}
    resources = {
        "requests": _without_empty({"cpu": config.cpu, "memory": config.memory}) | gpus,
        "limits": _without_empty({"cpu": config.cpu_limit, "memory": config.memory}) | gpus,
    }
    return {
        "image": config.image,
        "image_pull_policy": config.image_pull_policy,
        "security_context": {
            "allow_privilege_escalation": False,
            "capabilities": {"drop": ["ALL"]},
            "read_only_root_filesystem": True,
        },
        **_without_empty(
            {
                "command": list(config.command),
                "args": list(config.args),
                "env": variables,
                "env_from": [
                    *({"config_map_ref": {"name": name}} for name in config.env_config_maps),
                    *({"secret_ref": {"name": name}} for name in config.env_secrets),
                ],
                "volume_mounts": [{"name": name, "mount_path": path} for name, path, _ in _volumes(config)],
                "resources": _without_empty(resources),
            }
        ),
    }


def _pod_spec(config: PyTorchJobConfig) -> dict[str, Any]:
    tolerations = [toleration.model_dump(exclude_none=True) for toleration in config.tolerations]
    return {
        # The operator looks at its own deadline only when something else happens to the job (1.9.4 puts the reminder
        # into a queue that nobody reads). A pod's deadline is the kubelet's: it makes that something happen.
        "active_deadline_seconds": config.run_policy.active_deadline_seconds,
        "automount_service_account_token": False,
        "termination_grace_period_seconds": config.termination_grace_seconds,
        "security_context": {
            "run_as_non_root": True,
            "run_as_user": config.run_as_user,
            "run_as_group": config.run_as_user,
            "fs_group": config.run_as_user,
            "seccomp_profile": {"type": "RuntimeDefault"},
        },
        **_without_empty(
            {
                "image_pull_secrets": [{"name": name} for name in config.image_pull_secrets],
                "node_selector": dict(config.node_selector),
                "tolerations": [
                    {key: value for key, value in each.items() if (key, value) != ("effect", "Any")}
                    for each in tolerations
                ],
                "service_account_name": config.service_account_name,
                "volumes": [{"name": name, "empty_dir": source} for name, _, source in _volumes(config)],
            }
        ),
    }


def _volumes(config: PyTorchJobConfig) -> list[tuple[str, str, dict[str, str]]]:
    """Name, mount path and emptyDir source of each volume."""
    volumes = []
    if config.shared_memory:
        volumes.append(("shared-memory", "/dev/shm", {"medium": "Memory", "size_limit": config.shared_memory}))
    if config.scratch:
        volumes.append(("scratch", "/tmp", {"size_limit": config.scratch}))
    return volumes


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


def _deep_merged(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        current = merged.get(key)
        if isinstance(current, dict) and isinstance(value, Mapping):
            merged[key] = _deep_merged(current, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
