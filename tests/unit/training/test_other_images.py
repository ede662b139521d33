"""A dataset with other classes and another image size, from its manifest to the served model's answers."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_assets.contracts import ImageSpec
from cifar_assets.model_package import CARD_FILE, METRICS_FILE, SBOM_FILE, read_json, write_package
from cifar_assets.training.networks import PublishedNetwork
from cifar_assets.training.package import build_package
from resources.object_store import FolderStore
from tests.unit.serving.server_process import run_server
from tests.unit.training.conftest import SpecMaker
from tests.unit.training.small_dataset import store_dataset
from tests.unit.training.test_loop import make_trainer

SHAPES = ImageSpec(classes=("disc", "ring", "star"), image_size=16)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("resnet18", {"cutout": 4}),
        ("fast", {}),
    ],
)
def test_three_classes_at_16_pixels_are_trained_and_served(
    make_spec: SpecMaker, tmp_path: Path, recipe: str, overrides: dict[str, object]
) -> None:
    digest = store_dataset(tmp_path / "data", images=SHAPES)
    uri = FolderStore(tmp_path / "data").uri(f"{digest}/")
    given = {"data_set": "shapes", "dataset_uri": uri, "dataset_digest": digest}
    trainer = make_trainer(make_spec(recipe, given, epochs=2, **overrides))
    records = []
    trainer.train(records.append)
    assert records[-1].resolution == 16
    statistics = trainer.data.manifest
    network = PublishedNetwork(trainer.published(), statistics.mean, statistics.std)
    manifest, files = build_package(trainer, network)
    assert (manifest.classes, manifest.image_size) == (SHAPES.classes, 16)
    card = files[CARD_FILE].decode()
    assert card.startswith("# Classifier of the data set `shapes`, recipe")
    assert "16x16 color images into 3 classes" in card
    assert json.loads(files[SBOM_FILE])["metadata"]["component"]["name"] == "shapes"
    models = FolderStore(tmp_path / "models")
    package = models.at(write_package(models, manifest, files))
    metrics = read_json(package, manifest, METRICS_FILE)
    assert list(metrics["per_class_recall"]) == list(SHAPES.classes)
    assert np.shape(metrics["confusion_matrix"]) == (3, 3)
    with run_server(package.uri(), manifest.digest, tmp_path) as server:
        described = server.get("/v2/models/cifar10").json
        assert described["inputs"][0]["shape"] == [-1, 3, 16, 16]
        assert {tuple(output["shape"]) for output in described["outputs"]} == {(-1, 3)}
        pixels = trainer.data.test.images(np.array([0]))[0].permute(1, 2, 0).numpy()
        picture = io.BytesIO()
        Image.fromarray(pixels).save(picture, "PNG")
        instances = [pixels.tolist(), base64.b64encode(picture.getvalue()).decode()]
        first, second = server.post("/v1/models/cifar10:predict", {"instances": instances}).json["predictions"]
        assert first == second
        assert list(first["probabilities"]) == list(SHAPES.classes)
        refused = server.post("/v1/models/cifar10:predict", {"instances": [np.zeros((32, 32, 3), int).tolist()]})
        assert (refused.status, refused.json["expected"]) == (400, "an array of shape [16, 16, 3] or [3, 16, 16]")
