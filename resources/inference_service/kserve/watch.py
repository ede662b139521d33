"""Waiting for one revision of an InferenceService to answer. No Dagster; clock and sleeper are given."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from resources.errors import DeployError
from resources.inference_service.client import ServedModel, ServerError
from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.client import InferenceService, InferenceServiceClient
from resources.inference_service.kserve.config import CONTAINER_NAME
from resources.inference_service.kserve.diagnosis import diagnose_obstacle, find_crash, find_serving_obstacle
from resources.inference_service.kserve.pods import ServingPod
from resources.inference_service.kserve.settled import find_missing
from resources.kubernetes.diagnosis import Cause, Diagnosis, Outage, Patience, PodHistory, WatchLimits, event_lines
from resources.kubernetes.errors import ApiError, KubernetesError, ResourceFailedError

_LOG_LINES = 12
DEPLOYED = "Deployed"
DEPLOY_FAILED = "DeployFailed"
"""Reasons of the events that tell how deployments ended."""


class Endpoint(Protocol):
    """Whoever can ask the service, as its users do."""

    def served_model(self, service: InferenceService) -> ServedModel:
        """What answers. ServerError where nothing does."""
        ...


@dataclass(frozen=True)
class RolloutLimits(WatchLimits):
    """How often to look, and how long to wait for what may pass, in seconds; `start_timeout_seconds` is for all."""

    poll_interval_seconds: float = 1.0
    unschedulable_timeout_seconds: float = 120.0
    blocked_timeout_seconds: float = 45.0
    start_timeout_seconds: float = 600.0
    outage_timeout_seconds: float = 120.0
    no_pods_timeout_seconds: float = 180.0
    """KServe does nothing. Long enough for its controller, which every new pod needs as well, to be started again."""
    removal_timeout_seconds: float = 120.0
    """For what is put back, or deleted, to take effect."""
    max_restarts: int = 3
    """Of a server that ends with an exit code that a restart might cure."""

    def of(self, cause: Cause) -> float:
        return self.no_pods_timeout_seconds if cause == Cause.NO_PODS else super().of(cause)


@dataclass
class _Watch:
    """What was seen of one revision so far."""

    began: float
    history: PodHistory
    outage: Outage
    patience: Patience
    seen: str = "nothing"


class RevisionWatcher:
    """Watches revisions of one service come up."""

    def __init__(
        self,
        client: InferenceServiceClient,
        endpoint: Endpoint,
        *,
        namespace: str,
        name: str,
        limits: RolloutLimits,
        logger: logging.Logger,
        clock: Callable[[], float],
        sleeper: Callable[[float], None],
    ):
        self._client = client
        self._endpoint = endpoint
        self._namespace = namespace
        self._name = name
        self._limits = limits
        self._log = logger
        self._clock = clock
        self._sleep = sleeper
        self._label = f"InferenceService {namespace}/{name}"

    def is_serving(self, service: InferenceService, request: DeployRequest) -> bool:
        """Whether its revision answers already, asleep or awake, and no other does."""
        pods = self._client.pods(self._namespace, self._name)
        return find_missing(service, pods, asleep=True) is None and self._problem(service, request) is None

    def wait_until_serving(self, stored: InferenceService, request: DeployRequest) -> InferenceService:
        """The service, once the stored revision answers and has what is meant for it.

        ResourceFailedError for one that does not come up; DeployError for a service that others changed, or an API
        server that does not answer.
        """
        outage = Outage(
            self._clock,
            self._limits.outage_timeout_seconds,
            logger=self._log,
            meanwhile=f"{self._label} is not watched",
        )
        watch = _Watch(self._clock(), PodHistory(), outage, Patience(self._limits, self._clock))
        while not (serving := self._look(watch, stored, request)):
            waited = self._clock() - watch.began
            if waited > self._limits.start_timeout_seconds:
                pods = self._pods_of(stored)
                summary = f"not serving after {waited:.0f} s; last seen: {watch.seen}"
                found = diagnose_obstacle(Cause.SLOW_START, summary, self._details(pods), self._limits)
                unready = [pod.pod.name for pod in pods if not pod.ready]
                raise ResourceFailedError(self._with_log(found, unready[0]) if unready else found)
            self._sleep(self._limits.poll_interval_seconds)
        self._log.info("%s serves model %s", self._label, request.model_digest)
        return serving

    def _look(self, watch: _Watch, stored: InferenceService, request: DeployRequest) -> InferenceService | None:
        """The service if it serves. Raises ResourceFailedError for a revision that is given up."""
        try:
            service = self._client.get(self._namespace, self._name)
            if service is None or service.deleting or not service.is_as_written(stored):
                raise DeployError(
                    f"{self._label} was deleted or changed by someone else while model {request.model_digest} was "
                    "being deployed. It was left as it is now."
                )
            pods = self._client.pods(self._namespace, self._name)
            ours = [pod for pod in pods if pod.mark == service.mark]
            unready = [pod for pod in ours if not pod.ready]  # an older one that is may have a past
            watch.history.observe(pod.pod for pod in unready)
            self._give_up_if_broken(watch, unready)
            self._give_up_if_stuck(watch, ours)
            problem = find_missing(service, pods) or self._problem(service, request)
            watch.outage.end()
        except ApiError as error:
            service, problem = None, str(error)
            try:
                watch.outage.endure(error)
            except ApiError:
                raise DeployError(
                    f"Model {request.model_digest} was written to {self._label}, but the API server has given no "
                    f"usable answer since, so it is not known whether the model serves: {error}",
                    transient=error.transient,
                ) from error
        if problem and problem != watch.seen:
            watch.seen = problem
            self._log.info("%s: %s", self._label, problem)
        return None if problem else service

    def _problem(self, service: InferenceService, request: DeployRequest) -> str | None:
        try:
            served = self._endpoint.served_model(service)
        except ServerError as error:
            return str(error)
        if (served.ready, served.model_digest, served.model_version) == (
            True,
            request.model_digest,
            request.model_version,
        ):
            return None
        return f"the endpoint answers with model {served.model_digest} version {served.model_version}"

    def _give_up_if_broken(self, watch: _Watch, pods: Sequence[ServingPod]) -> None:
        crash = find_crash(watch.history, pods, self._limits, max_restarts=self._limits.max_restarts)
        if crash:
            raise ResourceFailedError(self._with_log(*crash))

    def _give_up_if_stuck(self, watch: _Watch, pods: Sequence[ServingPod]) -> None:
        obstacle = find_serving_obstacle(pods)
        waited = watch.patience.spend(obstacle)
        if obstacle and waited >= self._limits.of(obstacle.cause):
            summary = f"{obstacle} (for {waited:.0f} s)"
            raise ResourceFailedError(diagnose_obstacle(obstacle.cause, summary, self._details(pods), self._limits))

    def _pods_of(self, service: InferenceService) -> list[ServingPod]:
        """None where they cannot be listed: they only add to an error."""
        try:
            return [pod for pod in self._client.pods(self._namespace, self._name) if pod.mark == service.mark]
        except KubernetesError:
            return []

    def _details(self, pods: Sequence[ServingPod]) -> list[str]:
        """Complaints of the service's conditions, warnings about its pods, or about itself where it has none.

        They only add to an error.
        """
        try:
            service = self._client.get(self._namespace, self._name)
            names = [pod.pod.name for pod in pods] or [self._name]
            warnings = [text for name in names for text in self._client.warnings(self._namespace, name)]
            warnings = [text for text in warnings if not text.startswith(DEPLOY_FAILED)]
            return [*(service.complaints if service else []), *event_lines(warnings)]
        except KubernetesError:
            return []

    def _with_log(self, diagnosis: Diagnosis, pod: str) -> Diagnosis:
        """The last lines of the container that ended, or of the one that does not get ready."""
        text: str | None = None
        try:
            for previous in (True, False):
                text = text or self._client.log(
                    self._namespace, pod, CONTAINER_NAME, tail_lines=_LOG_LINES, previous=previous
                )
        except KubernetesError as error:
            return replace(diagnosis, log_tails={pod: [f"(not read: {error})"]})
        lines = [line.partition(" ")[2] for line in (text or "").splitlines()]
        return replace(diagnosis, log_tails={pod: lines}) if lines else diagnosis
