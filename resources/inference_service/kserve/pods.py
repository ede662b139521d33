"""What there is to know of a server's pod, read once from the API's object. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resources.inference_service.kserve.config import CONTAINER_NAME
from resources.inference_service.kserve.manifest import DEPLOYMENT_ANNOTATION, DIGEST_ANNOTATION, REVISION_ANNOTATION
from resources.kubernetes.pods import Container, Pod, read_pod

KNATIVE_REVISION_LABEL = "serving.knative.dev/revision"


@dataclass(frozen=True)
class ServingPod:
    """One replica of the server."""

    pod: Pod
    ready: bool
    """It gets requests."""
    annotations: Mapping[str, str]
    knative_revision: str | None

    @property
    def mark(self) -> tuple[str | None, str | None]:
        """Equals the mark of the service whose spec it was made from."""
        return self.annotations.get(REVISION_ANNOTATION), self.annotations.get(DEPLOYMENT_ANNOTATION)

    @property
    def model_digest(self) -> str | None:
        return self.annotations.get(DIGEST_ANNOTATION)

    @property
    def server(self) -> Container | None:
        """The model server's container; None before the kubelet has looked at the pod."""
        return next((container for container in self.pod.containers if container.name == CONTAINER_NAME), None)


def read_serving_pod(item: Any) -> ServingPod:
    """ServingPod from a V1Pod."""
    pod = read_pod(item, item.metadata.name)
    ready = any(c.type == "Ready" and c.status == "True" for c in item.status.conditions or ())
    return ServingPod(
        pod=pod,
        ready=ready and not pod.deleting,
        annotations=item.metadata.annotations or {},
        knative_revision=(item.metadata.labels or {}).get(KNATIVE_REVISION_LABEL),
    )
