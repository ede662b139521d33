"""Bringing one model into service and seeing that it is what answers; else putting back what was there. No Dagster.

A deployment that fails undoes what it did and nothing else: it deletes only a service that it created, and replaces
only one that is still as it wrote it.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from resources.errors import DeployError, ExplainedError, StoreError
from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.client import InferenceService, InferenceServiceClient
from resources.inference_service.kserve.diagnosis import diagnose_canary
from resources.inference_service.kserve.manifest import (
    DEPLOYMENT_ANNOTATION,
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
    RevisionWatcher,
    RolloutLimits,
)
from resources.kubernetes.errors import ApiRefusedError, ApiUnavailableError, KubernetesError, ResourceFailedError

T = TypeVar("T")


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
    """Deploys to, and deletes, the one InferenceService of a name. One object makes one deployment."""

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
        self._id = uuid.uuid4().hex
        self._found: set[str] = set()
        """Uids of services that this deployment did not create."""
        self._expected: set[tuple[str | None, str | None]] = set()
        """Marks of the services that it may replace: what it found at first, and what it wrote."""
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

        DeployError with the cause. What served before then serves again; a service that this deployment created where
        none was is deleted, any other stays.
        """
        manifest = self._build(request)
        manifest["metadata"]["annotations"][DEPLOYMENT_ANNOTATION] = self._id
        before = self._client.get(self._namespace, self._name)
        found = None if before is None or before.deleting else before
        written = found is not None and self._is_made_by(found, manifest)
        if found:
            self._refuse_foreign(found)
            self._expected.add(found.mark)
            if written and found.canary_percent is None and self._watcher.is_serving(found, request):
                return Outcome(found, changed=False, previous_digest=request.model_digest)
        earlier, previous_digest = self._earlier(before, written)
        try:
            service = self._roll_out(manifest, request, found)
        except ResourceFailedError as error:
            raise self._failure(request, error, earlier) from error
        except DeployError:
            raise
        except BaseException:
            self._undo(earlier)
            raise
        self._record(DEPLOYED, f"Model {request.model_digest} version {request.model_version} serves.", warning=False)
        return Outcome(service, changed=True, previous_digest=previous_digest)

    def delete(self) -> bool:
        """Take the service down and wait until its pods are gone. False where there was none."""
        service = self._client.get(self._namespace, self._name)
        if service is None:
            return False
        self._refuse_foreign(service)
        self._remove(service)
        return True

    def last_failure(self) -> str | None:
        """Why the last deployment failed, as long as the cluster keeps events; None when it did not."""
        events = [e for e in self._client.events(self._namespace, self._name) if e.reason in (DEPLOYED, DEPLOY_FAILED)]
        return events[-1].message if events and events[-1].reason == DEPLOY_FAILED else None

    def _roll_out(
        self, manifest: dict[str, Any], request: DeployRequest, found: InferenceService | None
    ) -> InferenceService:
        percent = manifest["spec"]["predictor"].get("canaryTrafficPercent")
        if found and found.canary_percent is not None and found.revision != _revision(manifest):
            # Until the new revision is ready, its share would go to the latest that is: a canary that nobody accepted.
            self._watcher.wait_until_serving(self._write(with_traffic(manifest, 0)), request)
        if percent is not None and found and self._judge is not None:
            service = self._write(manifest)
            self._watcher.wait_until_serving(service, request)
            self._log.info("%s: model %s gets %d %% of the requests", self._label, request.model_digest, percent)
            try:
                fault = self._judge.find_fault(service, request)
            except ExplainedError as error:
                transient = isinstance(error, StoreError | DeployError) and error.transient
                text = f"it could not be judged: {error}"
                raise ResourceFailedError(diagnose_canary(percent, text, transient=transient)) from error
            if fault:
                raise ResourceFailedError(diagnose_canary(percent, fault))
        return self._watcher.wait_until_serving(self._write(with_traffic(manifest, None)), request)

    def _refuse_foreign(self, service: InferenceService) -> None:
        if service.revision is None:
            raise DeployError(
                f"{service} exists and was not made by this project: it lacks the annotation {REVISION_ANNOTATION}. "
                "Delete it, or give the service another name."
            )

    def _earlier(self, before: InferenceService | None, written: bool) -> tuple[Mapping[str, Any] | None, str | None]:
        """What to put back if this deployment fails, and the digest that answers now."""
        if before and before.deleting:
            return None, None
        pods = [pod for pod in self._client.pods(self._namespace, self._name) if pod.ready]
        if before and not written:
            return before.body, before.model_digest if before.ready or pods else None
        # Either no service, or the one asked for, from an attempt that was cut off. Pods of another may still answer.
        others = [pod for pod in pods if before is None or pod.mark != before.mark]
        requests = [found for pod in others if (found := request_of(pod.annotations))]
        if requests:
            return self._build(requests[0]), requests[0].model_digest
        return None, before.model_digest if before and pods else None

    def _is_made_by(self, current: InferenceService, manifest: Mapping[str, Any]) -> bool:
        """Whether writing the manifest would change nothing but the share of the requests: nobody edited the spec."""
        if current.revision != _revision(manifest):
            return False
        try:
            wanted = self._client.replace(current, manifest, dry_run=True)
        except ApiRefusedError as error:
            self._log.warning("%s: it could not be checked for edits: %s", self._label, error)
            return True
        return wanted is not None and _without_traffic(wanted.body) == _without_traffic(current.body)

    def _write(self, manifest: Mapping[str, Any]) -> InferenceService:
        """The stored service with the manifest's content, written again where no answer came."""
        stored = self._insist("written", lambda: self._try_to_write(manifest))
        self._expected.add(stored.mark)
        return stored

    def _try_to_write(self, manifest: Mapping[str, Any]) -> InferenceService | None:
        current = self._client.get(self._namespace, self._name)
        if current is None:
            return self._client.create(manifest)
        if current.deployment_id != self._id:
            self._found.add(current.uid)
        if current.deleting:
            return None
        if not self._may_replace(current):
            raise DeployError(
                f"{self._label} was changed by someone else at the same time, and left as it is: it is to serve model "
                f"{current.model_digest}.",
                transient=True,
            )
        if self._is_made_by(current, manifest):
            percent = manifest["spec"]["predictor"].get("canaryTrafficPercent")
            if current.canary_percent == percent:
                return current
            # Its annotations stay: they are in its pods, and a change would make new ones.
            return self._client.replace(current, with_traffic(current.body, percent))
        if current.revision == _revision(manifest) and current.deployment_id != self._id:
            self._log.warning("%s: its spec was edited by hand; it is written again", self._label)
        return self._client.replace(current, manifest)

    def _may_replace(self, current: InferenceService) -> bool:
        return current.deployment_id == self._id or current.mark in self._expected

    def _is_created_here(self, current: InferenceService) -> bool:
        return current.deployment_id == self._id and current.uid not in self._found

    def _insist(self, what: str, attempt: Callable[[], T | None]) -> T:
        """The first answer other than None, for as long as an outage is tolerated."""
        deadline = self._clock() + self._limits.outage_timeout_seconds
        while True:
            try:
                answer = attempt()
                if answer is not None:
                    return answer
                problem = "it is being deleted, or changed by someone else at the same time"
            except ApiUnavailableError as error:
                problem = str(error)
            if self._clock() > deadline:
                raise DeployError(f"{self._label} could not be {what}: {problem}.", transient=True)
            self._sleep(self._limits.poll_interval_seconds)

    def _failure(
        self, request: DeployRequest, error: ResourceFailedError, earlier: Mapping[str, Any] | None
    ) -> DeployError:
        """The error of a deployment that is given up, after putting back what was there."""
        head = f"Model {request.model_digest} version {request.model_version} was not deployed to {self._label}"
        self._log.warning("%s: %s", head, error)
        try:
            end = self._put_back(earlier)
        except (DeployError, KubernetesError) as problem:
            end = f"What was there before could not be put back: {problem} Deploy the earlier model again."
        self._record(DEPLOY_FAILED, f"{head}: {error}", warning=True)
        return DeployError(f"{head}: {error}\n{end}", transient=error.transient)

    def _put_back(self, earlier: Mapping[str, Any] | None) -> str:
        """Restore what was there, wait until it alone has pods, and say so."""
        (current,) = self._insist("read", lambda: (self._client.get(self._namespace, self._name),))
        if current is None or current.deleting or not self._may_replace(current):
            return "The InferenceService was deleted or changed by someone else meanwhile, and left as it is now."
        if earlier is not None:
            return self._set_back(earlier)
        if self._is_created_here(current):
            self._remove(current)
            return "Nothing served before, so the InferenceService was deleted."
        if current.canary_percent is not None:
            self._wait_until_settled(self._write(with_traffic(current.body, 0)), asleep=True)
            return "All requests go to the revision before it."
        return "The InferenceService was there before this deployment and was left as it is."

    def _set_back(self, earlier: Mapping[str, Any]) -> str:
        annotations = earlier["metadata"]["annotations"]
        name = f"model {annotations.get(DIGEST_ANNOTATION)} version {annotations.get(VERSION_ANNOTATION)}"
        # Knative sends requests to the latest revision that is ready. While the earlier one is made again, that may be
        # the refused one, so it gets none until then. One that was a canary itself stays without requests.
        was_canary = earlier["spec"]["predictor"].get("canaryTrafficPercent") is not None
        shares = (0,) if was_canary else (0, None) if _is_serverless(earlier) else (None,)
        for percent in shares:
            if not self._wait_until_settled(self._write(with_traffic(earlier, percent))):
                return f"It was set back to {name}, which was not seen to serve within the time allowed."
        if was_canary:
            return f"It was set back to {name}, a canary without requests: all go to the revision before it."
        return f"It was set back to {name}, which serves as before."

    def _undo(self, earlier: Mapping[str, Any] | None) -> None:
        """What an interrupt leaves no time to wait for: write what was there, and nothing else."""
        try:
            current = self._client.get(self._namespace, self._name)
            if current is None or current.deleting or not self._may_replace(current):
                return
            if earlier is not None:
                if current.mark == InferenceService(earlier).mark:
                    return  # nothing was written
                # A serverless one keeps what it had: all requests would go to the latest revision that is ready.
                self._write(with_traffic(earlier, 0 if _is_serverless(earlier) else None))
            elif self._is_created_here(current):
                self._client.delete(current)
        except (DeployError, KubernetesError) as error:
            self._log.warning("%s: what was there before was not put back: %s", self._label, error)

    def _wait_until_settled(self, stored: InferenceService, *, asleep: bool = False) -> bool:
        """Whether its revision gets the requests meant for it, and no other does, within the time allowed."""
        deadline = self._clock() + self._limits.removal_timeout_seconds
        while self._clock() < deadline:
            try:
                service = self._client.get(self._namespace, self._name)
                pods = self._client.pods(self._namespace, self._name)
                if service and service.is_as_written(stored) and find_missing(service, pods, asleep=asleep) is None:
                    return True
            except ApiUnavailableError as error:
                self._log.warning("%s: still putting back what was there: %s", self._label, error)
            self._sleep(self._limits.poll_interval_seconds)
        return False

    def _remove(self, service: InferenceService) -> None:
        """Delete this service, and no other that takes its name; wait until it and its pods are gone."""
        uid = service.uid
        deadline = self._clock() + self._limits.removal_timeout_seconds
        left = ""
        while self._clock() < deadline:
            try:
                current = self._client.get(self._namespace, self._name)
                pods = self._client.pods(self._namespace, self._name)
                if (current is None and not pods) or (current and current.uid != uid):
                    return
                left = ", ".join([*([str(current)] if current else []), *(f"pod {pod.pod.name}" for pod in pods)])
                if current and not current.deleting:
                    self._client.delete(current)
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


def _without_traffic(body: Mapping[str, Any]) -> dict[str, Any]:
    return with_traffic(body, None)["spec"]
