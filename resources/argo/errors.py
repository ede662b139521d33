"""What can go wrong with a workflow, as a person should read it. Faults of the API are resources.kubernetes's."""

from resources.kubernetes.errors import KubernetesError


class WorkflowError(KubernetesError):
    """Base of the errors that are about a workflow."""


class WorkflowConflictError(WorkflowError):
    """The name is taken by a workflow that this step may not touch."""

    permanent = True


class WorkflowDeletedError(WorkflowError):
    """The workflow vanished while its run was waiting for it."""


class WorkflowTimeoutError(WorkflowError):
    """The workflow did not end in time, though its own deadline has passed: nobody runs it."""


class WorkflowFailedError(WorkflowError):
    """The workflow ended without success. `step` is the one that failed, or None where it ended before any."""

    def __init__(self, report: str, step: str | None):
        super().__init__(report)
        self.step = step
        self.permanent = step is not None
