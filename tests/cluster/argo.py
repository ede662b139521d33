"""The workflow of k8s/argo on the tests' platform, with pods small enough for two CPUs."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resources.argo.client import WorkflowClient
from resources.argo.template import build_train_template
from resources.argo.workflow import Workflow
from resources.object_store.s3 import S3Store
from resources.pytorch_job.config import PyTorchJobConfig
from tests.cluster.kubectl import PATIENCE, kubectl, wait_for
from tests.fixtures.tiny_data import TINY_RECIPE

FOLDER = Path(__file__).parents[2] / "k8s" / "argo"
IMAGES = {
    "steps-image": os.environ.get("TEST_STEPS_IMAGE", "localhost/cifar-dagster:dev"),
    "trainer-image": os.environ.get("TEST_TRAINER_IMAGE", "localhost/cifar-trainer:dev"),
}
PARAMETERS = {
    **IMAGES,
    "recipe": "fast",
    "overrides": json.dumps(TINY_RECIPE),
    "execution": json.dumps({"threads": 1}),
    "threshold": "0",
}
WORKFLOW_SECONDS = 900
"""Far longer than a workflow takes while all of them run concurrently."""
_SMALL = {"cpu": "200m", "memory": "2Gi", "scratch": "1Gi"}


@dataclass(frozen=True)
class ArgoCluster:
    """The namespace of the workflows, and their store."""

    namespace: str
    client: WorkflowClient
    store: S3Store

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """Applies k8s/argo with smaller PyTorchJobs; removes it at the end, with every workflow."""
        documents = [document for document in yaml.safe_load_all(kubectl("kustomize", str(FOLDER))) if document]
        text = yaml.safe_dump_all([_small(document) for document in documents])
        kubectl("-n", self.namespace, "apply", "--server-side", "-f", "-", text=text)
        try:
            yield
        finally:
            kubectl("-n", self.namespace, "delete", "workflows", "--all", "--wait=true", PATIENCE)
            kubectl("-n", self.namespace, "delete", "--ignore-not-found", "-f", "-", text=text)
            ours = ["-l", "app.kubernetes.io/managed-by=argo-workflow", "--wait=true", PATIENCE]
            kubectl("-n", self.namespace, "delete", "pytorchjobs", *ours)

    def create(self, file: str = "workflow.yaml", **parameters: str) -> str:
        """`kubectl create -f` of one of the files with parameters. Returns the workflow's name."""
        manifest = yaml.safe_load((FOLDER / file).read_text())
        manifest["metadata"]["namespace"] = self.namespace
        return self.submit(manifest, {**PARAMETERS, **parameters})

    def submit(self, manifest: dict[str, Any], parameters: Mapping[str, str]) -> str:
        arguments = [{"name": name.replace("_", "-"), "value": value} for name, value in parameters.items()]
        manifest["spec"]["arguments"] = {"parameters": arguments}
        created = kubectl("-n", self.namespace, "create", "-f", "-", "-o", "json", text=yaml.safe_dump(manifest))
        return json.loads(created)["metadata"]["name"]

    def workflow(self, name: str) -> Workflow:
        found = self.client.get(self.namespace, name)
        assert found, f"workflow {name} is gone"
        return found

    def finished(self, name: str, seconds: float = WORKFLOW_SECONDS) -> Workflow:
        """The workflow, once its exit handler has ended."""
        return wait_for(f"the end of workflow {name}", lambda: self._if_finished(name), seconds)

    def job_exists(self, workflow: Workflow) -> bool:
        return self.client.jobs.get(self.namespace, workflow.job_name) is not None

    def _if_finished(self, name: str) -> Workflow | None:
        workflow = self.workflow(name)
        return workflow if workflow.finished else None


def _small(document: dict[str, Any]) -> dict[str, Any]:
    settings = yaml.safe_load((FOLDER / "train.settings.yaml").read_text())
    if document["metadata"]["name"] != settings["name"]:
        return document
    return build_train_template(settings["name"], PyTorchJobConfig(**{**settings["config"], **_SMALL}))
