"""The workflow of k8s/argo in a namespace of its own, with pods small enough for two CPUs."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cifar_assets.object_store.s3 import S3Store
from resources.argo.client import WorkflowClient
from resources.argo.report import job_name_of
from resources.argo.status import Workflow
from resources.argo.template import build_train_template
from resources.pytorch_job.config import PyTorchJobConfig
from tests.cluster.kubectl import kubectl, wait_for
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
_SMALL = {"cpu": "200m", "memory": "1Gi", "scratch": "1Gi"}


@dataclass(frozen=True)
class ArgoCluster:
    """Where workflows run, and the store they work on."""

    namespace: str
    client: WorkflowClient
    store: S3Store

    def deploy(self) -> None:
        """What `kubectl apply -k k8s/argo` makes, here."""
        objects = [document for document in yaml.safe_load_all(kubectl("kustomize", str(FOLDER))) if document]
        objects = [self._placed(document) for document in objects]
        objects += [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cifar-platform"}, "data": {}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "trainer"}},
        ]
        kubectl("-n", self.namespace, "apply", "--server-side", "-f", "-", text=yaml.safe_dump_all(objects))

    def create(self, file: str = "workflow.yaml", **parameters: str) -> str:
        """`kubectl create -f` of one of the files with some parameters; the workflow's name."""
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

    def finished(self, name: str, seconds: float = 150) -> Workflow:
        """The workflow once its exit handler has ended."""
        return wait_for(f"the end of {name}", lambda: self._if_finished(name), seconds)

    def job_exists(self, workflow: Workflow) -> bool:
        return self.client.jobs.get(self.namespace, job_name_of(workflow)) is not None

    def _if_finished(self, name: str) -> Workflow | None:
        workflow = self.workflow(name)
        return workflow if workflow.finished else None

    def _placed(self, document: dict[str, Any]) -> dict[str, Any]:
        if document["metadata"]["name"] == "cifar10-train":
            settings = yaml.safe_load((FOLDER / "train.settings.yaml").read_text())
            document = build_train_template(settings["name"], PyTorchJobConfig(**{**settings["config"], **_SMALL}))
        document["metadata"]["namespace"] = self.namespace
        for subject in document.get("subjects", []):
            subject["namespace"] = self.namespace
        return document
