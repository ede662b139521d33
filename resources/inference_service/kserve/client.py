"""A thin typed client of the InferenceService custom resource, its pods and events. No Dagster, no waiting, no policy.

Absence and conflict are values; everything else is as in `resources.kubernetes.api`.
"""

import copy
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    VERSION_ANNOTATION,
)
from resources.inference_service.kserve.pods import ServingPod, read_serving_pod
from resources.kubernetes.api import CustomResourceClient
from resources.kubernetes.errors import ApiRefusedError

SERVICE_LABEL = "serving.kserve.io/inferenceservice"
EVENT_SOURCE = "cifar-dagster"


@dataclass(frozen=True)
class InferenceService:
    """One stored InferenceService."""

    body: Mapping[str, Any]
    """As the API server gave it; not to be changed."""

    @property
    def name(self) -> str:
        return self.body["metadata"]["name"]

    @property
    def namespace(self) -> str:
        return self.body["metadata"]["namespace"]

    @property
    def uid(self) -> str:
        return self.body["metadata"]["uid"]

    @property
    def deleting(self) -> bool:
        return "deletionTimestamp" in self.body["metadata"]

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.body["metadata"].get("annotations") or {}

    @property
    def revision(self) -> str | None:
        """Mark of the settings and model it was written with; None for one that this package did not write."""
        return self.annotations.get(REVISION_ANNOTATION)

    @property
    def deployment_id(self) -> str | None:
        """Id of the deploy call that wrote its spec."""
        return self.annotations.get(DEPLOYMENT_ANNOTATION)

    @property
    def mark(self) -> tuple[str | None, str | None]:
        """What its pods carry as well: tells them from pods of an earlier spec."""
        return self.revision, self.deployment_id

    @property
    def model_digest(self) -> str | None:
        return self.annotations.get(DIGEST_ANNOTATION)

    @property
    def model_version(self) -> str | None:
        return self.annotations.get(VERSION_ANNOTATION)

    def is_as_written(self, stored: "InferenceService") -> bool:
        """Whether it still is what this earlier answer of the API server showed, except for its status."""
        return (self.uid, self.mark, self.body["spec"]) == (stored.uid, stored.mark, stored.body["spec"])

    @property
    def status(self) -> Mapping[str, Any]:
        return self.body.get("status") or {}

    @property
    def ready(self) -> bool:
        """KServe's own word, which may still be about an earlier generation."""
        return self._condition("Ready").get("status") == "True"

    @property
    def complaints(self) -> list[str]:
        """What its conditions give as reasons for not being ready."""
        found = [
            f"{condition['type']}: {condition.get('reason', '')}: {condition['message']}"
            for condition in self.status.get("conditions") or ()
            if condition.get("status") == "False" and condition.get("message")
        ]
        return [text for text in found if not text.startswith("Ready:")] or found

    @property
    def predictor(self) -> Mapping[str, Any]:
        return self.body["spec"]["predictor"]

    @property
    def canary_percent(self) -> int | None:
        """Share of the requests that its newest revision is to get; None for all."""
        return self.predictor.get("canaryTrafficPercent")

    @property
    def serverless(self) -> bool:
        return self.annotations.get(MODE_ANNOTATION) == "Knative"

    @property
    def predictor_status(self) -> Mapping[str, Any]:
        return (self.status.get("components") or {}).get("predictor") or {}

    def _condition(self, kind: str) -> Mapping[str, Any]:
        conditions = self.status.get("conditions") or ()
        return next((condition for condition in conditions if condition.get("type") == kind), {})

    def __str__(self) -> str:
        return f"InferenceService {self.namespace}/{self.name}"


@dataclass(frozen=True)
class Event:
    """Something that this package said about an InferenceService."""

    reason: str
    message: str
    at: str
    """ISO time in UTC, so that text order is time order."""


class InferenceServiceClient(CustomResourceClient[InferenceService]):
    """Reads and writes InferenceServices through injected API objects."""

    kind = KIND
    group = GROUP
    version = VERSION
    plural = PLURAL
    missing_kind_advice = "install KServe and its CRDs."
    forbidden_advice = "Give the service account the Role of docs/kubernetes.md, or check the namespace's quota."
    invalid_advice = "Correct the service's settings."

    def parse(self, body: Mapping[str, Any]) -> InferenceService:
        return InferenceService(body)

    def replace(
        self, current: InferenceService, manifest: Mapping[str, Any], *, dry_run: bool = False
    ) -> InferenceService | None:
        """The service with the manifest's spec, labels and annotations; None when it changed or was deleted meanwhile.

        Annotations and labels of others stay, ours that the manifest lacks are removed. With `dry_run` nothing is
        stored, and the answer shows what would be, with the defaults of the API server and of KServe.
        """
        body = copy.deepcopy(dict(current.body))
        body.pop("status", None)
        body["spec"] = copy.deepcopy(manifest["spec"])
        theirs = {key: value for key, value in current.annotations.items() if not _is_ours(key)}
        body["metadata"]["annotations"] = {**theirs, **manifest["metadata"]["annotations"]}
        body["metadata"]["labels"] = {**(body["metadata"].get("labels") or {}), **manifest["metadata"]["labels"]}
        options = {"dry_run": "All"} if dry_run else {}
        return self._object("replace", current.namespace, current.name, body, none_on=(404, 409), **options)

    def pods(self, namespace: str, name: str) -> list[ServingPod]:
        """Pods of the service of that name by name, also those that are ending."""
        found = self._pods_with(f"{KIND} {namespace}/{name}", namespace, f"{SERVICE_LABEL}={name}")
        return sorted((read_serving_pod(item) for item in found), key=lambda pod: pod.pod.name)

    def record(self, namespace: str, name: str, *, reason: str, message: str, warning: bool, uid: str | None) -> None:
        """Say something about the service as an Event, for `kubectl describe` and `events`, if that is allowed."""
        now = datetime.now(UTC)
        involved = {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "namespace": namespace, "name": name}
        event = {
            "metadata": {"name": f"{name}.{uuid.uuid4().hex[:16]}", "namespace": namespace},
            "involvedObject": {**involved, **({"uid": uid} if uid else {})},
            "reason": reason,
            "message": message[:1000],
            "type": "Warning" if warning else "Normal",
            "source": {"component": EVENT_SOURCE},
            "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "firstTimestamp": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "lastTimestamp": now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "count": 1,
            "action": reason,
            "reportingComponent": EVENT_SOURCE,
            "reportingInstance": EVENT_SOURCE,
        }
        try:
            self._ask(
                f"record an event of {namespace}/{name}",
                self._core.create_namespaced_event,
                namespace,
                event,
                none_on=(409,),
            )
        except ApiRefusedError:
            return

    def events(self, namespace: str, name: str) -> Sequence[Event]:
        """What `record` said of the service, oldest first, as far as the cluster still knows and may be asked."""
        found = self._events(namespace, name, f"involvedObject.kind={KIND}")
        ours = [event for event in found if event.reporting_component == EVENT_SOURCE and event.event_time]
        told = [Event(event.reason, event.message, event.event_time.isoformat()) for event in ours]
        return sorted(told, key=lambda event: event.at)


def _is_ours(key: str) -> bool:
    return key.startswith((PREFIX, "serving.kserve.io/enable-tag-routing", "serving.kserve.io/autoscalerClass"))
