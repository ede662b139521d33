"""A store with a few generations of data and models, all of them old."""

import io
import os
import time
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
from PIL import Image

from cifar_assets.data_set import default_data_set
from cifar_assets.dataset.stores import Stores, stores_below
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.prune.rules import Policy, Removal
from cifar_assets.prune.run import prune
from cifar_assets.settings import read_settings
from resources.inference_service import InferenceServiceResource, ServiceStatus
from resources.inference_service.local.resource import LocalInferenceService
from resources.mlflow.resource import LocalMlflow
from resources.object_store import FolderStore
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.models import store_model
from tests.fixtures.tiny_data import write_drawn_images

NUM_GENERATIONS = 5
KEPT = 2


class Serving(LocalInferenceService):
    """A fake of the service's status, which is all that pruning reads."""

    server_module: str = "none"
    digest: str | None = None

    def status(self) -> ServiceStatus:
        return ServiceStatus(self.digest is not None, None, self.digest, None, None)


@dataclass(frozen=True)
class Generation:
    """The data and the model of one retraining."""

    raw: str
    processed: str
    model: str


@dataclass
class World:
    folder: Path
    stores: Stores
    generations: list[Generation]
    instance: dg.DagsterInstance
    mlflow: LocalMlflow
    lines: list[str]

    def prune(
        self, apply: bool = True, serving: InferenceServiceResource | None = None, **policy: object
    ) -> list[Removal]:
        self.lines.clear()
        wanted = Policy.model_validate({"keep_versions": KEPT, **policy})
        resource = LocalObjectStore(path=str(self.folder / "store"))
        return prune(
            default_data_set(read_settings()),
            wanted,
            self.instance,
            resource,
            self.mlflow,
            serving or Serving(),
            apply=apply,
            say=self.lines.append,
        )

    def all_keys(self) -> set[str]:
        return {info.key for info in FolderStore(self.folder / "store").list()}

    def grow_old(self) -> None:
        two_days_ago = time.time() - 2 * 86_400
        for path in (self.folder / "store").rglob("*"):
            os.utime(path, (two_days_ago, two_days_ago))

    def build(self) -> Generation:
        """Build the data with the current landing zone, and a model of it."""
        raw = build_raw_version(self.stores.raw, str(self.folder / "source")).digest
        processed = build_processed(self.stores.raw, self.stores.processed, raw).digest
        model = store_model(self.stores.models, dataset=processed, raw=raw, weights=processed.encode())
        return Generation(raw, processed, model)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    image = np.random.RandomState(number).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("cifar_assets.dataset.landing.zone.SETTLED_SECONDS", -1.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "source").mkdir()
    write_drawn_images(tmp_path / "source", 60, 20)
    stores = stores_below(FolderStore(tmp_path / "store"))
    (tmp_path / "dagster").mkdir()
    instance = dg.DagsterInstance.local_temp(str(tmp_path / "dagster"))
    world = World(tmp_path, stores, [], instance, LocalMlflow(path=str(tmp_path / "mlflow")), [])
    for number in range(NUM_GENERATIONS):
        stores.raw.write(f"landing/cat/{number}.png", png(number))
        generation = world.build()
        world.generations.append(generation)
        for store, key in (
            (stores.raw, f"versions/{generation.raw}/manifest.json"),
            (stores.processed, f"{generation.processed}/manifest.json"),
            (stores.models, f"{generation.model}/manifest.json"),
        ):
            path = store.local_path(key)
            assert path is not None
            # in order, however coarse the clock of the file system is
            os.utime(path, (number, number))
    for path in (tmp_path / "store").rglob("*"):
        if path.name != "manifest.json":
            os.utime(path, (0, 0))
    return world
