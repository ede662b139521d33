"""Builds the PyTorchJob as a mapping, from typed settings. Pure: no connection, no clock, inputs unchanged."""

import copy
from collections.abc import Mapping
from typing import Any

from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import UserDefinedDagsterK8sConfig
from dagster_k8s.models import k8s_model_from_dict
from kubernetes import client as k8s
from pydantic.alias_generators import to_camel

from resources.kubernetes.naming import check_name
from resources.pytorch_job.config import CONTAINER_NAME, PyTorchJobConfig

GROUP = "kubeflow.org"
VERSION = "v1"
KIND = "PyTorchJob"
PLURAL = "pytorchjobs"
LONGEST_SUFFIX = "-worker-9999"


def build_pytorch_job_manifest(
    config: PyTorchJobConfig,
    *,
    name: str,
    namespace: str,
    env: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The complete custom resource. `env` and `labels` are added to those of the settings in every replica.

    SettingsError for a name that is invalid for the operator or for a pod or service named after it, and for pod
    overrides that would remove the operator's container.
    """
    check_name(KIND, name, f"{name}-worker-{max(config.replicas - 1, 0)}")
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
    gpus = {config.gpu_resource: str(config.gpu)} if config.gpu else {}
    base = K8sContainerContext(
        image_pull_policy=config.image_pull_policy,
        image_pull_secrets=[{"name": name} for name in config.image_pull_secrets],
        service_account_name=config.service_account_name,
        env_config_maps=config.env_config_maps,
        env_secrets=config.env_secrets,
        env=[
            *({"name": name, "value": value} for name, value in {**config.env, **env}.items()),
            *(
                {"name": name, "value_from": {"secret_key_ref": {"name": ref.secret, "key": ref.key}}}
                for name, ref in config.secret_env.items()
            ),
        ],
        volume_mounts=[{"name": name, "mount_path": path} for name, path, _ in _volumes(config)],
        volumes=[{"name": name, "empty_dir": source} for name, _, source in _volumes(config)],
        labels=labels,
        resources=_without_empty(
            {
                "requests": _without_empty({"cpu": config.cpu, "memory": config.memory}) | gpus,
                "limits": _without_empty({"cpu": config.cpu_limit, "memory": config.memory}) | gpus,
            }
        ),
        security_context={
            "allow_privilege_escalation": False,
            "capabilities": {"drop": ["ALL"]},
            "read_only_root_filesystem": True,
        },
        run_k8s_config=UserDefinedDagsterK8sConfig(container_config=_container(config), pod_spec_config=_pod(config)),
    )
    merged = base.merge(K8sContainerContext(run_k8s_config=config.pod_template.k8s_config())).run_k8s_config
    pod = dict(merged.pod_spec_config)
    pod["containers"] = [{**merged.container_config, "name": CONTAINER_NAME}, *pod.get("containers", ())]
    content = {"metadata": dict(merged.pod_template_spec_metadata), "spec": pod}
    body: Any = k8s.ApiClient().sanitize_for_serialization(k8s_model_from_dict(k8s.V1PodTemplateSpec, content))
    return body


def _container(config: PyTorchJobConfig) -> dict[str, Any]:
    return _without_empty({"image": config.image, "command": list(config.command), "args": list(config.args)})


def _pod(config: PyTorchJobConfig) -> dict[str, Any]:
    tolerations = [{"operator": "Equal" if "value" in each else "Exists", **each} for each in config.tolerations]
    return {
        # The operator checks its deadline only when something else happens to the job (1.9.4 puts the reminder into a
        # queue that nobody reads). A pod's deadline is enforced by the kubelet, which triggers that check.
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
        **_without_empty({"node_selector": dict(config.node_selector), "tolerations": tolerations}),
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
