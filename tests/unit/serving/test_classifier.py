"""Loading: only the model that was asked for, and only one that can be served."""

import json
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from cifar_assets.contracts import CLASSES
from cifar_assets.model_package import MANIFEST_FILE, ONNX_FILE, SERVED_FILES, ModelManifest, write_package
from cifar_assets.serving.classifier import Classifier, load_classifier
from cifar_assets.serving.settings import ServingLimits
from resources.digests import sha256_bytes
from resources.errors import DataError, IntegrityError, ObjectNotFoundError
from resources.object_store import FolderStore
from tests.unit.serving.tiny_model import store_tiny_model, tiny_logits, tiny_onnx


def load(uri: str, digest: str) -> Classifier:
    return load_classifier(uri, digest, num_threads=1, batch_images=4)


def test_the_stored_model_answers_as_it_should(tmp_path) -> None:
    uri, digest = store_tiny_model(FolderStore(tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    classifier = load_classifier(uri, digest, num_threads=2, batch_images=4)
    for is_alone in (True, False):
        np.testing.assert_allclose(classifier.run(images, is_alone), tiny_logits(images), rtol=1e-3, atol=1e-3)


def test_the_int8_model_is_served_if_the_package_has_one(tmp_path) -> None:
    store, images = FolderStore(tmp_path), np.zeros((1, 3, 32, 32), np.uint8)
    uri, digest = store_tiny_model(store, int8=tiny_onnx(bias=5.0))
    runs = [load_classifier(uri, digest, each, num_threads=1, batch_images=4).run(images) for each in SERVED_FILES]
    np.testing.assert_allclose(runs[1] - runs[0], 5.0)
    uri, digest = store_tiny_model(store)
    with pytest.raises(DataError, match=r"has no model\.int8\.onnx"):
        load_classifier(uri, digest, "int8", num_threads=1, batch_images=4)


def test_another_digest_is_refused(tmp_path) -> None:
    uri, _ = store_tiny_model(FolderStore(tmp_path))
    with pytest.raises(IntegrityError, match="expected sha256 0000"):
        load(uri, "0" * 64)


def test_a_missing_model_is_refused(tmp_path) -> None:
    with pytest.raises(ObjectNotFoundError, match=MANIFEST_FILE):
        load((tmp_path / "nothing").as_uri(), "0" * 64)


def test_a_file_changed_after_it_was_stored_is_refused(tmp_path) -> None:
    store = FolderStore(tmp_path)
    uri, digest = store_tiny_model(store)
    store.at(digest).write(ONNX_FILE, tiny_onnx(seed=1))
    with pytest.raises(IntegrityError, match=ONNX_FILE):
        load(uri, digest)


@pytest.mark.parametrize("onnx_bytes", [b"", b"not a model", tiny_onnx()[:500]])
def test_a_file_that_is_not_a_model_is_refused(tmp_path, onnx_bytes) -> None:
    uri, digest = store_tiny_model(FolderStore(tmp_path), onnx_bytes=onnx_bytes)
    with pytest.raises(DataError, match=r"model\.onnx does not load in ONNX Runtime"):
        load(uri, digest)


def test_a_model_with_other_inputs_or_outputs_is_refused(tmp_path) -> None:
    model = onnx.load_from_string(tiny_onnx())
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 7]))
    renamed = onnx.load_from_string(tiny_onnx())
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "pixels"
    for index, changed in enumerate((model, renamed)):
        uri, digest = store_tiny_model(FolderStore(tmp_path / str(index)), onnx_bytes=changed.SerializeToString())
        with pytest.raises(DataError, match=r"expected inputs and outputs"):
            load(uri, digest)


def test_a_model_that_answers_with_nothing_finite_is_refused(tmp_path) -> None:
    uri, digest = store_tiny_model(FolderStore(tmp_path), onnx_bytes=tiny_onnx(bias=float("nan")))
    with pytest.raises(DataError, match="finite"):
        load(uri, digest)


def test_a_manifest_without_an_image_size_is_of_cifar10(tmp_path) -> None:
    """CIFAR-10's own manifests name none, so that their digests are those of earlier releases."""
    store = FolderStore(tmp_path)
    uri, digest = store_tiny_model(store)
    assert "image_size" not in json.loads(store.at(digest).read(MANIFEST_FILE))
    assert load(uri, digest).manifest.image_shape == (3, 32, 32)


@pytest.mark.parametrize("changes", [{"classes": CLASSES[:9]}, {"image_size": 16}])
def test_a_model_unlike_its_manifest_is_refused(tmp_path, changes: dict[str, Any]) -> None:
    store = FolderStore(tmp_path)
    data = {ONNX_FILE: tiny_onnx()}
    files = {ONNX_FILE: sha256_bytes(data[ONNX_FILE])}
    values = {"dataset_digest": "d", "raw_digest": "e", "seed": 0, "classes": CLASSES, "files": files, **changes}
    digest = write_package(store, ModelManifest.model_validate(values), data)
    with pytest.raises(DataError, match="expected inputs and outputs"):
        load(store.at(digest).uri(), digest)


def test_the_limits_are_consistent() -> None:
    limits = ServingLimits()
    assert limits.batch_images <= limits.max_images <= limits.queue_images
    assert limits.image.max_bytes * 4 / 3 < limits.max_body_bytes <= limits.max_pending_bytes
    assert ServingLimits(max_images=1).max_json_items(32) < limits.max_json_items(32)
