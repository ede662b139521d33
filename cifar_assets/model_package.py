"""A trained model as stored: a folder of files under `models/<digest>/`, named by the digest of its manifest."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from cifar_assets.contracts import ImageSpec
from cifar_assets.manifest import Manifest
from resources.digests import sha256_bytes
from resources.errors import DataError, IntegrityError, ObjectNotFoundError
from resources.model_signature import SIGNATURE_FILE, public_key_of, sign, verify
from resources.object_store import ObjectStore

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"
ONNX_FILE = "model.onnx"
INT8_FILE = "model.int8.onnx"
METRICS_FILE = "metrics.json"
RECIPE_FILE = "recipe.json"
PERFORMANCE_FILE = "performance.json"
ENVIRONMENT_FILE = "environment.json"
CARD_FILE = "MODEL_CARD.md"
SBOM_FILE = "sbom.cdx.json"
LOG_FILE = "training.log"

IDENTITY_FILES = (WEIGHTS_FILE, ONNX_FILE, INT8_FILE, METRICS_FILE, RECIPE_FILE)
"""Files the digest covers. Files that differ between identical trainings (timings, log) are stored beside them.

The int8 model is covered because it may be served: quantizing is deterministic, so identical trainings still give
identical digests. Models of earlier releases have none.
"""

UNSIGNED_FILES = (PERFORMANCE_FILE, LOG_FILE)
"""Files that a signature does not cover: a training may still write them after it has published the model."""

ServedPrecision = Literal["float32", "int8"]
WantedPrecision = Literal["auto", ServedPrecision]
SERVED_FILES: Mapping[ServedPrecision, str] = {"float32": ONNX_FILE, "int8": INT8_FILE}


class ModelManifest(Manifest, ImageSpec):
    """What a model is made of."""

    added_fields = (*ImageSpec.added_fields, "start_weights", "start_model")
    kind: Literal["cifar10-model/1"] = "cifar10-model/1"
    dataset_digest: str = Field(description="Digest of the processed dataset it was trained on.")
    raw_digest: str = Field(description="Digest of the raw dataset that it was processed from.")
    seed: int
    start_weights: str | None = Field(
        default=None, description="sha256 of the file of weights that its training started from; none if random."
    )
    start_model: str | None = Field(default=None, description="Digest of the model that the file is of, if it is.")
    files: dict[str, str] = Field(description="sha256 of each file the digest covers, by name.")


def read_manifest(package: ObjectStore, digest: str) -> ModelManifest:
    """The manifest of the model stored at the package's root. Raises as `Manifest.read` does."""
    missing = f"There is no model in {package.uri()}: it has no {MANIFEST_FILE}."
    return ModelManifest.read(package, MANIFEST_FILE, digest, missing)


def read_file(package: ObjectStore, manifest: ModelManifest, name: str) -> bytes:
    """The bytes of a covered file, verified against the manifest."""
    return package.read_verified(name, manifest.files[name])


def verify_package(package: ObjectStore, digest: str, public_keys: str) -> None:
    """Raise IntegrityError unless one of the keys signed the model at the package's root as it is stored."""
    signed = verify(package, UNSIGNED_FILES, public_keys)
    if signed.get(MANIFEST_FILE) != digest:
        raise IntegrityError(f"{package.uri(SIGNATURE_FILE)} is not of model {digest}. Train the model again.")


def write_package(
    models: ObjectStore, manifest: ModelManifest, files: dict[str, bytes], signing_key: str | None = None
) -> str:
    """Store a model under its digest, which is returned. The manifest is written last and makes the package exist.

    `files` holds every covered file and any uncovered ones. An intact model is only completed with missing files; a
    damaged one is written again, and so is one without a valid signature by the key.
    """
    digest = manifest.digest
    package = models.at(digest)
    for name, sha256 in manifest.files.items():
        if sha256_bytes(files[name]) != sha256:
            raise DataError(f"{name} does not have the digest its manifest gives.")
    whole = is_whole(package, digest)
    signed = whole and signing_key is not None and _is_signed(package, digest, signing_key)
    for name, data in files.items():
        if not (signed or (whole and not signing_key and package.exists(name))):
            package.write(name, data)
    if signing_key and not signed:
        covered = {**files, MANIFEST_FILE: manifest.to_bytes()}
        package.write(SIGNATURE_FILE, sign(digest, covered, UNSIGNED_FILES, signing_key))
    manifest.write(package, MANIFEST_FILE)  # even if intact: it counts as new again
    return digest


def is_whole(package: ObjectStore, digest: str) -> bool:
    """Whether the model is stored with every covered file unchanged."""
    try:
        manifest = read_manifest(package, digest)
        for name in manifest.files:
            read_file(package, manifest, name)
    except (DataError, ObjectNotFoundError):
        return False
    return True


def _is_signed(package: ObjectStore, digest: str, signing_key: str) -> bool:
    try:
        verify_package(package, digest, public_key_of(signing_key))
    except IntegrityError:
        return False
    return True


def read_json(package: ObjectStore, manifest: ModelManifest, name: str) -> dict[str, Any]:
    """One covered JSON file, verified and parsed."""
    return json.loads(read_file(package, manifest, name))
