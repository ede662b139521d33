"""The training step of the Argo workflow, built from the same typed settings as Dagster's PyTorchJobs. Pure."""

from typing import Any

import yaml

from resources.kubernetes.job import JobState
from resources.pytorch_job.config import PyTorchJobConfig
from resources.pytorch_job.manifest import build_pytorch_job_manifest
from resources.trainer.contract import JOB_SPEC_VARIABLE

GROUP = "argoproj.io"
VERSION = "v1alpha1"
WORKFLOW_LABEL = "cifar/argo-workflow"
"""Label of a PyTorchJob with its workflow. With Argo's own label, Argo would take the job's pods for a step's."""
JOB_NAME_PREFIX = "cifar10-"
TRAINER_VARIABLES = (JOB_SPEC_VARIABLE, "DAGSTER_PIPES_CONTEXT", "DAGSTER_PIPES_MESSAGES")
_STAND_IN = "00000000-0000-0000-0000-000000000000"
"""As long as a workflow's uid, so that the builder checks the length of the final name."""
_STEP_MARGIN_SECONDS = 600
"""Additional time of the step compared to the job it waits for."""
_POSITIONS = 8
"""The operator keeps one condition of each of its six types."""

FAILURE_CONDITION = ",".join(f"status.conditions.{n}.type=={JobState.FAILED}" for n in range(_POSITIONS))
SUCCESS_CONDITION = "status.completionTime"
"""The operator writes it in the same update as the final condition; the failure condition comes first."""

RESOURCE_IS_RETRIED = (
    'lastRetry.status == "Error" || '
    "!(lastRetry.message matches 'failure condition|has been deleted|specified deadline|exceeded its deadline')"
)
"""The step's pod was lost or stopped, or the API server did not respond. `apply` finds the existing job."""


def build_train_template(name: str, config: PyTorchJobConfig) -> dict[str, Any]:
    """A WorkflowTemplate with the training as a resource step, for one replica (`train`) and for more.

    The PyTorchJob is named after the workflow's uid and applied, so that a second submission finds the first.
    """
    templates = [_step("train", config, workers=False), _step("train-replicas", config, workers=True)]
    kind = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "WorkflowTemplate"}
    return {**kind, "metadata": {"name": name}, "spec": {"templates": templates}}


def _step(name: str, config: PyTorchJobConfig, *, workers: bool) -> dict[str, Any]:
    inputs = ["image", *map(parameter_of, TRAINER_VARIABLES), *(["workers"] if workers else [])]
    deadline = config.run_policy.active_deadline_seconds + _STEP_MARGIN_SECONDS
    return {
        "name": name,
        "inputs": {"parameters": [{"name": parameter} for parameter in inputs]},
        "activeDeadlineSeconds": deadline,
        "retryStrategy": {
            "limit": 3,
            "backoff": {"duration": "5s", "factor": 2, "cap": "60s"},
            "expression": RESOURCE_IS_RETRIED,
        },
        "podSpecPatch": _RESOURCE_POD,
        "resource": {
            "action": "apply",
            "setOwnerReference": True,
            "successCondition": SUCCESS_CONDITION,
            "failureCondition": FAILURE_CONDITION,
            "manifest": _manifest_text(config, workers),
        },
    }


_RESOURCE_POD = """\
containers:
- name: main
  resources:
    requests:
      cpu: 20m
      memory: 64Mi
    limits:
      memory: 256Mi
  securityContext:
    allowPrivilegeEscalation: false
    capabilities:
      drop:
      - ALL
    readOnlyRootFilesystem: true
"""


def parameter_of(variable: str) -> str:
    """The name of the parameter that passes the value of an environment variable to a step."""
    return variable.lower().replace("_", "-")


def _manifest_text(config: PyTorchJobConfig, workers: bool) -> str:
    manifest = build_pytorch_job_manifest(
        config.model_copy(update={"replicas": 2 if workers else 1}),
        name=JOB_NAME_PREFIX + _STAND_IN,
        namespace="namespace",
        env={variable: _parameter(parameter_of(variable)) for variable in TRAINER_VARIABLES},
        labels={"app.kubernetes.io/managed-by": "argo-workflow", WORKFLOW_LABEL: "{{workflow.name}}"},
    )
    manifest["metadata"] |= {"name": JOB_NAME_PREFIX + "{{workflow.uid}}", "namespace": "{{workflow.namespace}}"}
    if workers:
        manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] = _parameter("workers")
    text = yaml.safe_dump(manifest, sort_keys=False, width=1000)
    return text.replace(f"'{_parameter('workers')}'", _parameter("workers"))  # a number, not its text


def _parameter(name: str) -> str:
    return f"{{{{inputs.parameters.{name}}}}}"
