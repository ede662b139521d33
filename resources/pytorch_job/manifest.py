"""The PyTorchJob as a mapping, from typed settings. Pure: no connection, no clock, inputs left as they are."""

import copy
from collections.abc import Mapping
from typing import Any

import kubernetes.client
from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import UserDefinedDagsterK8sConfig
from dagster_k8s.models import k8s_model_from_dict
from kubernetes.client import ApiClient

from resources.kubernetes.errors import SettingsError
from resources.kubernetes.naming import MAX_LABEL_LENGTH, check_dns_1035, derive_name
from resources.pytorch_job.config import CONTAINER_NAME, PyTorchJobConfig

_LONGEST_SUFFIX = "-worker-9999"


def job_name(prefix: str, *, run_id: str, step_key: str, attempt: int) -> str:
    """Name of the PyTorchJob of one attempt at one step of one Dagster run."""
    return derive_name(prefix, run_id, step_key, str(attempt), reserve=len(_LONGEST_SUFFIX))


def check_job_name(name: str, replicas: int) -> None:
    """SettingsError unless the name and everything derived from it is a DNS-1035 label."""
    check_dns_1035("PyTorchJob", name)
    longest = f"{name}-worker-{max(replicas - 1, 0)}"
    if len(longest) > MAX_LABEL_LENGTH:
        raise SettingsError(
            f"PyTorchJob name {name!r} is too long: its pod {longest!r} would have {len(longest)} characters, and "
            f"Kubernetes takes {MAX_LABEL_LENGTH}. Shorten it by {len(longest) - MAX_LABEL_LENGTH}."
        )


GROUP = "kubeflow.org"
VERSION = "v1"
KIND = "PyTorchJob"
PLURAL = "pytorchjobs"


def build_pytorch_job_manifest(
    config: PyTorchJobConfig,
    *,
    name: str,
    namespace: str,
    env: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The whole custom resource. `env` joins the settings' own in every replica; labels and annotations likewise.

    SettingsError for a name that the operator, or a pod or service named after it, would not take, and for pod
    overrides that would leave the operator without its container.
    """
    check_job_name(name, config.replicas)
    all_labels = {**config.labels, **(labels or {})}
    all_annotations = {**config.annotations, **(annotations or {})}
    template = _pod_template(config, env or {}, all_labels, config.annotations)
    metadata: dict[str, Any] = {"name": name, "namespace": namespace, "labels": all_labels}
    if all_annotations:
        metadata["annotations"] = all_annotations
    spec = _deep_merged(_job_spec(config, template), config.extra_spec)
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": metadata, "spec": spec}


def _job_spec(config: PyTorchJobConfig, template: dict[str, Any]) -> dict[str, Any]:
    policy = config.run_policy
    spec: dict[str, Any] = {
        "nprocPerNode": str(config.nproc_per_node),
        "runPolicy": {
            "activeDeadlineSeconds": policy.active_deadline_seconds,
            "ttlSecondsAfterFinished": policy.ttl_seconds_after_finished,
            "backoffLimit": policy.backoff_limit,
            "cleanPodPolicy": policy.clean_pod_policy,
        },
        "pytorchReplicaSpecs": _replica_specs(config, template),
    }
    if config.elastic_policy:
        elastic = config.elastic_policy
        spec["elasticPolicy"] = _without_none(
            {
                "minReplicas": elastic.min_replicas,
                "maxReplicas": elastic.max_replicas,
                "maxRestarts": elastic.max_restarts,
                "rdzvBackend": elastic.rdzv_backend,
                "rdzvId": elastic.rdzv_id,
                "rdzvPort": elastic.rdzv_port,
            }
        )
    return spec


def _replica_specs(config: PyTorchJobConfig, template: dict[str, Any]) -> dict[str, Any]:
    def replica(count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": config.restart_policy, "template": copy.deepcopy(template)}

    if config.elastic_policy:
        return {"Worker": replica(config.replicas)}
    if config.replicas == 1:
        return {"Master": replica(1)}
    return {"Master": replica(1), "Worker": replica(config.replicas - 1)}


def _pod_template(
    config: PyTorchJobConfig, env: Mapping[str, str], labels: Mapping[str, str], annotations: Mapping[str, str]
) -> dict[str, Any]:
    base = K8sContainerContext(
        run_k8s_config=UserDefinedDagsterK8sConfig(
            container_config=_container(config, env),
            pod_spec_config=_pod_spec(config),
            pod_template_spec_metadata=_without_empty({"labels": dict(labels), "annotations": dict(annotations)}),
        )
    )
    overrides = K8sContainerContext(run_k8s_config=config.pod_template.user_config())
    merged = base.merge(overrides).run_k8s_config
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
    sources = [{"config_map_ref": {"name": name}} for name in config.env_config_maps]
    sources += [{"secret_ref": {"name": name}} for name in config.env_secrets]
    mounts = [{"name": name, "mount_path": path} for name, path, _ in _memory_and_scratch(config)]
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
                "env_from": sources,
                "volume_mounts": mounts,
                "resources": _resources(config),
            }
        ),
    }


def _resources(config: PyTorchJobConfig) -> dict[str, Any]:
    gpus = {config.gpu_resource: str(config.gpu)} if config.gpu else {}
    requests = _without_none({"cpu": config.cpu, "memory": config.memory}) | gpus
    limits = _without_none({"cpu": config.cpu_limit, "memory": config.memory}) | gpus
    return _without_empty({"requests": requests, "limits": limits})


def _pod_spec(config: PyTorchJobConfig) -> dict[str, Any]:
    tolerations = [
        _without_none(
            {
                "key": toleration.key,
                "operator": toleration.operator,
                "value": toleration.value,
                "effect": None if toleration.effect == "Any" else toleration.effect,
                "toleration_seconds": toleration.toleration_seconds,
            }
        )
        for toleration in config.tolerations
    ]
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
                "tolerations": tolerations,
                "priority_class_name": config.priority_class_name,
                "scheduler_name": config.scheduler_name,
                "service_account_name": config.service_account_name,
                "volumes": [{"name": name, "empty_dir": source} for name, _, source in _memory_and_scratch(config)],
            }
        ),
    }


def _memory_and_scratch(config: PyTorchJobConfig) -> list[tuple[str, str, dict[str, str]]]:
    """Name, mount path and emptyDir source of each volume."""
    volumes = []
    if config.shared_memory:
        volumes.append(("shared-memory", "/dev/shm", {"medium": "Memory", "size_limit": config.shared_memory}))
    if config.scratch:
        volumes.append(("scratch", "/tmp", {"size_limit": config.scratch}))
    return volumes


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


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
