"""Waiting for one revision of an InferenceService to answer. No Dagster; clock and sleeper are given."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from resources.errors import DeployError
from resources.inference_service.client import InferenceClient, ServedModel, ServerError
from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.client import DEPLOY_FAILED, InferenceService, InferenceServiceClient, mark_of
from resources.inference_service.kserve.config import CONTAINER_NAME
from resources.interrupts import sleep
from resources.kubernetes.diagnosis import (
    Cause,
    Diagnosis,
    Obstacle,
    Outage,
    Patience,
    PodHistory,
    WatchLimits,
    event_lines,
    exit_cause,
    exit_line,
    find_obstacle,
)
from resources.kubernetes.errors import ApiError, ApiUnavailableError, KubernetesError, ResourceFailedError
from resources.kubernetes.pods import Pod

T = TypeVar("T")

_LOG_LINES = 12
_ADVICE: Mapping[Cause, str] = {
    Cause.OUT_OF_MEMORY: "Raise `memory_limit`, or lower what the server holds at a time.",
    Cause.EXIT_CODE: "The last lines of its log say why.",
    Cause.KILLED: "It was ended from outside, or did not get ready within `startup_seconds`; its log may say why.",
    Cause.NOT_STARTED: "Check the image: its entry point has to be the model server.",
    Cause.EVICTED: "The node ran short of memory or disk. Try again, with requests closer to use.",
    Cause.UNSCHEDULABLE: "Lower `cpu` and `memory`, or add nodes: an update needs room for one more replica.",
    Cause.IMAGE: "Check the image's name and tag, that the node can reach its registry, and `image_pull_secrets`.",
    Cause.CONFIGURATION: "Create the Secret or ConfigMap that it names, in the service's namespace, or correct "
    "`env_secrets` and `env_config_maps`.",
    Cause.NO_PODS: "Check that KServe's controller runs, its log, and the namespace's quota.",
    Cause.SLOW_START: "Look at the pods with kubectl describe, or raise `rollout_timeout_seconds`.",
    Cause.UNKNOWN: "Look at the service and its pods with kubectl describe.",
}


class NotYetError(Exception):
    """What is waited for is not there yet. The text says what is missing."""


class Endpoint(Protocol):
    """Knows where the service answers."""

    def client(self, service: InferenceService, *, canary: bool = False) -> InferenceClient: ...
    def served_model(self, service: InferenceService, *, canary: bool = False) -> ServedModel: ...


@dataclass(frozen=True)
class RolloutLimits(WatchLimits):
    """How often to look, and how long to wait for each cause; `start_timeout_seconds` is for the whole rollout."""

    poll_interval_seconds: float = 1.0
    unschedulable_timeout_seconds: float = 120.0
    blocked_timeout_seconds: float = 45.0
    start_timeout_seconds: float = 600.0
    outage_timeout_seconds: float = 120.0
    final_exit_codes: tuple[int, ...] = (2,)
    """The server ends with 2 for a wrong digest, a missing model or wrong options."""
    no_pods_timeout_seconds: float = 180.0
    """KServe does nothing. Long enough for its controller, which every new pod needs as well, to be started again."""
    removal_timeout_seconds: float = 120.0
    """For what is put back, or deleted, to take effect."""
    max_restarts: int = 3
    """Of a server that ends with an exit code that a restart might cure."""

    def of(self, cause: Cause) -> float:
        return self.no_pods_timeout_seconds if cause == Cause.NO_PODS else super().of(cause)


@dataclass(frozen=True)
class ServiceView:
    """The InferenceService of one name: how it is looked at, and how long."""

    client: InferenceServiceClient
    endpoint: Endpoint
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

    def until(self, what: str, seconds: float, look: Callable[[], T]) -> T:
        """What `look` returns, called until it raises neither NotYetError nor ApiUnavailableError.

        DeployError, which is transient, after that many seconds.
        """
        deadline = self.clock() + seconds
        while True:
            try:
                return look()
            except (NotYetError, ApiUnavailableError) as error:
                if self.clock() > deadline:
                    text = str(error).rstrip(".")
                    raise DeployError(
                        f"{self} was not {what} within {seconds:.0f} s: {text}.", transient=True
                    ) from error
            self.sleep(self.limits.poll_interval_seconds)

    def why_not_serving(self, service: InferenceService, request: DeployRequest) -> str | None:
        """What the endpoint, or the canary's where there is one, answers instead of the model; None when it is that."""
        try:
            served = self.endpoint.served_model(service, canary=service.canary_percent is not None)
        except ServerError as error:
            return str(error)
        if served == ServedModel(True, request.model_digest, request.model_version):
            return None
        return f"the endpoint answers with model {served.model_digest} version {served.model_version}"


