"""The four steps as an Argo workflow from Dagster: one workflow per Dagster step."""

import json
from dataclasses import replace

import dagster as dg
from pydantic import Field

from resources.argo.client import WorkflowClient, is_argos_own
from resources.argo.interface import PipelineRequest, PipelineResource, PipelineResult, parse_result
from resources.argo.workflow import Workflow, build_workflow_manifest
from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.logs import LogLine, show_line
from resources.kubernetes.steps import as_dagster_failure, job_request, owned_job
from resources.kubernetes.watch import JobWatcher


class ArgoPipeline(PipelineResource):
    """Submits the WorkflowTemplate in k8s/argo with the request's parameters, and follows it.

    If the run worker dies, the workflow continues and the step's next attempt adopts it. All attempts of a run share
    one name, by which the leftovers of a vanished workflow are found. A failed workflow is a dg.Failure without
    retries: Argo itself has already retried what a retry can fix.
    """

    namespace: str = Field(description="Namespace of the workflows; k8s/argo is applied there.")
    workflow_template: str = Field(default="cifar10-pipeline", description="WorkflowTemplate of the four steps.")
    name_prefix: str = Field(default="cifar10-parity", description="Prefix of the workflows' names.")
    parameters: dict[str, str] = Field(
        default={}, description="Further parameters of the template, such as steps-image and trainer-image."
    )
    kubeconfig_file: str | None = Field(
        default=None, description="Kubeconfig; by default the pod's service account, else KUBECONFIG."
    )
    poll_interval_seconds: float = Field(default=2.0, gt=0, description="Polling interval.")
    pending_timeout_seconds: float = Field(
        default=300.0, gt=0, description="How long Argo's controller may take to start a workflow."
    )

    def connect(self) -> WorkflowClient:
        """Client of the cluster's API. SettingsError when no cluster is configured."""
        return WorkflowClient.production(self.kubeconfig_file)

    def run(self, context: dg.AssetExecutionContext, request: PipelineRequest) -> PipelineResult:
        parameters = {**self.parameters, **request.parameters()}
        limits = WatchLimits(
            poll_interval_seconds=self.poll_interval_seconds, start_timeout_seconds=self.pending_timeout_seconds
        )
        with as_dagster_failure():
            client = self.connect()
            wanted = job_request(
                context, Workflow, namespace=self.namespace, prefix=self.name_prefix, work=json.dumps(parameters)
            )
            names = tuple(
                Workflow.name_for(self.name_prefix, run_id=run_id, step_key=wanted.step_key, attempt=0)
                for run_id in wanted.run_ids
            )
            wanted = replace(wanted, name=names[0], names=names)
            manifest = build_workflow_manifest(wanted, self.workflow_template, parameters)
            with owned_job(context, client, wanted, manifest) as started:
                context.log.info(f"Following {started.found}.")
                finished = JobWatcher(
                    client, started.found, limits=limits, on_log_line=_show, logger=context.log
                ).wait_until_finished()
        return parse_result(str(finished), finished.output("model") or "")


def _show(line: LogLine) -> None:
    if not is_argos_own(line.text):
        show_line(line)
