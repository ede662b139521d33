"""Builds the PyTorchJob as a mapping, from typed settings. Pure: no connection, no clock, inputs unchanged."""

import copy
from collections.abc import Mapping
from typing import Any

from dagster_k8s.container_context import K8sContainerContext
from dagster_k8s.job import UserDefinedDagsterK8sConfig
from pydantic.alias_generators import to_camel

from resources.kubernetes.naming import check_name
from resources.kubernetes.pod_template import build_job_metadata, build_pod_template, deep_merged
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
    metadata = build_job_metadata(config, name, namespace, all_labels, annotations)
    template = build_pod_template(config, CONTAINER_NAME, env or {}, all_labels, _pods(config))
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
        "spec": deep_merged(spec, config.extra_spec),
    }


def _pods(config: PyTorchJobConfig) -> K8sContainerContext:
    """What only a PyTorchJob's pods have."""
    # The operator checks its deadline only when something else happens to the job (1.9.4 puts the reminder into a
    # queue that nobody reads). A pod's deadline is enforced by the kubelet, which triggers that check.
    deadline = {"active_deadline_seconds": config.run_policy.active_deadline_seconds}
    return K8sContainerContext(
        image_pull_policy=config.image_pull_policy,
        env_config_maps=config.env_config_maps,
        env_secrets=config.env_secrets,
        run_k8s_config=UserDefinedDagsterK8sConfig(pod_spec_config=deadline),
    ).merge(K8sContainerContext(run_k8s_config=config.pod_template.k8s_config()))
