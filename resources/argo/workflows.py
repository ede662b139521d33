"""The four steps as an Argo workflow, from Dagster: one step of a run, one workflow."""

import json
import time
from collections.abc import Mapping

import dagster as dg
from pydantic import Field

from resources.argo.client import WorkflowClient
from resources.argo.interface import PipelineRequest, PipelineResource, PipelineResult, parse_result
from resources.argo.launch import WorkflowLauncher, WorkflowRequest
from resources.argo.naming import workflow_name
from resources.argo.status import Workflow
from resources.argo.watch import WorkflowLimits, WorkflowWatcher
from resources.errors import ConfigError
from resources.kubernetes.logs import show_line
from resources.kubernetes.steps import as_dagster_failure, interrupts_after, removing

MODEL_STEP = "verify-model"
_CANCEL_TIMEOUT_SECONDS = 25.0


class ArgoPipeline(PipelineResource):
    """Submits the WorkflowTemplate of k8s/argo with the request's parameters, and follows it.

    A run worker that dies leaves the workflow; the step's next attempt in the same run finds it by its name. A failed
    workflow is dg.Failure, which forbids a retry: Argo itself has retried what a retry can cure.
    """

    namespace: str = Field(description="Namespace of the workflows; k8s/argo is applied there.")
    workflow_template: str = Field(default="cifar10-pipeline", description="WorkflowTemplate of the four steps.")
    name_prefix: str = Field(default="cifar10-parity", description="What the workflows' names begin with.")
    parameters: dict[str, str] = Field(
        default={}, description="Further parameters of the template, such as steps-image and trainer-image."
    )
    kubeconfig_file: str | None = Field(
        default=None, description="Kubeconfig; by default the pod's service account, else KUBECONFIG."
    )
    kube_context: str | None = Field(default=None, description="Context of the kubeconfig.")
    poll_interval_seconds: float = Field(default=2.0, gt=0, description="Time between two looks at the workflow.")
    pending_timeout_seconds: float = Field(
        default=300.0, gt=0, description="How long Argo's controller may take to begin."
    )
    total_timeout_seconds: float = Field(
        default=9 * 3600.0, gt=0, description="How long to wait in all; the workflow's own deadline is shorter."
    )

    def run(self, context: dg.AssetExecutionContext, request: PipelineRequest) -> PipelineResult:
        with as_dagster_failure():
            return self.follow(context, request, self.connect())

    def connect(self) -> WorkflowClient:
        """Client of the cluster's API. SettingsError when no cluster is configured."""
        return WorkflowClient.production(self.kubeconfig_file, self.kube_context)

    def follow(
        self, context: dg.AssetExecutionContext, request: PipelineRequest, client: WorkflowClient
    ) -> PipelineResult:
        """Like `run`, by the client given. KubernetesError in place of dg.Failure."""
        wanted = self._wanted(context, request)
        launcher = WorkflowLauncher(
            client, clock=time.monotonic, sleeper=time.sleep, logger=context.log, shield=interrupts_after
        )

        def remove() -> None:
            launcher.remove(wanted, timeout_seconds=_CANCEL_TIMEOUT_SECONDS)

        with removing(context, f"Workflow {wanted.namespace}/{wanted.name}", remove):
            workflow = launcher.submit(wanted)
            context.log.info(f"Following {workflow}.")
            watcher = WorkflowWatcher(
                client,
                workflow,
                limits=self._limits(),
                on_log_line=show_line,
                clock=time.monotonic,
                sleeper=time.sleep,
                logger=context.log,
            )
            finished = watcher.wait_until_finished()
            if finished.phase != "Succeeded" and not _only_refused(finished):
                raise watcher.failure(finished)
        return parse_result(str(finished), finished.output("model") or "")

    def _wanted(self, context: dg.AssetExecutionContext, request: PipelineRequest) -> WorkflowRequest:
        step_key = context.get_step_execution_context().step.key
        return WorkflowRequest(
            name=workflow_name(self.name_prefix, run_id=context.run.run_id, step_key=step_key),
            namespace=self.namespace,
            template=self.workflow_template,
            run_id=context.run.run_id,
            step_key=step_key,
            parameters={**self.parameters, **request.parameters()},
        )

    def _limits(self) -> WorkflowLimits:
        return WorkflowLimits(
            poll_interval_seconds=self.poll_interval_seconds,
            pending_timeout_seconds=self.pending_timeout_seconds,
            total_timeout_seconds=self.total_timeout_seconds,
        )


def argo_from_environment(environment: Mapping[str, str]) -> ArgoPipeline:
    """The pipeline in the namespace and with the image of the trainer's PyTorchJobs; opens no connection.

    ARGO_PARAMETERS holds further parameters of the template as JSON. ConfigError when it is none.
    """
    text = environment.get("ARGO_PARAMETERS", "{}")
    try:
        further = {str(name): str(value) for name, value in json.loads(text).items()}
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"ARGO_PARAMETERS: expected a JSON object of parameters. {error}") from error
    images = {"trainer-image": environment["TRAINER_IMAGE"]} if "TRAINER_IMAGE" in environment else {}
    return ArgoPipeline(namespace=environment.get("TRAINER_NAMESPACE", "cifar"), parameters={**images, **further})


def _only_refused(workflow: Workflow) -> bool:
    """Whether all went well but for the verdict: the last step wrote its report, and failed for what it says."""
    step = workflow.failed_step
    try:
        report = json.loads(workflow.output("model") or "{}")
    except ValueError:
        return False
    return bool(step and step.name == MODEL_STEP and isinstance(report, dict) and report.get("passed") is False)
