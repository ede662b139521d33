"""What can go wrong between us and a cluster, as a person should read it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cifar_assets.redaction import RedactedError, redacted


class KubernetesError(RedactedError):
    """Base of the errors of everything that works with a cluster. `permanent`: trying again unchanged fails again."""

    permanent = False


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


class SettingsError(KubernetesError, ValueError):
    """A setting that the API server or an operator would refuse, or would take and then never act on."""

    permanent = True


class ApiError(KubernetesError):
    """The API server did not do what it was asked."""


class ApiUnavailableError(ApiError):
    """No answer, or an answer that says to try again later. Whether a write took effect is unknown."""


class ApiRefusedError(ApiError):
    """The API server understood the request and will not do it: no permission, no such kind, an invalid object."""

    permanent = True