class RevisionWatch:
    """Watches one stored revision come up."""

    def __init__(self, view: ServiceView, stored: InferenceService, request: DeployRequest):
        self._view = view
        self._stored = self._service = stored
        self._request = request
        self._limits = view.limits
        self._began = view.clock()
        self._history = PodHistory()
        self._patience = Patience(view.limits, view.clock)
        self._pods: Sequence[Pod] = ()

    def wait_until_serving(self) -> InferenceService:
        """The service, once the revision answers and has what is meant for it.

        ResourceFailedError for one that does not come up; DeployError for a service that others changed, or an API
        server that does not answer.
        """
        view = self._view
        outage = Outage(
            view.clock, self._limits.outage_timeout_seconds, logger=view.log, meanwhile=f"{view} is not watched"
        )
        seen = "nothing"
        while True:
            try:
                self._look()
                view.log.info("%s serves model %s", view, self._request.model_digest)
                return self._service
            except NotYetError as error:
                outage.end()
                missing = str(error)
            except ApiError as error:
                self._endure(outage, error)
                missing = str(error)
            if missing != seen:
                seen = missing
                view.log.info("%s: %s", view, missing)
            waited = view.clock() - self._began
            if waited > self._limits.start_timeout_seconds:
                summary = f"not serving after {waited:.0f} s; last seen: {seen}"
                unready = [pod.name for pod in self._pods if not pod.ready]
                raise self._failed(Cause.SLOW_START, summary, details=self._details(), log_of=unready[:1])
            view.sleep(self._limits.poll_interval_seconds)

    def _look(self) -> None:
        """Returns if it serves, else raises NotYetError, or ResourceFailedError for a revision that is given up."""
        service = self._view.get()
        if service is None or service.deleting or not service.is_as_written(self._stored):
            raise DeployError(
                f"{self._view} was deleted or changed by someone else while model {self._request.model_digest} was "
                "being deployed. It was left as it is now."
            )
        pods = self._view.pods()
        self._service = service
        self._pods = [pod for pod in pods if mark_of(pod.annotations) == service.mark]
        self._give_up_if_broken()
        self._give_up_if_stuck()
        missing = service.find_missing(pods) or self._view.why_not_serving(service, self._request)
        if missing:
            raise NotYetError(missing)

    def _endure(self, outage: Outage, error: ApiError) -> None:
        try:
            outage.endure(error)
        except ApiError:
            raise DeployError(
                f"Model {self._request.model_digest} was written to {self._view}, but the API server has given no "
                f"usable answer since, so it is not known whether the model serves: {error}",
                transient=error.transient,
            ) from error

    def _give_up_if_broken(self) -> None:
        """An end that no restart cures is enough; of the others it takes several."""
        unready = [pod for pod in self._pods if not pod.ready]  # an older one that is ready may have a past
        self._history.observe(unready)
        failures = self._history.failures()
        final = [end for end in failures if end.out_of_memory or end.exit_code in self._limits.final_exit_codes]
        num_restarts = max((container.restarts for pod in unready for container in pod.containers), default=0)
        if final:
            end, summary = final[0], exit_line(final[0])
        elif failures and num_restarts >= self._limits.max_restarts:
            end, summary = failures[-1], f"{exit_line(failures[-1])}, after {num_restarts} restarts"
        else:
            return
        raise self._failed(exit_cause(end), summary, exit_code=end.exit_code, log_of=[end.pod])

    def _give_up_if_stuck(self) -> None:
        if self._pods:
            obstacle = find_obstacle(self._pods)
        else:
            obstacle = Obstacle(Cause.NO_PODS, "service", "KServe has made no pod for this version")
        waited = self._patience.spend(obstacle)
        if obstacle and waited >= self._limits.of(obstacle.cause):
            raise self._failed(obstacle.cause, f"{obstacle} (for {waited:.0f} s)", details=self._details())

    def _failed(
        self,
        cause: Cause,
        summary: str,
        *,
        exit_code: int | None = None,
        details: Sequence[str] = (),
        log_of: Sequence[str] = (),
    ) -> ResourceFailedError:
        transient = self._limits.is_worth_retrying(cause, exit_code)
        tails = {pod: lines for pod in log_of if (lines := self._log_tail(pod))}
        return ResourceFailedError(
            Diagnosis(cause, summary, _ADVICE[cause], transient, details=tuple(details), log_tails=tails)
        )

    def _details(self) -> list[str]:
        """Complaints of the service's conditions, and warnings about its pods, or about itself where it has none."""
        view = self._view
        names = [pod.name for pod in self._pods] or [view.name]
        warnings = [text for name in names for text in view.client.warnings(view.namespace, name)]
        warnings = [text for text in warnings if not text.startswith(DEPLOY_FAILED)]
        return [*self._service.complaints, *event_lines(warnings)]

    def _log_tail(self, pod: str) -> list[str]:
        """The last lines of the container that ended, or of the one that does not get ready."""
        view = self._view
        try:
            for previous in (True, False):
                text = view.client.log(view.namespace, pod, CONTAINER_NAME, tail_lines=_LOG_LINES, previous=previous)
                if text:
                    return [line.partition(" ")[2] for line in text.splitlines()]
        except KubernetesError as error:
            return [f"(not read: {error})"]
        return []
