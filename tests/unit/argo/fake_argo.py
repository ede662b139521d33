"""A fake of Argo's controller and of the training operator: a test plays the steps of a workflow."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from dagster_k8s.models import k8s_model_from_dict
from kubernetes import client as k8s

from resources.argo.client import PLURAL
from tests.unit.pytorch_job.fake_cluster import FakeCluster, api_error, not_found


@dataclass
class FakeArgo(FakeCluster):
    """Implements the calls of WorkflowClient; the base class handles PyTorchJobs."""

    workflows: dict[str, dict[str, Any]] = field(default_factory=dict)
    step_pods: list[dict[str, Any]] = field(default_factory=list)
    patches: list[dict[str, Any]] = field(default_factory=list)
    num_submitted: int = 0
    on_submitted: Callable[["FakeArgo", str], None] = lambda argo, name: None
    seconds_to_delete: float = 0.0

    def create_namespaced_custom_object(self, group: str, version: str, namespace: str, plural: str, body: Any, **_):
        if plural != PLURAL:
            return super().create_namespaced_custom_object(group, version, namespace, plural, body)
        self.failing("create")
        name = body["metadata"]["name"]
        if name in self.workflows:
            raise api_error(409, f'workflows "{name}" already exists', name=name)
        self.num_submitted += 1
        stored = copy.deepcopy(body)
        stored["metadata"]["uid"] = f"uid-{self.num_submitted}"
        self.workflows[name] = stored
        self.on_submitted(self, name)
        self.after_create()
        return copy.deepcopy(stored)

    def get_namespaced_custom_object(self, group: str, version: str, namespace: str, plural: str, name: str, **_: Any):
        if plural != PLURAL:
            return super().get_namespaced_custom_object(group, version, namespace, plural, name)
        self.failing("get")
        if name not in self.workflows:
            raise not_found("workflows.argoproj.io", name)
        return copy.deepcopy(self.workflows[name])

    def list_namespaced_custom_object(self, group: str, version: str, namespace: str, plural: str, **options: Any):
        if plural == PLURAL:  # as in the Role argo-launcher
            raise api_error(403, "workflows is forbidden")
        return super().list_namespaced_custom_object(group, version, namespace, plural, **options)

    def patch_namespaced_custom_object(self, group, version, namespace, plural, name, body, **_: Any):
        self.failing("patch")
        self.patches.append(body)
        self.workflows[name]["metadata"]["labels"] |= body["metadata"].get("labels", {})
        return copy.deepcopy(self.workflows[name])

    def delete_namespaced_custom_object(self, group, version, namespace, plural, name, body, **_: Any) -> None:
        if plural != PLURAL:
            super().delete_namespaced_custom_object(group, version, namespace, plural, name, body)
            return
        self.failing("delete")
        workflow = self.workflows[name]
        assert workflow["metadata"]["uid"] == body["preconditions"]["uid"]
        workflow["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        if self.seconds_to_delete:
            self.clock.after(self.seconds_to_delete, lambda: self._collect(name))
        else:
            self._collect(name)

    def list_namespaced_pod(self, namespace: str, label_selector: str = "", **_: Any):
        if not label_selector.startswith("workflows.argoproj.io/workflow="):
            return super().list_namespaced_pod(namespace, label_selector)
        self.failing("list pods")
        return SimpleNamespace(items=[k8s_model_from_dict(k8s.V1Pod, pod) for pod in self.step_pods])

    def delete_namespaced_pod(self, name: str, namespace: str, body: Any, **options: Any):
        self.step_pods = [pod for pod in self.step_pods if pod["metadata"]["name"] != name]
        return super().delete_namespaced_pod(name, namespace, body, **options)

    def step(self, workflow: str, name: str, phase: str, message: str = "", **node: Any) -> None:
        """Let the controller write a step's node, and a pod with its log if `log` is given."""
        nodes = self.workflows[workflow].setdefault("status", {"phase": "Running"}).setdefault("nodes", {})
        node_id = f"{workflow}-{name}"
        log = node.pop("log", None)
        nodes[node_id] = {
            "id": node_id,
            "name": f"{workflow}[{len(nodes)}].{name}",
            "displayName": name,
            "templateName": name.partition("(")[0],
            "type": "Pod",
            "phase": phase,
            "message": message,
            "startedAt": f"2026-01-01T00:00:{len(nodes):02d}Z",
            **node,
        }
        if log is not None:
            self.logs[node_id] = log
            status = {"name": "main", "image": "i", "image_id": "", "ready": False, "restart_count": 0}
            state = {"terminated": {"exit_code": 1, "reason": "Error"}}
            metadata: dict[str, Any] = {"name": node_id, "uid": f"uid-{node_id}"}
            metadata["annotations"] = {"workflows.argoproj.io/node-name": f"{workflow}[0].{name}"}
            statuses = [{**status, "state": state}, {**status, "name": "wait", "state": state}]
            self.step_pods.append({"metadata": metadata, "status": {"phase": "Failed", "container_statuses": statuses}})

    def root(self, workflow: str, phase: str) -> None:
        """Let the controller write the entry point's node."""
        nodes = self.workflows[workflow].setdefault("status", {}).setdefault("nodes", {})
        nodes[workflow] = {"id": workflow, "name": workflow, "displayName": workflow, "type": "Steps", "phase": phase}

    def ends(self, workflow: str, phase: str, message: str = "") -> None:
        self.workflows[workflow].setdefault("status", {}).update({"phase": phase, "message": message})

    def _collect(self, name: str) -> None:
        """The garbage collector: deletes what a deleted workflow owned."""
        uid = self.workflows.pop(name)["metadata"]["uid"]
        self.jobs.pop(f"cifar10-{uid}", None)
