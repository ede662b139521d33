"""Whether a canary answers held-out images as well as the stored model was evaluated."""

from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.model_package import METRICS_FILE, read_json, read_manifest
from cifar_assets.serving.comparison import compare_answers
from resources.inference_service.client import ServerError
from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.client import InferenceService
from resources.inference_service.kserve.endpoint import ServiceEndpoint
from resources.object_store.resource import ObjectStoreResource


class HeldOutImages:
    """Asks the newest revision about test images of the dataset that the model was trained on."""

    def __init__(self, endpoint: ServiceEndpoint, object_store: ObjectStoreResource, num_images: int):
        self._endpoint = endpoint
        self._object_store = object_store
        self._num_images = num_images

    def find_fault(self, service: InferenceService, request: DeployRequest) -> str | None:
        """Why the canary may not have all requests; None when it may."""
        package = self._object_store.models.at(request.model_digest)
        manifest = read_manifest(package, request.model_digest)
        expected = float(read_json(package, manifest, METRICS_FILE)["test_accuracy"])
        test = open_split(self._object_store.processed, manifest.dataset_digest, "test")
        try:
            found = compare_answers(self._endpoint.client(service, canary=True), test, expected, self._num_images)
        except ServerError as error:
            return str(error)
        if found.model_digest != request.model_digest:
            return f"the canary's address answers with model {found.model_digest}"
        return None if found.passed else str(found)
