"""An API server that does not answer, or whose answers do not help."""

import logging
from collections.abc import Callable

from resources.kubernetes.errors import KubernetesError


class Outage:
    """Tolerates errors until they have lasted too long. `meanwhile` tells the reader of the log what they mean."""

    def __init__(self, clock: Callable[[], float], limit_seconds: float, *, logger: logging.Logger, meanwhile: str):
        self._clock = clock
        self._limit_seconds = limit_seconds
        self._log = logger
        self._meanwhile = meanwhile
        self._since: float | None = None

    def endure(self, error: KubernetesError) -> None:
        """Take note of one call without a usable answer. Raises it when there was none for the limit's time."""
        now = self._clock()
        if self._since is None:
            self._since = now
            self._log.warning("No usable answer from the API server; %s: %s", self._meanwhile, error)
        if now - self._since >= self._limit_seconds:
            raise error

    def end(self) -> None:
        """Take note of an answer."""
        if self._since is not None:
            self._log.info("The API server answers as before.")
        self._since = None
