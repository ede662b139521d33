"""What can go wrong with a PyTorchJob, as a person should read it."""

from typing import TYPE_CHECKING

from resources.kubernetes.errors import KubernetesError

if TYPE_CHECKING:
    from resources.pytorch_job.diagnosis import Diagnosis


class PyTorchJobError(KubernetesError):
    """Base of the errors that are about a PyTorchJob. Faults of the API are resources.kubernetes's."""


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
