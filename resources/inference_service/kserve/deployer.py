"""Bringing one model into service and seeing that it is what answers; else putting back what was there. No Dagster."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cifar_assets.errors import CifarError, DeployError, StoreError
from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.client import InferenceService, InferenceServiceClient
from resources.inference_service.kserve.manifest import (
    DIGEST_ANNOTATION,
    MODE_ANNOTATION,
    REVISION_ANNOTATION,
    VERSION_ANNOTATION,
    request_of,
    with_traffic,
)
from resources.inference_service.kserve.settled import find_missing
from resources.inference_service.kserve.watch import (
    DEPLOY_FAILED,
    DEPLOYED,
    Endpoint,
    NotServingError,
    RevisionWatcher,
    RolloutLimits,
)
from resources.kubernetes.errors import ApiUnavailableError, KubernetesError


class CanaryJudge(Protocol):
    """Whoever decides whether a model that gets a share of the requests may have all of them."""

    def find_fault(self, service: InferenceService, request: DeployRequest) -> str | None:
        """Why it may not; None when it may."""
        ...


@dataclass(frozen=True)
class Outcome:
    """A service that answers with the model asked for."""

    service: InferenceService
    changed: bool
    previous_digest: str | None


class ServiceDeployer:
    """Deploys to, and deletes, the one InferenceService of a name."""

    def __init__(
        self,
        client: InferenceServiceClient,
        endpoint: Endpoint,
        build: Callable[[DeployRequest], dict[str, Any]],
        *,
        namespace: str,
        name: str,
        limits: RolloutLimits,
        judge: CanaryJudge | None = None,
        logger: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        sleeper: Callable[[float], None] = time.sleep,
    ):
        self._client = client
        self._build = build
        self._namespace = namespace
        self._name = name
        self._limits = limits
        self._judge = judge
        self._log = logger
        self._clock = clock
        self._sleep = sleeper
        self._label = f"InferenceService {namespace}/{name}"
        self._watcher = RevisionWatcher(
            client,
            endpoint,
            namespace=namespace,
            name=name,
            limits=limits,
            logger=logger,
            clock=clock,
            sleeper=sleeper,
        )

    def deploy(self, request: DeployRequest) -> Outcome:
        """Serve the model; return once it answers and no pod of another version does.

        DeployError with the cause; what served before then does so again, or the service is gone if nothing did.
        """
        manifest = self._build(request)
        revision = _revision(manifest)
        before = self._client.get(self._namespace, self._name)
        if before and not before.deleting:
            self._refuse_foreign(before)
            same = before.revision == revision and before.canary_percent is None
            if same and self._watcher.is_serving(before, revision, request):
                return Outcome(before, changed=False, previous_digest=request.model_digest)
        earlier, previous_digest = self._earlier(before, revision)
        try:
            self._roll_out(manifest, request, is_first=before is None or before.deleting)
        except NotServingError as error:
            raise self._failure(request, error, earlier) from error
        except DeployError:
            raise
        except BaseException:
            self._undo(earlier)
            raise
        self._record(DEPLOYED, f"Model {request.model_digest} version {request.model_version} serves.", warning=False)
        service = self._client.get(self._namespace, self._name)
        if service is None:
            raise DeployError(
                f"{self._label} was deleted by someone else just after model {request.model_digest} served."
            )
        return Outcome(service, changed=True, previous_digest=previous_digest)

    def delete(self) -> bool:
        """Take the service down and wait until its pods are gone. False where there was none."""
        service = self._client.get(self._namespace, self._name)
        if service is None:
            return False
        self._refuse_foreign(service)
        self._remove()
        return True

    def last_failure(self) -> str | None:
        """Why the last deployment failed, as long as the cluster keeps events; None when it did not."""
        events = [e for e in self._client.events(self._namespace, self._name) if e.reason in (DEPLOYED, DEPLOY_FAILED)]
        return events[-1].message if events and events[-1].reason == DEPLOY_FAILED else None

    def _roll_out(self, manifest: dict[str, Any], request: DeployRequest, *, is_first: bool) -> None:
        revision = _revision(manifest)
        percent = manifest["spec"]["predictor"].get("canaryTrafficPercent")
        if percent is None or is_first or self._judge is None:
            self._write(with_traffic(manifest, None))
            self._watcher.wait_until_serving(revision, request)
            return
        service = self._write(manifest)
        self._watcher.wait_until_serving(revision, request)
        self._log.info("%s: model %s gets %d %% of the requests", self._label, request.model_digest, percent)
        try:
            fault = self._judge.find_fault(service, request)
        except CifarError as error:
            transient = isinstance(error, ApiUnavailableError) or (
                isinstance(error, StoreError | DeployError) and error.transient
            )
            raise NotServingError.canary(percent, f"it could not be judged: {error}", transient=transient) from error
        if fault:
            raise NotServingError.canary(percent, fault)
        self._write(with_traffic(manifest, None))
        self._watcher.wait_until_serving(revision, request)

    def _refuse_foreign(self, service: InferenceService) -> None:
        if service.revision is None:
            raise DeployError(
                f"{service} exists and was not made by this project: it lacks the annotation {REVISION_ANNOTATION}. "
                "Delete it, or give the service another name."
            )

    def _earlier(self, before: InferenceService | None, revision: str) -> tuple[Mapping[str, Any] | None, str | None]:
        """What to put back if this deployment fails, and the digest that answers now."""
        if before is None or before.deleting:
            return None, None
        pods = [pod for pod in self._client.pods(self._namespace, self._name) if pod.ready and pod.revision]
        if before.revision != revision:
            return before.body, before.model_digest if before.ready or pods else None
        # The same as asked for now, from an attempt that was cut off: what it was to replace may still answer.
        requests = [found for pod in pods if pod.revision != revision and (found := request_of(pod.annotations))]
        return (self._build(requests[0]), requests[0].model_digest) if requests else (None, None)

    def _write(self, manifest: Mapping[str, Any]) -> InferenceService:
        """The stored service with the manifest's content, written again where no answer came."""
        deadline = self._clock() + self._limits.outage_timeout_seconds
        while True:
            try:
                stored = self._try_to_write(manifest)
                if stored:
                    return stored
                problem = "it is being deleted, or changed by someone else at the same time"
            except ApiUnavailableError as error:
                problem = str(error)
            if self._clock() > deadline:
                raise DeployError(f"{self._label} could not be written: {problem}.", transient=True)
            self._sleep(self._limits.poll_interval_seconds)

    def _try_to_write(self, manifest: Mapping[str, Any]) -> InferenceService | None:
        current = self._client.get(self._namespace, self._name)
        if current is None:
            return self._client.create(manifest)
        if current.deleting:
            return None
        percent = manifest["spec"]["predictor"].get("canaryTrafficPercent")
        if current.revision == _revision(manifest) and current.canary_percent == percent:
            return current
        return self._client.replace(current, manifest)

    def _failure(
        self, request: DeployRequest, error: NotServingError, earlier: Mapping[str, Any] | None
    ) -> DeployError:
        """The error of a deployment that is given up, after putting back what was there."""
        head = f"Model {request.model_digest} version {request.model_version} was not deployed to {self._label}"
        self._log.warning("%s: %s", head, error)
        try:
            end = self._put_back(earlier)
        except (DeployError, KubernetesError) as problem:
            end = f"What was there before could not be put back: {problem} Deploy the earlier model again."
        self._record(DEPLOY_FAILED, f"{head}: {error}", warning=True)
        return DeployError(f"{head}: {error}\n{end}", transient=error.diagnosis.transient)

    def _put_back(self, earlier: Mapping[str, Any] | None) -> str:
        """Restore what was there, wait until it alone has pods, and say so."""
        if earlier is None:
            current = self._client.get(self._namespace, self._name)
            if current and current.canary_percent is not None:
                self._write(with_traffic(current.body, 0))
                self._wait_until_settled(_revision(current.body), asleep=True)
                return "All requests go to the revision before it."
            self._remove()
            return "Nothing served before, so the InferenceService was deleted."
        annotations = earlier["metadata"]["annotations"]
        name = f"model {annotations[DIGEST_ANNOTATION]} version {annotations[VERSION_ANNOTATION]}"
        # Knative sends requests to the latest revision that is ready. While the earlier one is made anew, that may be
        # the refused one, so it gets none until then.
        for percent in (0, None) if _is_serverless(earlier) else (None,):
            self._write(with_traffic(earlier, percent))
            if not self._wait_until_settled(_revision(earlier)):
                return f"It was set back to {name}, which was not seen to serve within the time allowed."
        return f"It was set back to {name}, which serves as before."

    def _undo(self, earlier: Mapping[str, Any] | None) -> None:
        """What an interrupt leaves no time to wait for: write what was there, and nothing else."""
        try:
            if earlier is not None:
                # A serverless one keeps what it had: all requests would go to the latest revision that is ready.
                self._write(with_traffic(earlier, 0 if _is_serverless(earlier) else None))
            elif service := self._client.get(self._namespace, self._name):
                self._client.delete(service)
        except (DeployError, KubernetesError) as error:
            self._log.warning("%s: what was there before was not put back: %s", self._label, error)

    def _wait_until_settled(self, revision: str, *, asleep: bool = False) -> bool:
        """Whether the revision gets the requests meant for it, and no other does, within the time allowed."""
        deadline = self._clock() + self._limits.removal_timeout_seconds
        while self._clock() < deadline:
            try:
                service = self._client.get(self._namespace, self._name)
                pods = self._client.pods(self._namespace, self._name)
                if service and find_missing(service, pods, revision, asleep=asleep) is None:
                    return True
            except ApiUnavailableError as error:
                self._log.warning("%s: still putting back what was there: %s", self._label, error)
            self._sleep(self._limits.poll_interval_seconds)
        return False

    def _remove(self) -> None:
        deadline = self._clock() + self._limits.removal_timeout_seconds
        left = ""
        while self._clock() < deadline:
            try:
                service = self._client.get(self._namespace, self._name)
                pods = self._client.pods(self._namespace, self._name)
                if service is None and not pods:
                    return
                left = ", ".join([*([str(service)] if service else []), *(f"pod {pod.pod.name}" for pod in pods)])
                if service and not service.deleting:
                    self._client.delete(service)
            except ApiUnavailableError as error:
                left = str(error)
            self._sleep(self._limits.poll_interval_seconds)
        raise DeployError(
            f"{self._label} was to be deleted and was not gone after {self._limits.removal_timeout_seconds:.0f} s: "
            f"{left}.",
            transient=True,
        )

    def _record(self, reason: str, message: str, *, warning: bool) -> None:
        try:
            service = self._client.get(self._namespace, self._name)
            uid = service.uid if service else None
            self._client.record(self._namespace, self._name, reason=reason, message=message, warning=warning, uid=uid)
        except KubernetesError as error:
            self._log.warning("%s: the outcome was not recorded as an event: %s", self._label, error)


def _revision(manifest: Mapping[str, Any]) -> str:
    return manifest["metadata"]["annotations"][REVISION_ANNOTATION]


def _is_serverless(manifest: Mapping[str, Any]) -> bool:
    return manifest["metadata"]["annotations"].get(MODE_ANNOTATION) == "Knative"
