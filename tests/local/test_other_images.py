"""Class folders of other classes and sizes: imported, processed, trained, and served."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifar_assets.contracts import ImageRequest
from cifar_assets.dataset.stores import stores_below
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.model_package import write_package
from cifar_assets.training.networks import PublishedNetwork
from cifar_assets.training.package import build_package
from cifar_assets.training.spec import build_spec
from resources.object_store import FolderStore
from tests.unit.serving.server_process import run_server
from tests.unit.training.test_loop import make_trainer


def write_pictures(folder: Path, classes: int, size: tuple[int, int], mode: str) -> None:
    """Pictures with a bar whose place, direction and brightness tell the class."""
    random = np.random.RandomState(0)
    for split, count in {"train": 6, "val": 2, "test": 2}.items():
        for label in range(classes):
            for number in range(count):
                pixels = random.randint(0, 40, (size[1], size[0], 3))
                row = size[1] * (label % 7) // 7
                pixels[row : row + size[1] // 7] += 40 + 25 * (label // 7 % 8)
                pixels[:, size[0] * (label % 5) // 5][:, label % 3] = 255
                path = folder / split / f"kind {label:03d}" / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path, quality=95)


@pytest.mark.parametrize(
    ("classes", "size", "mode", "wanted", "expected"),
    [
        (3, (28, 28), "L", {}, 28),
        (37, (80, 60), "RGB", {"fit": "pad"}, 64),
        (200, (32, 32), "RGB", {}, 32),
        (3, (96, 64), "RGB", {"image_size": 224}, 224),
    ],
)
def test_from_pictures_to_answers(
    classes: int, size: tuple[int, int], mode: str, wanted: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    source = tmp_path / "mine"
    write_pictures(source, classes, size, mode)
    stores = stores_below(FolderStore(tmp_path / "store"))
    raw = build_raw_version(stores.raw, str(source), ImageRequest(**wanted))
    digest = build_processed(stores.raw, stores.processed, raw.digest).digest
    overrides = {"epochs": 1, "width": 4, "batch_size": 64, "precision": "float32"}
    spec = build_spec(
        *(stores.processed, stores.models, digest),
        recipe="quick",
        overrides=overrides,
        execution={"threads": 1, "device": "cpu"},
        seed=0,
        mlflow=None,
    )
    spec.check_dataset(stores.processed)
    trainer = make_trainer(spec)
    trainer.train(lambda _: None)
    statistics = trainer.data.manifest
    network = PublishedNetwork(trainer.published(), statistics.mean, statistics.std, spec.recipe.views)
    manifest, files = build_package(trainer, network)
    names = tuple(f"kind {label:03d}" for label in range(classes))
    assert (manifest.classes, manifest.image_size, manifest.fit) == (names, expected, wanted.get("fit", "crop"))
    package = stores.models.at(write_package(stores.models, manifest, files))
    prepared = trainer.data.test.images(np.array([0]))[0].permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(prepared).save(buffer, "PNG")
    (path,) = (source / "test").glob("kind 000/0.jpg")
    pictures = [base64.b64encode(data).decode() for data in (buffer.getvalue(), path.read_bytes())]
    with run_server(package.uri(), manifest.digest, tmp_path) as server:
        answer = server.post("/v1/models/cifar10:predict", {"instances": [prepared.tolist(), *pictures]}).json
    pixels, as_prepared, as_it_was = answer["predictions"]
    assert pixels == as_prepared
    if expected in size:
        assert as_it_was == pixels
    else:  # ImageNet-sized requests are prepared as the training's pictures were
        assert as_it_was["probabilities"] == pytest.approx(pixels["probabilities"], abs=1e-4)
    assert set(pixels["probabilities"]) <= set(names)
