"""The InferenceService in the API server: the state of its status and pods, and reading and writing it.

No Dagster, no waiting, no policy. Absence and conflict are values; other errors are as in `resources.kubernetes.api`.
"""

import copy
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from resources.inference_service.kserve.manifest import (
    DEPLOYMENT_ANNOTATION,
    DIGEST_ANNOTATION,
    GROUP,
    KIND,
    MODE_ANNOTATION,
    PLURAL,
    PREFIX,
    REVISION_ANNOTATION,
    VERSION,
)
from resources.kubernetes.api import CustomResource, CustomResourceClient
from resources.kubernetes.pods import Pod

DEPLOYED = "Deployed"
DEPLOY_FAILED = "DeployFailed"
"""Reasons of the events that record the outcome of deployments."""
_EVENT_SOURCE = "cifar-dagster"
_KNATIVE_REVISION_LABEL = "serving.knative.dev/revision"


def mark_of(annotations: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The purpose of a spec: digest of settings and model, id of the deploy call.

    KServe copies them from the service to its pods, so equal marks mean the same spec.
    """
    return annotations.get(REVISION_ANNOTATION), annotations.get(DEPLOYMENT_ANNOTATION)


class InferenceService(CustomResource):
    """A stored InferenceService."""

    kind = KIND

    @property
    def mark(self) -> tuple[str | None, str | None]:
        return mark_of(self.annotations)

    @property
    def model_digest(self) -> str | None:
        return self.annotations.get(DIGEST_ANNOTATION)

    @property
    def serverless(self) -> bool:
        return self.annotations.get(MODE_ANNOTATION) == "Knative"

    @property
    def canary_percent(self) -> int | None:
        """Percentage of the requests for its newest revision; None for all."""
        return self.body["spec"]["predictor"].get("canaryTrafficPercent")

    @property
    def status(self) -> Mapping[str, Any]:
        return self.body.get("status") or {}

    @property
    def _conditions(self) -> Sequence[Mapping[str, str]]:
        return self.status.get("conditions") or ()

    @property
    def ready(self) -> bool:
        """KServe's Ready condition, which may still be about an earlier generation."""
        return any(each.get("type") == "Ready" and each.get("status") == "True" for each in self._conditions)

    @property
    def complaints(self) -> list[str]:
        """The reasons in its conditions for not being ready."""
        return [
            f"{condition['type']}: {condition.get('reason', '')}: {condition['message']}"
            for condition in self._conditions
            if condition["type"] != "Ready" and condition.get("status") == "False" and condition.get("message")
        ]

    def is_as_written(self, stored: "InferenceService") -> bool:
        """Whether only its status differs from this earlier response of the API server."""
        return (self.uid, self.mark, self.body["spec"]) == (stored.uid, stored.mark, stored.body["spec"])

    def find_missing(self, pods: Sequence[Pod], *, asleep: bool = False) -> str | None:
        """What is missing until only its revision gets the requests meant for it; None if nothing is.

        With `asleep`, a serverless revision may have no pod. KServe's conditions are not sufficient: their generation
        is that of the Deployment or Knative service, so only the mark on the pods tells which spec they belong to.
        """
        found = self._missing_in_knative(pods, asleep) if self.serverless else self._missing_pods(pods)
        if found is None and not self.ready:
            return "; ".join(self.complaints) or "KServe does not report it as ready yet"
        return found

    def _missing_pods(self, pods: Sequence[Pod]) -> str | None:
        num_ready = sum(pod.ready for pod in pods if mark_of(pod.annotations) == self.mark)
        wanted = max(1, int(self.body["spec"]["predictor"].get("minReplicas") or 1))
        if num_ready < wanted:
            return f"{num_ready} of {wanted} new pods are ready"
        # Terminating pods still respond on open connections.
        num_others = sum(not pod.finished for pod in pods if mark_of(pod.annotations) != self.mark)
        return f"{num_others} pods of another version still exist" if num_others else None

    def _missing_in_knative(self, pods: Sequence[Pod], asleep: bool) -> str | None:
        predictor = (self.status.get("components") or {}).get("predictor") or {}
        created, latest = predictor.get("latestCreatedRevision"), predictor.get("latestReadyRevision")
        own = [pod for pod in pods if mark_of(pod.annotations) == self.mark]
        names = {pod.labels[_KNATIVE_REVISION_LABEL] for pod in own if _KNATIVE_REVISION_LABEL in pod.labels}
        if not names and not asleep:
            return "the new revision has no pod yet"
        if latest is None or latest != created or (names and latest not in names):
            return f"revision {created} is not ready; {latest or 'none'} is the latest ready one"
        percent = sum(
            target.get("percent") or 0
            for target in predictor.get("traffic") or ()
            if target.get("revisionName") == latest and target.get("latestRevision")
        )
        wanted = 100 if self.canary_percent is None else self.canary_percent
        return None if percent == wanted else f"revision {latest} gets {percent} % of the requests, not yet {wanted} %"


class InferenceServiceClient(CustomResourceClient[InferenceService]):
    """Reads and writes InferenceServices through injected API objects."""

    resource = InferenceService
    group, version, plural = GROUP, VERSION, PLURAL
    pod_label = "serving.kserve.io/inferenceservice"
    operator = "KServe"

    def replace(
        self, current: InferenceService, manifest: Mapping[str, Any], *, dry_run: bool = False
    ) -> InferenceService | None:
        """The service with the manifest's spec, labels and annotations; None if it changed or was deleted meanwhile.

        Annotations and labels of others are kept; ours that the manifest lacks are removed. With `dry_run` nothing is
        stored, and the result has the defaults of the API server and of KServe.
        """
        body = copy.deepcopy({key: value for key, value in current.body.items() if key != "status"})
        ours = (PREFIX, "serving.kserve.io/enable-tag-routing", "serving.kserve.io/autoscalerClass")
        theirs = {key: value for key, value in current.annotations.items() if not key.startswith(ours)}
        body["spec"] = copy.deepcopy(manifest["spec"])
        body["metadata"]["annotations"] = {**theirs, **manifest["metadata"]["annotations"]}
        body["metadata"]["labels"] = {**(body["metadata"].get("labels") or {}), **manifest["metadata"]["labels"]}
        options = {"dry_run": "All"} if dry_run else {}
        return self._object("replace", current.namespace, current.name, body, none_on=(404, 409), **options)

    def record(self, namespace: str, name: str, reason: str, message: str) -> None:
        """Record the outcome of a deployment as an Event of the service, for `kubectl describe` and `last_failure`."""
        service = self.get(namespace, name)
        involved = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "namespace": namespace, "name": name}
        event = {
            "metadata": {"generateName": f"{name}.", "namespace": namespace},
            "involvedObject": {**involved, "uid": service.uid} if service else involved,
            "reason": reason,
            "action": reason,
            "message": message[:1000],
            "type": "Warning" if reason == DEPLOY_FAILED else "Normal",
            "eventTime": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingComponent": _EVENT_SOURCE,
            "reportingInstance": _EVENT_SOURCE,
        }
        self._ask(f"record an event of {namespace}/{name}", self._core.create_namespaced_event, namespace, event)

    def last_failure(self, namespace: str, name: str) -> str | None:
        """Why the last deployment failed, as long as the cluster keeps events; None if it did not fail."""
        found = self._events(namespace, name, f"involvedObject.kind={KIND}")
        ours = [event for event in found if event.reporting_component == _EVENT_SOURCE and event.event_time]
        last = max(ours, key=lambda event: event.event_time, default=None)
        return last.message if last and last.reason == DEPLOY_FAILED else None
