"""`train SETTINGS.yaml` prints the training step's WorkflowTemplate, `report NAMESPACE WORKFLOW` the outcome of a run.

The settings hold `name` and `config` (fields of PyTorchJobConfig). With `--outputs=FOLDER` the report is also written
to a file there, for the workflow's exit handler.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resources.argo.client import WorkflowClient, explain
from resources.argo.template import build_train_template
from resources.argo.workflow import Workflow
from resources.kubernetes.config import print_manifest
from resources.kubernetes.errors import ApiUnavailableError, KubernetesError
from resources.pytorch_job.config import PyTorchJobConfig

COMMAND = "python -m resources.argo train"
_STORED_SECONDS = 60


def build(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The WorkflowTemplate for a settings file."""
    return build_train_template(name, PyTorchJobConfig(**config))


def report(arguments: Sequence[str]) -> int:
    """Print which step of a workflow failed, and why; 0, or 1 with the reason on stderr.

    In the exit handler always 0: if the handler failed, Argo would mark a workflow that succeeded as failed.
    """
    parser = argparse.ArgumentParser("python -m resources.argo report")
    parser.add_argument("namespace")
    parser.add_argument("workflow")
    parser.add_argument("--outputs", type=Path, help="folder that the report is also written to")
    options = parser.parse_args(arguments)
    in_handler = bool(options.outputs)
    expected = (Exception,) if in_handler else (KubernetesError, OSError)
    try:
        client = WorkflowClient.production()
        workflow = find(client, options.namespace, options.workflow, in_handler=in_handler)
        gone = f"Workflow {options.namespace}/{options.workflow} does not exist, or was deleted."
        text = explain(client, workflow) if workflow else gone
        sys.stdout.write(f"{text}\n")
        if options.outputs:
            options.outputs.mkdir(parents=True, exist_ok=True)
            Path(options.outputs, "report").write_text(text)
    except expected as error:
        sys.stderr.write(f"error: {error}\n")
        return 0 if in_handler else 1
    return 0


def find(
    client: WorkflowClient,
    namespace: str,
    name: str,
    *,
    in_handler: bool,
    clock: Callable[[], float] = time.monotonic,
    sleeper: Callable[[float], None] = time.sleep,
) -> Workflow | None:
    """The workflow, or None. Its exit handler waits up to a minute until the handler's own step is in it.

    Argo starts the handler before it stores that step, together with the end of the steps before. The handler also
    waits that long for an API server that does not respond, but not for steps that cannot be read.
    """
    deadline = clock() + (_STORED_SECONDS if in_handler else 0)
    while True:
        is_last = clock() >= deadline
        try:
            workflow = client.get(namespace, name)
            if is_last or workflow is None or workflow.hides_steps:
                return workflow
            if any(step.name == workflow.exit_handler for step in workflow.steps):
                return workflow
        except ApiUnavailableError:
            if is_last:
                raise
        sleeper(1)


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    if arguments[:1] == ["report"]:
        return report(arguments[1:])
    if arguments[:1] == ["train"]:
        return print_manifest(COMMAND, build, arguments[1:])
    sys.stderr.write(str(__doc__))
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
