import io
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torchvision.models import resnet18

from cifar_assets.contracts import CLASSES
from cifar_assets.model_package import RECIPE_FILE, WEIGHTS_FILE, ModelManifest
from cifar_assets.training.export import (
    load_classifier,
    onnx_bytes,
    onnx_difference,
    seed_copy_bytes,
    weights_bytes,
)
from cifar_assets.training.networks import Classifier, ResNet18, build_network
from cifar_assets.training.recipes import RECIPES, Views, get_recipe
from resources.digests import canonical_json, sha256_bytes
from resources.errors import DataError, IntegrityError
from resources.object_store import FolderStore

IMAGES = np.random.RandomState(0).randint(0, 256, (5, 3, 32, 32)).astype(np.uint8)


def make_classifier(recipe: str = "resnet18", views: Views = "plain") -> Classifier:
    torch.manual_seed(0)
    network = build_network(get_recipe(recipe, {"width": 4}))
    return Classifier(network, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), views).eval()


def torch_logits(classifier: Classifier) -> np.ndarray:
    with torch.no_grad():
        return classifier(torch.from_numpy(IMAGES)).numpy()


@pytest.mark.parametrize("views", ["plain", "mirrored", "six"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_onnx_answers_as_torch_does(recipe: str, views: Views):
    classifier = make_classifier(recipe, views)
    assert onnx_difference(onnx_bytes(classifier), IMAGES, torch_logits(classifier)) < 1e-4


def test_the_onnx_model_is_what_serving_expects():
    session = onnxruntime.InferenceSession(onnx_bytes(make_classifier()), providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert (logits.name, logits.type) == ("logits", "tensor(float)")
    for count in (1, 4):
        answer = session.run(None, {"images": IMAGES[:count]})[0]
        assert np.asarray(answer).shape == (count, len(CLASSES))


def test_exports_repeat_to_the_byte_and_tell_nothing_of_the_machine():
    first, second = onnx_bytes(make_classifier()), onnx_bytes(make_classifier())
    assert first == second
    assert weights_bytes(make_classifier()) == weights_bytes(make_classifier())
    model = onnx.load_from_string(first)
    texts = [model.doc_string, *(node.doc_string for node in model.graph.node)]
    assert set(texts) == {""}
    assert str(Path.cwd()).encode() not in first


def test_an_onnx_model_of_other_weights_is_refused():
    other = make_classifier()
    with torch.no_grad():
        other.network.state_dict()["fc.bias"].add_(1.0)
    with pytest.raises(DataError, match="differs from torch"):
        onnx_difference(onnx_bytes(other), IMAGES, torch_logits(make_classifier()))


def test_an_onnx_model_whose_output_is_not_finite_is_refused():
    classifier = make_classifier()
    with torch.no_grad():
        classifier.network.state_dict()["fc.bias"].fill_(float("inf"))
    with pytest.raises(DataError, match="ONNX model's output is not finite"):
        onnx_difference(onnx_bytes(classifier), IMAGES, torch_logits(make_classifier()))


def test_the_seeds_copy_is_a_plain_state_dict():
    classifier = Classifier(ResNet18(imagenet_stem=True), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    loaded = torch.load(io.BytesIO(seed_copy_bytes(classifier)), weights_only=True)
    theirs = resnet18(num_classes=10)
    theirs.load_state_dict(loaded)
    assert set(loaded) == set(theirs.state_dict())


@pytest.fixture
def package(tmp_path: Path) -> tuple[FolderStore, ModelManifest]:
    store = FolderStore(tmp_path)
    files = {
        WEIGHTS_FILE: weights_bytes(make_classifier()),
        RECIPE_FILE: canonical_json(get_recipe("resnet18", {"width": 4}).model_dump(mode="json")),
    }
    for name, data in files.items():
        store.write(name, data)
    digests = {name: sha256_bytes(data) for name, data in files.items()}
    return store, ModelManifest(dataset_digest="d", raw_digest="r", seed=0, classes=CLASSES, files=digests)


def test_a_stored_model_is_loaded_back(package: tuple[FolderStore, ModelManifest]):
    with torch.no_grad():
        logits = load_classifier(*package)(torch.from_numpy(IMAGES)).numpy()
    assert np.array_equal(logits, torch_logits(make_classifier(views="mirrored")))


def test_changed_weights_are_refused(package: tuple[FolderStore, ModelManifest]):
    store, manifest = package
    data = store.read(WEIGHTS_FILE)
    store.write(WEIGHTS_FILE, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=WEIGHTS_FILE):
        load_classifier(store, manifest)
