from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cifar_assets.training.recipes import get_recipe
from cifar_assets.training.spec import JobSpec
from resources.object_store import FolderStore
from tests.unit.training.small_dataset import store_dataset

SpecMaker = Callable[..., JobSpec]

PROGRESSIVE = {
    "resolutions": [{"start": 0, "size": 16}, {"start": 0.5, "size": 24}, {"start": 0.75, "size": 32}],
    "cutout": 8,
}
"""Fields in a combination that no recipe has: two changes of the image size, and cutout."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a small processed dataset."""
    bucket = tmp_path_factory.mktemp("processed-data")
    return FolderStore(bucket).uri(store_dataset(bucket) + "/")


@pytest.fixture
def make_spec(dataset: str, tmp_path: Path) -> SpecMaker:
    """Makes the spec of a short training. Keywords are fields of the recipe; `spec` has fields of the spec.

    Beside the recipes there is one named progressive.
    """

    def make(recipe: str = "resnet18", spec: dict | None = None, **overrides: object) -> JobSpec:
        small = {"width": 4, "epochs": 3, "batch_size": 16, "precision": "float32"}
        if recipe == "progressive":
            recipe, small = "good", small | PROGRESSIVE
        values = {
            "dataset_uri": dataset,
            "dataset_digest": dataset.rstrip("/").rpartition("/")[2],
            "recipe": get_recipe(recipe, {**small, **overrides}),
            "seed": 3,
            "output_uri": FolderStore(tmp_path / "models").uri(),
            "execution": {"threads": 1, "device": "cpu"},
        }
        return JobSpec.model_validate(values | (spec or {}))

    return make
