"""Errors of custom resources and of the connection to the cluster, with readable messages."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from resources.redaction import RedactedError, redacted

if TYPE_CHECKING:
    from resources.kubernetes.diagnosis import Diagnosis


class KubernetesError(RedactedError):
    """Base of all errors in working with a cluster. `transient`: a retry may help."""

    transient = True


class SettingsError(KubernetesError, ValueError):
    """A setting that the API server or an operator would refuse, or would accept and then ignore."""

    transient = False


class ApiError(KubernetesError):
    """The API server did not carry out a request."""


class ApiUnavailableError(ApiError):
    """No response, or a response to try again later. Whether a write took effect is unknown."""


class ApiRefusedError(ApiError):
    """The API server rejected the request: no permission, no such kind, or an invalid object."""

    transient = False


class ResourceConflictError(KubernetesError):
    """The name is taken by an object that this step may not touch."""

    transient = False


class ResourceDeletedError(KubernetesError):
    """The object vanished while its run was waiting for it."""


class ResourceStuckError(KubernetesError):
    """Something was not created, removed or recorded within its time limit."""


class ResourceFailedError(KubernetesError):
    """The object failed, or would never finish. `diagnosis` says why."""

    def __init__(self, diagnosis: "Diagnosis"):
        super().__init__(diagnosis.report())
        self.diagnosis = diagnosis
        self.transient = diagnosis.transient


@contextmanager
def added_to(first: BaseException, logger: logging.Logger) -> Iterator[None]:
    """Keeps an error that occurs while another one is handled, such as a refused cleanup, from replacing the first one.

    It is logged and added to the first error as a note.
    """
    try:
        yield
    except Exception as second:
        logger.error("%s", redacted(second))
        first.add_note(f"After that: {redacted(second)}")


def with_notes(error: BaseException) -> str:
    """The error's text and its notes."""
    return redacted("\n".join([str(error), *getattr(error, "__notes__", ())]))
