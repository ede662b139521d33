"""Builds the TrainJob as a mapping, from typed settings. Pure: no connection, no clock, inputs unchanged."""

from collections.abc import Mapping
from typing import Any

from dagster_k8s.container_context import K8sContainerContext

from resources.kubernetes.naming import check_name
from resources.kubernetes.pod_template import build_job_metadata, build_pod_template, deep_merged
from resources.train_job.config import CONTAINER_NAME, DEFAULT_GRACE_SECONDS, TrainJobConfig

GROUP = "trainer.kubeflow.org"
VERSION = "v1alpha1"
KIND = "TrainJob"
PLURAL = "trainjobs"
LONGEST_SUFFIX = "-node-0-9999-abcde"
PATCH_MANAGER = "dagster/train-job"
_PATCHES = "runtimePatches"


def build_train_job_manifest(
    config: TrainJobConfig,
    *,
    name: str,
    namespace: str,
    env: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The complete custom resource. `env` and `labels` are added to those of the settings on every node.

    SettingsError for a name that is invalid, also for a pod named after it. Runtime patches in `extra_spec` are
    appended to the one made from the settings.
    """
    check_name(KIND, name, f"{name}-{CONTAINER_NAME}-0-{config.replicas - 1}-abcde")
    all_labels = {**config.labels, **(labels or {})}
    metadata = build_job_metadata(config, name, namespace, all_labels, annotations)
    template = build_pod_template(config, CONTAINER_NAME, env or {}, all_labels, K8sContainerContext())
    trainer = _pop_trainer_fields(template) | {"numNodes": config.replicas, "numProcPerNode": config.nproc_per_node}
    extra = dict(config.extra_spec)
    spec = {
        "runtimeRef": {"apiGroup": GROUP, "kind": config.runtime_kind, "name": config.runtime},
        "activeDeadlineSeconds": config.active_deadline_seconds,
        "trainer": trainer,
        _PATCHES: [_patch(template, all_labels), *extra.pop(_PATCHES, ())],
    }
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": metadata, "spec": deep_merged(spec, extra)}


def _pop_trainer_fields(template: dict[str, Any]) -> dict[str, Any]:
    """The fields of spec.trainer, removed from the pod template. Only what a patch may set is left there."""
    pod = template["spec"]
    pod.pop("automountServiceAccountToken")  # can be set only in the runtime
    if pod["terminationGracePeriodSeconds"] == DEFAULT_GRACE_SECONDS:
        pod.pop("terminationGracePeriodSeconds")  # so that the job can be in a queue, see TrainJobConfig
    (container,) = pod["containers"]
    taken = {name: container.pop(name) for name in ("image", "command", "args", "env") if name in container}
    resources = container.pop("resources", None)
    return taken | ({"resourcesPerNode": resources} if resources else {})


def _patch(template: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """Adds the labels to the runtime's JobSet and pods, and the rest of the pod template to the pods."""
    jobs = [{"name": CONTAINER_NAME, "template": {"spec": {"template": template}}}]
    jobset = {"metadata": {"labels": dict(labels)}, "spec": {"replicatedJobs": jobs}}
    return {"manager": PATCH_MANAGER, "trainingRuntimeSpec": {"template": jobset}}
