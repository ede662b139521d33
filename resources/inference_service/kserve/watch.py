"""Waits for an InferenceService: for a revision to be served, or for a change to take effect. No Dagster."""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from resources.errors import DeployError
from resources.inference_service.client import InferenceClient, ServedModel, ServerError
from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.client import DEPLOY_FAILED, InferenceService, InferenceServiceClient, mark_of
from resources.inference_service.kserve.config import CONTAINER_NAME
from resources.interrupts import sleep
from resources.kubernetes.diagnosis import (
    ADVICE,
    Cause,
    Diagnosis,
    Patience,
    PodHistory,
    WatchLimits,
    event_lines,
    exit_cause,
    exit_line,
    find_obstacle,
)
from resources.kubernetes.errors import (
    ApiError,
    ApiRefusedError,
    ApiUnavailableError,
    KubernetesError,
    ResourceFailedError,
)
from resources.kubernetes.pods import ContainerExit, Pod

T = TypeVar("T")

_LOG_LINES = 12
_FAILED_MOUNT = re.compile(r'FailedMount: .*(configmap|secret)s? "[^"]+" not found')
"""A warning of the kubelet. The state of the container says only that it is being created."""
_ADVICE: Mapping[Cause, str] = {
    **ADVICE,
    Cause.OUT_OF_MEMORY: "Raise `memory_limit`, or lower the server's limits on requests.",
    Cause.KILLED: "It was terminated, or did not become ready within `startup_seconds`; see its log.",
    Cause.NOT_STARTED: "Check the image: its entry point has to be the model server.",
    Cause.UNSCHEDULABLE: "Lower `cpu` and `memory`, or add nodes: an update needs room for one more replica.",
    Cause.CONFIGURATION: "Create the Secret or ConfigMap that it names, in the service's namespace, or correct "
    "`env_secrets`, `env_config_maps` and `config_map_mounts`.",
    Cause.SLOW_START: "Look at the pods with kubectl describe, or raise `rollout_timeout_seconds`. If there is no "
    "pod, check that KServe's controller is running, its log, and the namespace's quota.",
}


class NotYetError(Exception):
    """The awaited state is not reached yet. The text says what is missing."""


@dataclass(frozen=True)
class RolloutLimits(WatchLimits):
    """Polling interval, and how long to wait for each cause."""

    poll_interval_seconds: float = 1.0
    unschedulable_timeout_seconds: float = 120.0
    blocked_timeout_seconds: float = 45.0
    start_timeout_seconds: float = 600.0
    """Limit for the whole rollout."""
    settle_timeout_seconds: float = 120.0
    """Limit for a write, a rollback or a deletion to take effect."""
    outage_timeout_seconds: float = 120.0
    """If there was no usable response for this long before the deadline, the state of a revision is unknown."""
    final_exit_codes: tuple[int, ...] = (2,)
    """The server exits with 2 for a wrong digest, a missing model or invalid options."""
    max_restarts: int = 3
    """Restarts of a server that exits with a code that a restart might fix."""


@dataclass(frozen=True)
class ServiceView:
    """The InferenceService with a given name: how to query it, and for how long."""

    client: InferenceServiceClient
    asking: Callable[[InferenceService, bool], InferenceClient]
    """A client that uses the service like its users; if true is passed, only its newest revision."""
    namespace: str
    name: str
    limits: RolloutLimits
    log: logging.Logger
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = sleep

    def __str__(self) -> str:
        return f"InferenceService {self.namespace}/{self.name}"

    def get(self) -> InferenceService | None:
        return self.client.get(self.namespace, self.name)

    def pods(self) -> list[Pod]:
        return self.client.pods(self.namespace, self.name)

    def unchanged(self, stored: InferenceService) -> InferenceService:
        """The stored service. Raises DeployError if it is not as it was written."""
        service = self.get()
        if service is None or service.deleting or not service.is_as_written(stored):
            raise DeployError(
                f"{self} was deleted or changed by someone else while model {stored.model_digest} was being "
                "deployed. It was left unchanged."
            )
        return service

    def until(
        self, what: str, seconds: float, look: Callable[[], T], *, tolerated: type[ApiError] = ApiUnavailableError
    ) -> T:
        """The result of `look`, called until it raises neither NotYetError nor a tolerated error.

        A `look` that only reads may tolerate every ApiError, because an API server may refuse requests while it starts.
        After this many seconds, raises a transient DeployError with the last of these errors as its cause.
        """
        deadline = self.clock() + seconds
        seen = ""
        while True:
            try:
                return look()
            except (NotYetError, tolerated) as error:
                missing = str(error).rstrip(".")
                if self.clock() >= deadline:
                    raise DeployError(
                        f"{self} was not {what} within {seconds:.0f} s: {missing}.", transient=True
                    ) from error
            if missing != seen:
                seen = missing
                self.log.info("%s: %s", self, missing)
            self.sleep(self.limits.poll_interval_seconds)

    def why_not_serving(self, service: InferenceService, request: DeployRequest) -> str | None:
        """What the endpoint, or the canary's if there is one, serves instead of the model; None if it is that model."""
        try:
            served = self.asking(service, service.canary_percent is not None).served_model()
        except ServerError as error:
            return str(error)
        if served == ServedModel(True, request.model_digest, request.model_version):
            return None
        return f"the endpoint serves model {served.model_digest} version {served.model_version}"


