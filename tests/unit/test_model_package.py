"""Storing a model under its digest, once and again."""

from pathlib import Path

import pytest

from cifar_assets.contracts import CLASSES
from cifar_assets.model_package import (
    MANIFEST_FILE,
    PERFORMANCE_FILE,
    WEIGHTS_FILE,
    ModelManifest,
    read_file,
    read_manifest,
    write_package,
)
from resources.digests import sha256_bytes
from resources.errors import IntegrityError
from resources.object_store import FolderStore

WEIGHTS = b"weights"
MANIFEST = ModelManifest(
    dataset_digest="d", raw_digest="r", seed=0, classes=CLASSES, files={WEIGHTS_FILE: sha256_bytes(WEIGHTS)}
)


@pytest.mark.parametrize("damaged", [WEIGHTS_FILE, MANIFEST_FILE])
def test_training_the_same_model_again_repairs_it(damaged: str, tmp_path: Path) -> None:
    models = FolderStore(tmp_path)
    digest = write_package(models, MANIFEST, {WEIGHTS_FILE: WEIGHTS, PERFORMANCE_FILE: b"first"})
    package = models.at(digest)
    assert write_package(models, MANIFEST, {WEIGHTS_FILE: WEIGHTS, PERFORMANCE_FILE: b"another run's"}) == digest
    assert package.read(PERFORMANCE_FILE) == b"first"
    package.delete(PERFORMANCE_FILE)
    write_package(models, MANIFEST, {WEIGHTS_FILE: WEIGHTS, PERFORMANCE_FILE: b"restored"})
    assert package.read(PERFORMANCE_FILE) == b"restored"
    package.write(damaged, b"damaged")
    with pytest.raises(IntegrityError, match="materialize its asset again"):
        read_file(package, read_manifest(package, digest), WEIGHTS_FILE)
    assert write_package(models, MANIFEST, {WEIGHTS_FILE: WEIGHTS, PERFORMANCE_FILE: b"second"}) == digest
    assert read_file(package, read_manifest(package, digest), WEIGHTS_FILE) == WEIGHTS
    assert package.read(PERFORMANCE_FILE) == b"second"
