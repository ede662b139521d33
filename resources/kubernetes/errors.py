"""What can go wrong with a custom resource, or between us and its cluster, as a person should read it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from resources.redaction import RedactedError, redacted

if TYPE_CHECKING:
    from resources.kubernetes.diagnosis import Diagnosis


class KubernetesError(RedactedError):
    """Base of the errors of everything that works with a cluster. `transient`: trying again may help."""

    transient = True


class SettingsError(KubernetesError, ValueError):
    """A setting that the API server or an operator would refuse, or would take and then never act on."""

    transient = False


class ApiError(KubernetesError):
    """The API server did not carry out a request."""


class ApiUnavailableError(ApiError):
    """No answer, or an answer that says to try again later. Whether a write took effect is unknown."""


class ApiRefusedError(ApiError):
    """The API server understood the request and will not do it: no permission, no such kind, an invalid object."""

    transient = False


class ResourceConflictError(KubernetesError):
    """The name is taken by an object that this step may not touch."""

    transient = False


class ResourceDeletedError(KubernetesError):
    """The object vanished while its run was waiting for it."""


class ResourceStuckError(KubernetesError):
    """Something was not created, removed or recorded in the time that it may take."""


class ResourceFailedError(KubernetesError):
    """The object ended without success, or would never do its work. `diagnosis` says why."""

    def __init__(self, diagnosis: "Diagnosis"):
        super().__init__(diagnosis.report())
        self.diagnosis = diagnosis
        self.transient = diagnosis.transient


@contextmanager
def added_to(first: BaseException, logger: logging.Logger) -> Iterator[None]:
    """Keeps what goes wrong while an error is being handled, such as a clean-up that is refused, from replacing it.

    It is logged, and added to the first error as a note.
    """
    try:
        yield
    except Exception as second:
        logger.error("%s", redacted(second))
        first.add_note(f"After that: {redacted(second)}")


def with_notes(error: BaseException) -> str:
    """The error's text and its notes."""
    return redacted("\n".join([str(error), *getattr(error, "__notes__", ())]))
