"""The kinds of training job in cluster tests: the settings of their stories, their operators and their names."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from resources.kubernetes.job import JobClient
from resources.kubernetes.job_config import JobConfig
from resources.kubernetes.pipes import PipesJobClient
from resources.pytorch_job import PipesPyTorchJobClient, PyTorchJobConfig, RunPolicy
from resources.train_job import PipesTrainJobClient, TrainJobConfig
from tests.cluster.kubectl import kubectl

K8S = Path(__file__).parents[2] / "k8s"
STORY_IMAGE = os.environ.get("TEST_STORY_IMAGE", "localhost/pytorch-job-story:test")
STORE_SECRET = "object-store"
_RUNTIME = "story"


def is_installed(group: str) -> bool:
    """Whether the cluster has an API group."""
    return any(line.partition("/")[0] == group for line in kubectl("api-versions").splitlines())


@dataclass(frozen=True)
class JobKind:
    """One kind of job."""

    pipes: type[PipesJobClient[Any]]
    build: Callable[..., JobConfig]
    operator: tuple[str, str]
    """Namespace and name of its Deployment."""
    replicas: Sequence[str]
    """Names of the first three in logs and errors."""
    dependents: Sequence[str] = ()
    """Other resources that its client uses, besides pods."""

    @property
    def client(self) -> type[JobClient[Any]]:
        return self.pipes.client_class

    @property
    def name(self) -> str:
        return self.client.resource.kind  # pyright: ignore[reportGeneralTypeIssues]

    @property
    def key(self) -> str:
        """Its name in metadata, and of the trainer's field."""
        return self.client.resource.slug.replace("-", "_")  # pyright: ignore[reportGeneralTypeIssues]

    @property
    def setting(self) -> str:
        """Its value of TRAINER_KIND."""
        return self.name.lower()

    def config(self, *command: str, **settings: Any) -> JobConfig:
        """Settings of a story's job. With once=True, a failed container is not restarted."""
        small = {"image": STORY_IMAGE, "args": list(command), "cpu": "50m", "memory": "128Mi"}
        return self.build(**{**small, **settings})

    def prepare(self, namespace: str, runtime: str = _RUNTIME) -> None:
        """Create what its stories need in the namespace."""
        if self is TRAIN_JOB:
            kubectl("apply", "--server-side", "-f", "-", text=yaml.safe_dump(_story_runtime(namespace, runtime)))


def _pytorch_job(
    *, once: bool = False, deadline_seconds: int = 600, backoff_limit: int = 2, **settings: Any
) -> PyTorchJobConfig:
    return PyTorchJobConfig(
        env_secrets=[STORE_SECRET],
        restart_policy="Never" if once else "OnFailure",
        run_policy=RunPolicy(active_deadline_seconds=deadline_seconds, backoff_limit=backoff_limit),
        **settings,
    )


def _train_job(*, once: bool = True, deadline_seconds: int = 600, **settings: Any) -> TrainJobConfig:
    runtime = {"runtime": _RUNTIME, "runtime_kind": "TrainingRuntime"}
    return TrainJobConfig(**{**runtime, "active_deadline_seconds": deadline_seconds, **settings})


def _story_runtime(namespace: str, name: str) -> Mapping[str, Any]:
    """The committed runtime with the Secret of the stories' object store."""
    runtime = yaml.safe_load((K8S / "trainjob/runtime.yaml").read_text())
    runtime["metadata"] |= {"name": name, "namespace": namespace}
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    container["envFrom"] = [{"secretRef": {"name": STORE_SECRET}}]
    return runtime


PYTORCH_JOB = JobKind(
    PipesPyTorchJobClient,
    _pytorch_job,
    operator=("kubeflow", "training-operator"),
    replicas=("master-0", "worker-0", "worker-1"),
)
TRAIN_JOB = JobKind(
    PipesTrainJobClient,
    _train_job,
    operator=("kubeflow-system", "kubeflow-trainer-controller-manager"),
    replicas=("node-0", "node-1", "node-2"),
    dependents=("jobsets.jobset.x-k8s.io",),
)
KINDS = (PYTORCH_JOB, TRAIN_JOB)

brief = pytest.mark.parametrize("kind", KINDS, indirect=True, ids=lambda kind: kind.name)
"""For a story that runs for both kinds in CI."""
EVERY_STORY = [
    pytest.param(PYTORCH_JOB, id=PYTORCH_JOB.name),
    pytest.param(TRAIN_JOB, id=TRAIN_JOB.name, marks=pytest.mark.thorough),
]
"""All other stories: CI runs them for PyTorchJobs, `make cluster-test-all` for both kinds."""