class RevisionWatch:
    """Watches the start of a stored revision."""

    def __init__(self, view: ServiceView, stored: InferenceService, request: DeployRequest):
        self._view = view
        self._service = stored
        self._request = request
        self._limits = view.limits
        self._history = PodHistory()
        self._patience = Patience(view.limits, view.clock)
        self._pods: Sequence[Pod] = ()
        self._missing, self._missing_at = "", 0.0

    def wait_until_serving(self) -> InferenceService:
        """The service, once the revision is served and gets the requests meant for it.

        Raises ResourceFailedError if it does not start; DeployError if others changed the service or the API server
        does not respond; ApiRefusedError if the API server still refuses at the end.
        """
        limit = self._limits.start_timeout_seconds
        try:
            service = self._view.until("serving", limit, self._look, tolerated=ApiError)
        except DeployError as error:
            if error.__cause__ is None:
                raise
            if self._missing and self._view.clock() - self._missing_at <= self._limits.outage_timeout_seconds:
                summary = f"{self._view} was not serving within {limit:.0f} s: {self._missing}."
                raise self._failed(Cause.SLOW_START, summary) from error
            if isinstance(error.__cause__, ApiRefusedError):
                raise error.__cause__ from None
            raise
        self._view.log.info("%s serves model %s", self._view, self._request.model_digest)
        return service

    def keep_watching(self, seconds: float) -> None:
        """Return after this time. ResourceFailedError if a container of the revision fails meanwhile."""
        deadline = self._view.clock() + seconds
        self._history.observe(self._pods)
        num_known = len(self._history.failures())

        def look() -> None:
            self._service = self._view.unchanged(self._service)
            self._pods = self._own_pods(self._view.pods())
            self._history.observe(self._pods)
            if failures := self._history.failures()[num_known:]:
                raise self._failed(exit_cause(failures[-1]), exit_line(failures[-1]), failures[-1])
            if self._view.clock() < deadline:
                raise NotYetError(f"it gets a copy of the requests for {seconds:.0f} s")

        self._view.until("watched", seconds + self._limits.settle_timeout_seconds, look, tolerated=ApiError)

    def _own_pods(self, pods: Sequence[Pod]) -> list[Pod]:
        return [pod for pod in pods if mark_of(pod.annotations) == self._service.mark]

    def _look(self) -> InferenceService:
        self._service = self._view.unchanged(self._service)
        pods = self._view.pods()
        self._pods = self._own_pods(pods)
        self._give_up_if_broken()
        self._give_up_if_stuck()
        missing = self._service.find_missing(pods) or self._view.why_not_serving(self._service, self._request)
        if missing:
            self._missing, self._missing_at = missing.rstrip("."), self._view.clock()
            raise NotYetError(missing)
        return self._service

    def _give_up_if_broken(self) -> None:
        """One exit that no restart can fix is enough; of the others it takes several."""
        unready = [pod for pod in self._pods if not pod.ready]  # an older, ready one may have earlier exits
        self._history.observe(unready)
        failures = self._history.failures()
        final = [end for end in failures if end.out_of_memory or end.exit_code in self._limits.final_exit_codes]
        num_restarts = max((container.restarts for pod in unready for container in pod.containers), default=0)
        if final or (failures and num_restarts >= self._limits.max_restarts):
            end = final[0] if final else failures[-1]
            restarts = f", after {num_restarts} restarts" if num_restarts else ""
            raise self._failed(exit_cause(end), exit_line(end) + restarts, end)

    def _give_up_if_stuck(self) -> None:
        obstacle = find_obstacle(self._pods)
        if obstacle and obstacle.cause == Cause.SLOW_START:
            client, pod = self._view.client, (self._view.namespace, obstacle.where)
            failed = next(filter(_FAILED_MOUNT.match, reversed(client.warnings(*pod))), None)
            if failed and not client.has_event(*pod, "Pulling"):  # images are pulled once all volumes are mounted
                obstacle = replace(obstacle, cause=Cause.CONFIGURATION, text=failed)
        waited = self._patience.spend(obstacle)
        if obstacle and waited >= self._limits.of(obstacle.cause):
            raise self._failed(obstacle.cause, f"{obstacle} (for {waited:.0f} s)")

    def _failed(self, cause: Cause, summary: str, end: ContainerExit | None = None) -> ResourceFailedError:
        """Add the conditions, the newest warnings, and the log of the pod that ended or is not ready."""
        view, names = self._view, [pod.name for pod in self._pods]
        warnings = [text for name in names or [view.name] for text in view.client.warnings(view.namespace, name)]
        events = event_lines([text for text in warnings if not text.startswith(DEPLOY_FAILED)])
        pod = end.pod if end else next((pod.name for pod in self._pods if not pod.ready), None)
        tail = self._log_tail(pod) if pod else []
        return ResourceFailedError(
            Diagnosis(
                cause,
                summary,
                _ADVICE[cause],
                self._limits.is_worth_retrying(cause, end.exit_code if end else None),
                details=(*self._service.complaints, *events),
                log_tails={pod: tail} if pod and tail else {},
            )
        )

    def _log_tail(self, pod: str) -> list[str]:
        """The last log lines of the container that ended, or of the one that does not become ready."""
        view = self._view
        try:
            for previous in (True, False, True):  # once more, as it may have been restarted between the first two
                text = view.client.log(view.namespace, pod, CONTAINER_NAME, tail_lines=_LOG_LINES, previous=previous)
                if text:
                    return [line.partition(" ")[2] for line in text.splitlines()]
        except KubernetesError as error:
            return [f"(not read: {error})"]
        return []
