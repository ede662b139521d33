"""Deploys a model and verifies that it is served; otherwise rolls back. No Dagster.

A failed deployment reverts only its own changes: it deletes only a service that it created, and replaces only one that
is still as it found or wrote it.
"""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from resources.errors import DeployError, ExplainedError, StoreError
from resources.inference_service.client import InferenceClient
from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.client import DEPLOY_FAILED, DEPLOYED, InferenceService, mark_of
from resources.inference_service.kserve.manifest import (
    DEPLOYMENT_ANNOTATION,
    REVISION_ANNOTATION,
    VERSION_ANNOTATION,
    percent_of,
    request_of,
    with_traffic,
)
from resources.inference_service.kserve.traffic import RevisionSplit, Split
from resources.inference_service.kserve.watch import NotYetError, RevisionWatch, ServiceView
from resources.kubernetes.diagnosis import Diagnosis
from resources.kubernetes.errors import ApiError, KubernetesError, ResourceFailedError, added_to


@dataclass(frozen=True)
class Outcome:
    """A service that serves the requested model."""

    service: InferenceService
    changed: bool
    previous_digest: str | None


class ServiceDeployer:
    """Deploys to, and deletes, the InferenceService with a given name. Use one object per deployment.

    `split` is how a canary gets its requests; by default as Knative does it.
    """

    def __init__(self, view: ServiceView, build: Callable[[DeployRequest], dict[str, Any]], split: Split | None = None):
        self._view = view
        self._client = view.client
        self._build = build
        self._log = view.log
        self._split: Split = split or RevisionSplit(view, self._write_and_wait)
        self.id = uuid.uuid4().hex
        self._found: InferenceService | None = None
        """The service before this deployment, unless it was being deleted."""
        self._earlier: InferenceService | None = None
        """What to restore if this deployment fails."""
        self._watch: RevisionWatch | None = None

    def deploy(self, request: DeployRequest) -> Outcome:
        """Serve the model; return once it is served and no pod of another version is.

        Raises DeployError with the cause; the previous model is then served again. A service that this deployment
        created is deleted, any other is kept.
        """
        self._split.check()
        manifest = self._build_own(request)
        found, ready = self._view.get(), [pod for pod in self._view.pods() if pod.ready]
        if found and found.deleting:
            found, ready = None, []
        self._found = found
        written = False
        if found:
            self._refuse_foreign(found)
            if owners := found.body["metadata"].get("ownerReferences"):
                raise DeployError(
                    f"{found} is a canary: it belongs to {owners[0]['kind']} {owners[0]['name']}. Give the service "
                    "another name."
                )
            written = self._is_made_by(found, manifest)
        if found and written:
            if found.canary_percent is None and self._is_serving(found, request):
                self._split.end(wait=True)
                return Outcome(found, changed=False, previous_digest=request.model_digest)
            # Continue an interrupted attempt. Its annotations are in its pods: others would make new pods.
            manifest = with_traffic(found.body, percent_of(manifest))
        if found and found.canary_percent is None and found.mark[0] == _revision(manifest):
            request = replace(request, find_fault=None)  # what has all requests already is repaired, not judged
        others = [pod for pod in ready if found is None or mark_of(pod.annotations) != found.mark]
        answering = next(filter(None, (request_of(pod.annotations) for pod in others)), None)
        if found and found.canary_percent is None and len(others) < len(ready):
            answering = None  # its own pods respond; Knative keeps those of the previous revision for a while
        if found and (not written or found.canary_percent is not None):
            self._earlier = found
        elif answering:
            self._earlier = InferenceService(self._build(answering))
        previous_digest = found.model_digest if found and (found.ready or ready) else None
        if answering:
            previous_digest = answering.model_digest
        if found:
            self._split.prepare(wait=bool(ready))  # a service that does not answer loses nothing by an update
        try:
            service = self._roll_out(manifest, request, written)
        except ResourceFailedError as error:
            raise self._failure(request, error) from error
        except BaseException as error:
            with added_to(error, self._log):
                self._end_split(wait=False)
            if not isinstance(error, DeployError):
                with added_to(error, self._log):
                    self._put_back(wait=False)
            raise
        self._record(DEPLOYED, f"Model {request.model_digest} version {request.model_version} is served.")
        return Outcome(service, changed=True, previous_digest=previous_digest)

    def start(self, request: DeployRequest, owner: Mapping[str, str]) -> InferenceClient:
        """Serve the model as the candidate for another service, its owner. If it does not start, it is left as it is.

        Raises as `RevisionWatch.wait_until_serving` does.
        """
        manifest = with_traffic(self._build_own(request), None)
        manifest["metadata"]["ownerReferences"] = [owner]
        self._found = self._view.get()  # what an interrupted attempt left
        self._watch = RevisionWatch(self._view, self._write(manifest), request)
        return self._view.asking(self._watch.wait_until_serving(), False)

    def watch(self, seconds: float) -> None:
        """Return after this time. ResourceFailedError if a server of the started candidate fails meanwhile."""
        assert self._watch
        self._watch.keep_watching(seconds)

    def check(self) -> None:
        """Raises DeployError if a service with the candidate's name is not a candidate of this project."""
        if service := self._view.get():
            self._refuse_foreign(service)
            if not service.body["metadata"].get("ownerReferences"):
                raise DeployError(
                    f"{service} is not a canary: it belongs to no other service. Delete it, or give the service "
                    "another name."
                )

    def delete(self, *, wait: bool = True) -> bool:
        """Delete the service and wait until its pods are gone. False if there was none to delete."""
        service = self._view.get()
        if service is None:
            return False
        self._refuse_foreign(service)
        if wait:
            self._remove(service)
        else:
            self._client.delete(service)
        return True

    def _build_own(self, request: DeployRequest) -> dict[str, Any]:
        """The manifest, marked as written by this deployment."""
        manifest = self._build(request)
        manifest["metadata"]["annotations"][DEPLOYMENT_ANNOTATION] = self.id
        return manifest

    def _refuse_foreign(self, service: InferenceService) -> None:
        if REVISION_ANNOTATION not in service.annotations:
            raise DeployError(
                f"{service} exists and was not made by this project: it lacks the annotation {REVISION_ANNOTATION}. "
                "Delete it, or give the service another name."
            )

    def _is_made_by(self, current: InferenceService, manifest: Mapping[str, Any]) -> bool:
        """Whether writing the manifest would change only the traffic split, because nobody edited the spec."""
        if current.mark[0] != _revision(manifest):
            return False

        def compare() -> bool:
            latest = self._view.get()
            if latest is None or latest.mark != current.mark:
                return False
            wanted = self._client.replace(latest, with_traffic(manifest, None), dry_run=True)
            if wanted is None:  # KServe keeps writing the status
                raise NotYetError("it changed while it was compared")
            return with_traffic(wanted.body, None)["spec"] == with_traffic(latest.body, None)["spec"]

        if self._view.until("compared", self._view.limits.settle_timeout_seconds, compare):
            return True
        self._log.warning("%s: its spec was edited manually and is overwritten", current)
        return False

    def _is_serving(self, service: InferenceService, request: DeployRequest) -> bool:
        missing = service.find_missing(self._view.pods(), asleep=True)
        return missing is None and self._view.why_not_serving(service, request) is None

    def _roll_out(self, manifest: Mapping[str, Any], request: DeployRequest, written: bool) -> InferenceService:
        percent = percent_of(manifest)
        if self._found and self._found.canary_percent is not None and not written:
            # Until the new revision is ready, its requests go to the latest ready one: a canary that was not accepted.
            self._write_and_wait(with_traffic(manifest, 0), request)
        if self._found and request.find_fault and self._split.is_wanted(manifest):
            canary = self._split.start(manifest, request)
            part = f"{percent} %" if percent else "a copy"
            self._log.info("%s: model %s gets %s of the requests", self._view, request.model_digest, part)
            self._refuse_bad_canary(canary, request.find_fault, part)
        service = self._write_and_wait(with_traffic(manifest, None), request)
        try:
            self._split.end(wait=True)
        except DeployError as error:
            if self._found:  # the model is served; the next attempt only ends the split
                raise
            advice = "Correct the Gateway, or the setting of its name."
            raise ResourceFailedError(Diagnosis("route", str(error), advice, error.transient)) from error
        return service

    def _end_split(self, *, wait: bool) -> None:
        if self._found:  # otherwise there was no candidate
            self._split.end(wait=wait)

    def _refuse_bad_canary(
        self, canary: InferenceClient, find_fault: Callable[[InferenceClient], str | None], part: str
    ) -> None:
        transient = False
        try:
            fault = find_fault(canary)
        except ExplainedError as error:
            fault = f"it could not be judged: {error}"
            transient = isinstance(error, StoreError | DeployError) and error.transient
        self._split.confirm()
        if fault:
            summary = f"it was rejected with {part} of the requests: {fault}"
            advice = "Check that the server prepares images as training does; deploy another model meanwhile."
            raise ResourceFailedError(Diagnosis("canary", summary, advice, transient))

    def _write_and_wait(self, manifest: Mapping[str, Any], request: DeployRequest) -> InferenceService:
        return RevisionWatch(self._view, self._write(manifest), request).wait_until_serving()

    def _write(self, manifest: Mapping[str, Any]) -> InferenceService:
        """The stored service with the manifest's content. The write is repeated if there was no response."""

        def write() -> InferenceService:
            current = self._view.get()
            if current is None:
                stored = self._client.create(manifest)
            elif current.deleting:
                stored = None
            elif self._is_own(current):
                stored = self._client.replace(current, manifest)
            else:
                raise DeployError(
                    f"{current} was changed by someone else at the same time and left unchanged: it is set to serve "
                    f"model {current.model_digest}.",
                    transient=True,
                )
            if stored is None:
                raise NotYetError("it is being deleted, or changed by someone else at the same time")
            return stored

        return self._view.until("written", self._view.limits.settle_timeout_seconds, write)

    def _is_own(self, current: InferenceService) -> bool:
        """Whether this deployment found or wrote it as it is."""
        known = {each.mark for each in (self._found, self._earlier) if each}
        return current.mark[1] == self.id or current.mark in known

    def _failure(self, request: DeployRequest, error: ResourceFailedError) -> DeployError:
        """The error of an abandoned deployment, after restoring the previous service."""
        head = f"Model {request.model_digest} version {request.model_version} was not deployed to {self._view}: {error}"
        self._log.warning("%s", head)
        try:
            try:
                self._end_split(wait=True)
            except (DeployError, KubernetesError) as problem:
                head += f"\nThe canary was not withdrawn: {problem} Deploy the served model again to remove it."
            finally:
                end = self._put_back(wait=True)
        except (DeployError, KubernetesError) as problem:
            end = f"The previous service could not be restored: {problem} Deploy the earlier model again."
        self._record(DEPLOY_FAILED, head)
        return DeployError(f"{head}\n{end}", transient=error.transient)

    def _put_back(self, *, wait: bool) -> str:
        """Restore the previous service and describe the result. An interrupt leaves no time to `wait` for its pods."""
        seconds = self._view.limits.settle_timeout_seconds if wait else 0
        current, earlier = self._view.until("read", seconds, self._view.get, tolerated=ApiError), self._earlier
        if current is None or current.deleting or not self._is_own(current):
            return "The InferenceService was deleted or changed by someone else meanwhile and was left unchanged."
        if self._found is None and earlier is None:
            if wait:
                self._remove(current)
            else:
                self._client.delete(current)
            return "No model was served before, so the InferenceService was deleted."
        if earlier is None or (current.mark == earlier.mark and earlier.canary_percent is None):
            return "The InferenceService existed before this deployment and was left unchanged."
        name = f"model {earlier.model_digest} version {earlier.annotations.get(VERSION_ANNOTATION)}"
        # Knative sends requests to the latest ready revision. While the earlier one is recreated, that may be the
        # rejected one, so it gets no requests until then. An earlier canary stays without requests.
        was_canary = earlier.canary_percent is not None
        for percent in (0,) if was_canary else (0, None) if earlier.serverless else (None,):
            stored = self._write(with_traffic(earlier.body, percent))
            if not wait:
                return f"It was rolled back to {name}."
            try:
                self._view.until("put back", seconds, partial(self._find_settled, stored), tolerated=ApiError)
            except DeployError as error:
                return f"It was rolled back to {name}, which was not confirmed to be served in time: {error}"
        if was_canary:
            return f"It was rolled back to {name}, a canary without requests: all go to the previous revision."
        return f"It was rolled back to {name}, which is served as before."

    def _find_settled(self, stored: InferenceService) -> None:
        """Raises NotYetError until its revision, and no other, gets the requests meant for it."""
        if missing := self._view.unchanged(stored).find_missing(self._view.pods()):
            raise NotYetError(missing)

    def _remove(self, service: InferenceService) -> None:
        """Delete this service, but not another one with the same name; wait until it and its pods are gone."""

        def look() -> None:
            current, pods = self._view.get(), self._view.pods()
            if (current is None and not pods) or (current and current.uid != service.uid):
                return
            if current and not current.deleting:
                self._client.delete(current)
            raise NotYetError(", ".join([*([str(current)] if current else []), *(f"pod {pod.name}" for pod in pods)]))

        self._view.until("deleted", self._view.limits.settle_timeout_seconds, look)

    def _record(self, reason: str, message: str) -> None:
        try:
            self._client.record(self._view.namespace, self._view.name, reason, message)
        except KubernetesError as error:
            self._log.warning("%s: the outcome was not recorded as an event: %s", self._view, error)


def _revision(manifest: Mapping[str, Any]) -> str:
    """Digest of the model and of all settings."""
    return manifest["metadata"]["annotations"][REVISION_ANNOTATION]
