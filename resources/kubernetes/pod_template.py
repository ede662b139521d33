"""Builds the parts of a manifest that all kinds of training job share. Pure: inputs unchanged."""

import copy
from collections.abc import Mapping
from typing import Any

from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import UserDefinedDagsterK8sConfig
from dagster_k8s.models import k8s_model_from_dict
from kubernetes import client as k8s

from resources.kubernetes.job_config import JobConfig, SecretKey
from resources.kubernetes.queue import QUEUE_LABEL


def build_job_metadata(
    config: JobConfig, name: str, namespace: str, labels: Mapping[str, str], annotations: Mapping[str, str] | None
) -> dict[str, Any]:
    """The job's metadata. Only the job gets the queue's label: on a pod it would queue the pod."""
    queue = {QUEUE_LABEL: config.queue} if config.queue else {}
    metadata: dict[str, Any] = {"name": name, "namespace": namespace, "labels": {**labels, **queue}}
    if annotations:
        metadata["annotations"] = dict(annotations)
    return metadata


def build_pod_template(
    config: JobConfig, container: str, env: Mapping[str, str], labels: Mapping[str, str], over: K8sContainerContext
) -> dict[str, Any]:
    """The pod template with one container of that name. `over` is merged over it by dagster-k8s' rules."""
    gpus = {config.gpu_resource: str(config.gpu)} if config.gpu else {}
    base = K8sContainerContext(
        image_pull_secrets=[{"name": name} for name in config.image_pull_secrets],
        service_account_name=config.service_account_name,
        env=[
            *({"name": name, "value": value} for name, value in {**config.env, **env}.items()),
            *(
                {"name": name, "value_from": {"secret_key_ref": _secret_key(ref)}}
                for name, ref in config.secret_env.items()
            ),
        ],
        volume_mounts=[{"name": name, "mount_path": path} for name, path, _ in _volumes(config)],
        volumes=[{"name": name, **source} for name, _, source in _volumes(config)],
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
    merged = base.merge(over).run_k8s_config
    pod = dict(merged.pod_spec_config)
    pod["containers"] = [{**merged.container_config, "name": container}, *pod.get("containers", ())]
    content = {"metadata": dict(merged.pod_template_spec_metadata), "spec": pod}
    body: Any = k8s.ApiClient().sanitize_for_serialization(k8s_model_from_dict(k8s.V1PodTemplateSpec, content))
    return body


def _secret_key(ref: SecretKey) -> dict[str, Any]:
    return {"name": ref.secret, "key": ref.key, **({"optional": True} if ref.optional else {})}


def _container(config: JobConfig) -> dict[str, Any]:
    return _without_empty({"image": config.image, "command": list(config.command), "args": list(config.args)})


def _pod(config: JobConfig) -> dict[str, Any]:
    tolerations = [{"operator": "Equal" if "value" in each else "Exists", **each} for each in config.tolerations]
    return {
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


def _volumes(config: JobConfig) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, mount path and source of each volume."""
    volumes: list[tuple[str, str, dict[str, Any]]] = []
    if config.shared_memory:
        memory = {"medium": "Memory", "size_limit": config.shared_memory}
        volumes.append(("shared-memory", "/dev/shm", {"empty_dir": memory}))
    if config.scratch:
        volumes.append(("scratch", "/tmp", {"empty_dir": {"size_limit": config.scratch}}))
    for number, (folder, name) in enumerate(sorted(config.config_map_mounts.items())):
        volumes.append((f"files-{number}", folder, {"config_map": {"name": name, "optional": True}}))
    return volumes


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


def deep_merged(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `extra` merged over it; lists are replaced."""
    merged = dict(base)
    for key, value in extra.items():
        current = merged.get(key)
        if isinstance(current, dict) and isinstance(value, Mapping):
            merged[key] = deep_merged(current, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
