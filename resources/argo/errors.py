"""What can go wrong with a workflow, as a person should read it. Faults of the API are resources.pytorch_job's."""


class WorkflowError(Exception):
    """Base of this package's errors. `permanent`: trying again without a change fails again."""

    permanent = False


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
