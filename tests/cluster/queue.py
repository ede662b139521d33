"""A queue of Kueue, made from the committed one, and other work that takes its quota."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from tests.cluster.kinds import K8S, is_installed
from tests.cluster.kubectl import PATIENCE, kubectl

QUEUE = "trainings"
_URGENT = "cifar-test-urgent"
_IMAGE = "python:3.11-slim"


@contextmanager
def queue_with(namespace: str, cpu: str) -> Iterator[str]:
    """A LocalQueue in the namespace with a quota of CPU; gives its name. Skips if the cluster lacks Kueue."""
    if not is_installed("kueue.x-k8s.io"):
        pytest.skip("the cluster does not have Kueue")
    documents: list[dict[str, Any]] = list(yaml.safe_load_all((K8S / "overlays/kueue/queue.yaml").read_text()))
    found = {document["kind"]: document for document in documents}
    local, cluster = found["LocalQueue"], found["ClusterQueue"]
    local["metadata"] = {"name": QUEUE, "namespace": namespace}
    cluster["spec"]["namespaceSelector"]["matchLabels"] = {"kubernetes.io/metadata.name": namespace}
    (group,) = cluster["spec"]["resourceGroups"]
    group["flavors"][0]["resources"] = [
        {"name": "cpu", "nominalQuota": cpu},
        {"name": "memory", "nominalQuota": "100Gi"},
    ]
    urgent = {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "WorkloadPriorityClass",
        "metadata": {"name": _URGENT},
        "value": 1000,
    }
    text = yaml.safe_dump_all([*documents, urgent])
    kubectl("apply", "--server-side", "-f", "-", text=text)
    try:
        yield QUEUE
    finally:
        kubectl("delete", "-f", "-", "--ignore-not-found", PATIENCE, text=text)


@contextmanager
def other_work(namespace: str, cpu: str, *, urgent: bool = False) -> Iterator[None]:
    """A Job in the queue that runs until the block ends. An urgent one preempts what is in its way."""
    labels = {"kueue.x-k8s.io/queue-name": QUEUE} | ({"kueue.x-k8s.io/priority-class": _URGENT} if urgent else {})
    container = {
        "name": "main",
        "image": _IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "3600"],
        "resources": {"requests": {"cpu": cpu, "memory": "16Mi"}},
    }
    spec = {"containers": [container], "restartPolicy": "Never", "terminationGracePeriodSeconds": 0}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "other-work", "namespace": namespace, "labels": labels},
        "spec": {"suspend": True, "template": {"spec": spec}},
    }
    kubectl("create", "-f", "-", text=yaml.safe_dump(job))
    try:
        kubectl("-n", namespace, "wait", "--for=jsonpath={.status.ready}=1", "job/other-work", PATIENCE)
        yield
    finally:
        kubectl("-n", namespace, "delete", "job", "other-work", "--cascade=foreground", PATIENCE)
