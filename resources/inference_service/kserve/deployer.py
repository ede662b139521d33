"""Bringing one model into service and seeing that it is what answers; else putting back what was there. No Dagster.

A deployment that fails undoes what it did and nothing else: it deletes only a service that it created, and replaces
only one that is still as it wrote it.
"""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from resources.errors import DeployError, ExplainedError, StoreError
from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.client import DEPLOY_FAILED, DEPLOYED, InferenceService, Mark, mark_of
from resources.inference_service.kserve.manifest import (
    DEPLOYMENT_ANNOTATION,
    REVISION_ANNOTATION,
    VERSION_ANNOTATION,
    request_of,
    with_traffic,
)
from resources.inference_service.kserve.watch import NotYetError, RevisionWatch, ServiceView
from resources.kubernetes.diagnosis import Diagnosis
from resources.kubernetes.errors import ApiRefusedError, KubernetesError, ResourceFailedError


@dataclass(frozen=True)
class Outcome:
    """A service that answers with the model asked for."""

    service: InferenceService
    changed: bool
    previous_digest: str | None


class ServiceDeployer:
    """Deploys to, and deletes, the one InferenceService of a name. One object makes one deployment."""

    def __init__(self, view: ServiceView, build: Callable[[DeployRequest], dict[str, Any]]):
        self._view = view
        self._client = view.client
        self._build = build
        self._log = view.log
        self._id = uuid.uuid4().hex
        self._found: set[str] = set()
        """Uids of services that this deployment did not create."""
        self._expected: set[Mark] = set()
        """Marks of the services that it may replace: what it found at first, and what it wrote."""

    def deploy(self, request: DeployRequest) -> Outcome:
        """Serve the model; return once it answers and no pod of another version does.

        DeployError with the cause. What served before then serves again; a service that this deployment created where
        none was is deleted, any other stays.
        """
        manifest = self._build(request)
        manifest["metadata"]["annotations"][DEPLOYMENT_ANNOTATION] = self._id
        before = self._view.get()
        found = None if before is None or before.deleting else before
        written = found is not None and self._is_made_by(found, manifest)
        if found:
            self._refuse_foreign(found)
            self._expected.add(found.mark)
            if written and found.canary_percent is None and self._is_serving(found, request):
                return Outcome(found, changed=False, previous_digest=request.model_digest)
        earlier, previous_digest = self._earlier(before, written)
        try:
            service = self._roll_out(manifest, request, found)
        except ResourceFailedError as error:
            raise self._failure(request, error, earlier) from error
        except DeployError:
            raise
        except BaseException:
            self._put_back_at_once(earlier)
            raise
        self._record(DEPLOYED, f"Model {request.model_digest} version {request.model_version} serves.")
        return Outcome(service, changed=True, previous_digest=previous_digest)

    def delete(self) -> bool:
        """Take the service down and wait until its pods are gone. False where there was none."""
        service = self._view.get()
        if service is None:
            return False
        self._refuse_foreign(service)
        self._remove(service)
        return True

    def _is_serving(self, service: InferenceService, request: DeployRequest) -> bool:
        missing = service.find_missing(self._view.pods(), asleep=True)
        return missing is None and self._view.why_not_serving(service, request) is None

    def _roll_out(
        self, manifest: dict[str, Any], request: DeployRequest, found: InferenceService | None
    ) -> InferenceService:
        percent = manifest["spec"]["predictor"].get("canaryTrafficPercent")
        if found and found.canary_percent is not None and found.mark.revision != _revision(manifest):
            # Until the new revision is ready, its requests go to the latest that is: a canary that nobody accepted.
            self._write_and_wait(with_traffic(manifest, 0), request)
        if percent is not None and found and request.find_fault:
            service = self._write_and_wait(manifest, request)
            self._log.info("%s: model %s gets %d %% of the requests", self._view, request.model_digest, percent)
            transient = False
            try:
                fault = request.find_fault(self._view.endpoint.client(service, canary=True))
            except ExplainedError as error:
                fault = f"it could not be judged: {error}"
                transient = isinstance(error, StoreError | DeployError) and error.transient
            if fault:
                summary = f"with {percent} % of the requests it was refused: {fault}"
                advice = "Check that the server prepares images as training does; deploy another model meanwhile."
                raise ResourceFailedError(Diagnosis("canary", summary, advice, transient))
        return self._write_and_wait(with_traffic(manifest, None), request)

    def _write_and_wait(self, manifest: Mapping[str, Any], request: DeployRequest) -> InferenceService:
        return RevisionWatch(self._view, self._write(manifest), request).wait_until_serving()

    def _refuse_foreign(self, service: InferenceService) -> None:
        if service.mark.revision is None:
            raise DeployError(
                f"{service} exists and was not made by this project: it lacks the annotation {REVISION_ANNOTATION}. "
                "Delete it, or give the service another name."
            )

    def _earlier(self, before: InferenceService | None, written: bool) -> tuple[Mapping[str, Any] | None, str | None]:
        """What to put back if this deployment fails, and the digest that answers now."""
        if before and before.deleting:
            return None, None
        pods = [pod for pod in self._view.pods() if pod.ready]
        if before and not written:
            return before.body, before.model_digest if before.ready or pods else None
        # Either no service, or the one asked for, from an attempt that was cut off. Pods of another may still answer.
        others = [pod for pod in pods if before is None or mark_of(pod.annotations) != before.mark]
        requests = [found for pod in others if (found := request_of(pod.annotations))]
        if requests:
            return self._build(requests[0]), requests[0].model_digest
        return None, before.model_digest if before and pods else None

    def _is_made_by(self, current: InferenceService, manifest: Mapping[str, Any]) -> bool:
        """Whether writing the manifest would change nothing but the traffic: nobody edited the spec."""
        if current.mark.revision != _revision(manifest):
            return False
        try:
            wanted = self._client.replace(current, manifest, dry_run=True)
        except ApiRefusedError as error:
            self._log.warning("%s: it could not be checked for edits: %s", self._view, error)
            return True
        return (
            wanted is not None and with_traffic(wanted.body, None)["spec"] == with_traffic(current.body, None)["spec"]
        )

    def _write(self, manifest: Mapping[str, Any]) -> InferenceService:
        """The stored service with the manifest's content, written again where no answer came."""
        seconds = self._view.limits.outage_timeout_seconds
        stored = self._view.until("written", seconds, lambda: self._try_to_write(manifest))
        self._expected.add(stored.mark)
        return stored

    def _try_to_write(self, manifest: Mapping[str, Any]) -> InferenceService:
        current = self._view.get()
        if current and current.mark.deployment != self._id:
            self._found.add(current.uid)
        if current is None:
            stored = self._client.create(manifest)
        elif current.deleting:
            stored = None
        elif not self._may_replace(current):
            raise DeployError(
                f"{self._view} was changed by someone else at the same time, and left as it is: it is to serve model "
                f"{current.model_digest}.",
                transient=True,
            )
        elif self._is_made_by(current, manifest):
            percent = manifest["spec"]["predictor"].get("canaryTrafficPercent")
            if current.canary_percent == percent:
                return current
            # Its annotations stay: they are in its pods, and a change would make new ones.
            stored = self._client.replace(current, with_traffic(current.body, percent))
        else:
            if current.mark.revision == _revision(manifest) and current.mark.deployment != self._id:
                self._log.warning("%s: its spec was edited by hand; it is written again", self._view)
            stored = self._client.replace(current, manifest)
        if stored is None:
            raise NotYetError("it is being deleted, or changed by someone else at the same time")
        return stored

    def _may_replace(self, current: InferenceService) -> bool:
        return current.mark.deployment == self._id or current.mark in self._expected

    def _get_own(self) -> InferenceService | None:
        """The service as it is now, unless it is gone or someone else changed it."""
        current = self._view.get()
        return current if current and not current.deleting and self._may_replace(current) else None

    def _is_created_here(self, current: InferenceService) -> bool:
        return current.mark.deployment == self._id and current.uid not in self._found

    def _failure(
        self, request: DeployRequest, error: ResourceFailedError, earlier: Mapping[str, Any] | None
    ) -> DeployError:
        """The error of a deployment that is given up, after putting back what was there."""
        head = f"Model {request.model_digest} version {request.model_version} was not deployed to {self._view}"
        self._log.warning("%s: %s", head, error)
        try:
            end = self._put_back(earlier)
        except (DeployError, KubernetesError) as problem:
            end = f"What was there before could not be put back: {problem} Deploy the earlier model again."
        self._record(DEPLOY_FAILED, f"{head}: {error}")
        return DeployError(f"{head}: {error}\n{end}", transient=error.transient)

    def _put_back(self, earlier: Mapping[str, Any] | None) -> str:
        """Restore what was there, wait until it alone has pods, and say so."""
        current = self._view.until("read", self._view.limits.outage_timeout_seconds, self._get_own)
        if current is None:
            return "The InferenceService was deleted or changed by someone else meanwhile, and left as it is now."
        if earlier is not None:
            return self._set_back(earlier)
        if self._is_created_here(current):
            self._remove(current)
            return "Nothing served before, so the InferenceService was deleted."
        if current.canary_percent is not None:
            self._is_settled(self._write(with_traffic(current.body, 0)), asleep=True)
            return "All requests go to the revision before it."
        return "The InferenceService was there before this deployment and was left as it is."

    def _set_back(self, earlier: Mapping[str, Any]) -> str:
        service = InferenceService(earlier)
        name = f"model {service.model_digest} version {service.annotations.get(VERSION_ANNOTATION)}"
        # Knative sends requests to the latest revision that is ready. While the earlier one is made again, that may be
        # the refused one, so it gets none until then. One that was a canary itself stays without requests.
        was_canary = service.canary_percent is not None
        for percent in (0,) if was_canary else (0, None) if service.serverless else (None,):
            if not self._is_settled(self._write(with_traffic(earlier, percent))):
                return f"It was set back to {name}, which was not seen to serve within the time allowed."
        if was_canary:
            return f"It was set back to {name}, a canary without requests: all go to the revision before it."
        return f"It was set back to {name}, which serves as before."

    def _put_back_at_once(self, earlier: Mapping[str, Any] | None) -> None:
        """What an interrupt leaves no time to wait for: write what was there, and nothing else."""
        try:
            current = self._get_own()
            if current is None:
                return
            if earlier is None:
                if self._is_created_here(current):
                    self._client.delete(current)
            elif current.mark != InferenceService(earlier).mark:
                # A serverless one keeps what it had: all requests would go to the latest revision that is ready.
                self._write(with_traffic(earlier, 0 if InferenceService(earlier).serverless else None))
        except (DeployError, KubernetesError) as error:
            self._log.warning("%s: what was there before was not put back: %s", self._view, error)

    def _is_settled(self, stored: InferenceService, *, asleep: bool = False) -> bool:
        """Whether its revision gets the requests meant for it, and no other does, within the time allowed."""

        def look() -> None:
            service, pods = self._view.get(), self._view.pods()
            if service is None or not service.is_as_written(stored):
                raise NotYetError("it was changed by someone else")
            if missing := service.find_missing(pods, asleep=asleep):
                raise NotYetError(missing)

        try:
            self._view.until("put back", self._view.limits.removal_timeout_seconds, look)
        except DeployError as error:
            self._log.warning("%s", error)
            return False
        return True

    def _remove(self, service: InferenceService) -> None:
        """Delete this service, and no other that takes its name; wait until it and its pods are gone."""

        def look() -> None:
            current, pods = self._view.get(), self._view.pods()
            if (current is None and not pods) or (current and current.uid != service.uid):
                return
            if current and not current.deleting:
                self._client.delete(current)
            raise NotYetError(", ".join([*([str(current)] if current else []), *(f"pod {pod.name}" for pod in pods)]))

        self._view.until("deleted", self._view.limits.removal_timeout_seconds, look)

    def _record(self, reason: str, message: str) -> None:
        try:
            self._client.record(self._view.namespace, self._view.name, reason, message)
        except KubernetesError as error:
            self._log.warning("%s: the outcome was not recorded as an event: %s", self._view, error)


def _revision(manifest: Mapping[str, Any]) -> str:
    return manifest["metadata"]["annotations"][REVISION_ANNOTATION]
