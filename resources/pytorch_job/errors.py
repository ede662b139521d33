"""What can go wrong with a PyTorchJob, as a person should read it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resources.pytorch_job.diagnosis import Diagnosis


class PyTorchJobError(Exception):
    """Base of this package's errors. `permanent`: trying again without a change fails again."""

    permanent = False


class JobConfigError(PyTorchJobError, ValueError):
    """A setting that the API server or the operator would refuse, or would take and then never act on."""

    permanent = True


class ApiUnavailableError(PyTorchJobError):
    """No answer, or an answer that says to try again later. Whether a write took effect is unknown."""


class ApiRefusedError(PyTorchJobError):
    """The API server understood the request and will not do it: no permission, no such kind, an invalid object."""

    permanent = True


class JobConflictError(PyTorchJobError):
    """The name is taken by a job that this step may not touch."""

    permanent = True


class JobDeletedError(PyTorchJobError):
    """The job vanished while its run was waiting for it."""


class JobFailedError(PyTorchJobError):
    """The job ended without success, or would never start. `diagnosis` says why."""

    def __init__(self, diagnosis: "Diagnosis"):
        super().__init__(diagnosis.report())
        self.diagnosis = diagnosis
        self.permanent = diagnosis.permanent


class MessagesLostError(PyTorchJobError):
    """The job's Pipes messages could not be read to their end."""
