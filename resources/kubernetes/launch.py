"""Bringing exactly one object of a custom resource into being for a step, and removing it again. No Dagster.

Policy: an object of the same step that works or succeeded, and computes the same thing, is adopted. Any other is
removed first, and so is what outlived an object that is gone. A create call whose answer was lost is repeated: names
are deterministic.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from resources.interrupts import sleep
from resources.kubernetes.api import CustomResource, CustomResourceClient
from resources.kubernetes.diagnosis import Outage
from resources.kubernetes.errors import (
    ApiRefusedError,
    ApiUnavailableError,
    ResourceConflictError,
    ResourceStuckError,
)

R = TypeVar("R")
T = TypeVar("T", bound=CustomResource)

_PAUSE_SECONDS = 1.0
_REPLACE_GRACE_SECONDS = 10
_REPLACE_TIMEOUT_SECONDS = 180.0


@dataclass(frozen=True)
class Started(Generic[T]):
    """The one object of the step."""

    found: T
    adopted: bool


class Launcher(ABC, Generic[R, T]):
    """Adopts, replaces, creates and removes the objects of one step. The text of a request names its object.

    `shield` wraps the create call, so that an interrupt waits for its answer.
    """

    leftover_advice = ""

    def __init__(
        self,
        client: CustomResourceClient[T],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleeper: Callable[[float], None] = sleep,
        logger: logging.Logger,
        shield: Callable[[], AbstractContextManager[None]] = nullcontext,
        outage_seconds: float = 300.0,
    ):
        self._client = client
        self._clock = clock
        self._sleep = sleeper
        self._log = logger
        self._shield = shield
        self._outage_seconds = outage_seconds
        self._create_in_doubt = False
        """Whether a create call was sent that may still take effect though no answer came."""
        self._logged: set[str] = set()

    def start(self, request: R, manifest: Mapping[str, Any]) -> Started[T]:
        """The step's object, at work or finished, adopted or new. Never leaves two.

        ResourceConflictError when the name belongs to someone else; ApiUnavailableError after `outage_seconds` without
        an answer; ResourceStuckError when the name stays taken, or what is to be replaced does not go away.
        """
        outage = Outage(self._clock, self._outage_seconds, logger=self._log, meanwhile=f"{request} waits to be started")
        since: float | None = None
        left: Sequence[str] = ()
        while True:
            try:
                kept, left = self._settle(request)
                started = None if left else self._adopt_or_create(request, kept, manifest)
                if started:
                    return started
                outage.end()
                since = self._clock() if since is None else since
            except ApiUnavailableError as error:
                outage.endure(error)
            if since is not None and self._clock() - since > _REPLACE_TIMEOUT_SECONDS:
                raise ResourceStuckError(
                    f"{request} could not be started for {_REPLACE_TIMEOUT_SECONDS:.0f} s: {_why(left)}"
                )
            self._sleep(_PAUSE_SECONDS)

    def remove(self, request: R, *, timeout_seconds: float, grace_seconds: int = _REPLACE_GRACE_SECONDS) -> None:
        """Delete the step's objects and wait until they and what they own are gone. ResourceStuckError if they stay.

        A create call without an answer may still take effect, so after one it looks again for as long as a call may
        take. When only the objects may be deleted, the refusal of the rest is raised after their deletion.
        """
        began = self._clock()
        settle_seconds = self._client.request_timeout_seconds if self._create_in_doubt else 0.0
        own: Sequence[T] = ()
        while self._clock() - began <= timeout_seconds:
            try:
                own = self._own(request)
                if not self._clear(request, own, own, grace_seconds) and self._clock() - began >= settle_seconds:
                    return
            except ResourceConflictError:
                return
            except ApiUnavailableError as error:
                self._log.warning("Still removing %s: %s", request, error)
            except ApiRefusedError:
                for each in own:
                    self._client.delete(each)
                raise
            self._sleep(_PAUSE_SECONDS / 2)
        raise ResourceStuckError(
            f"{request} and what it owns could not be removed within {timeout_seconds:.0f} s. {self.leftover_advice}"
        )

    @abstractmethod
    def _own(self, request: R) -> Sequence[T]:
        """The step's objects, oldest first. ResourceConflictError where the name is someone else's."""

    @abstractmethod
    def _why_not(self, request: R, found: T) -> str | None:
        """Why the object may not be adopted; None when it may."""

    @abstractmethod
    def _clear(self, request: R, own: Sequence[T], unwanted: Sequence[T], grace_seconds: int) -> list[str]:
        """Delete what may not stay: objects, their pods, what outlived one. Returns what is still there."""

    def _take_over(self, request: R, found: T) -> T | None:
        """The object, marked as this run's; None when it is gone."""
        return found

    def _after_conflict(self, request: R) -> T | None:
        """The object of the name that was taken, if it is the step's; None when that has to be settled first."""
        return None

    def _settle(self, request: R) -> tuple[T | None, list[str]]:
        """The object to adopt, and what is still there of the others."""
        own = self._own(request)
        kept = next((each for each in reversed(own) if self._why_not(request, each) is None), None)
        unwanted = [each for each in own if each is not kept]
        for each in unwanted:
            text = f"Replacing {each}: {self._why_not(request, each) or 'a newer one of the step is kept'}."
            if text not in self._logged:
                self._logged.add(text)
                self._log.info(text)
        return kept, self._clear(request, own, unwanted, _REPLACE_GRACE_SECONDS)

    def _adopt_or_create(self, request: R, kept: T | None, manifest: Mapping[str, Any]) -> Started[T] | None:
        if kept is not None:
            kept = self._take_over(request, kept)
            return None if kept is None else Started(kept, adopted=True)
        self._create_in_doubt = True
        with self._shield():
            created = self._client.create(manifest)
            self._create_in_doubt = False
        created = created or self._after_conflict(request)
        return None if created is None else Started(created, adopted=False)


def _why(left: Sequence[str]) -> str:
    if not left:
        return "its name was taken each time, and then free again. See whether another process runs the same step."
    return (
        f"{', '.join(left)} did not go away. A second one beside them could spoil their work: look at their finalizers."
    )
