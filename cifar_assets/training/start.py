"""The weights that a fine-tuning starts from, of a stored model or of a file with torchvision's names. No torch."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, deserialize

from cifar_assets.model_package import MANIFEST_FILE, RECIPE_FILE, WEIGHTS_FILE, read_json, read_manifest
from cifar_assets.training.recipes import Recipe
from resources.digests import sha256_bytes
from resources.errors import ConfigError, DataError
from resources.object_store import ObjectStore, locate, open_store

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 1 << 30
"""The file is read into memory. A ResNet-18 of the usual width has 45 MB."""
_STORED_PREFIX = "network."
"""Of the names in a stored model, beside the normalization's."""
_TRIMMED = ((1, 1), (2, 2))
"""Kernels of a stored model for small images, which omits taps of a 3x3 kernel."""

T = TypeVar("T")


class Start(BaseModel):
    """One file of weights. Its digest, not its place, is part of a job's identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store_uri: str = Field(description="URI of the folder or bucket of the file, which the trainer must reach.")
    key: str = Field(description="Key of the file there.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the file.")
    model_digest: str | None = Field(default=None, description="Digest of the stored model that it belongs to.")

    @property
    def uri(self) -> str:
        return open_store(self.store_uri).uri(self.key)

    def read(self, width: int) -> bytes:
        """The verified file. Raises DataError if it does not fit a ResNet-18 of this width."""
        data = open_store(self.store_uri).read_verified(self.key, self.sha256)
        if problem := _why_unfit(data, width):
            raise DataError(f"{self.uri} {problem}")
        return data


def find_start(start_from: str, stores: Sequence[ObjectStore], recipe: Recipe) -> Start:
    """The weights at a path or an s3:// address, or of the model with this digest in one of the stores.

    The trainer writes to the first store. Raises ConfigError if there are none that the recipe can start from.
    """
    if recipe.network != "resnet18":
        raise ConfigError(
            f"start_from: recipe {recipe.name!r} trains a {recipe.network}, which can only start from random weights: "
            "use the recipe finetune, or remove start_from."
        )
    start = _of_model(start_from, stores) if _DIGEST.fullmatch(start_from) else _of_file(start_from, stores[0])
    try:
        start.read(recipe.width)
    except DataError as error:
        raise ConfigError(f"start_from: {error}") from error
    return start


def body_of(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a file that a network takes over, by torchvision's name: not the head's, nor counters."""
    stored = {
        name.removeprefix(_STORED_PREFIX): value for name, value in tensors.items() if name.startswith(_STORED_PREFIX)
    }
    return {
        name: value
        for name, value in (stored or tensors).items()
        if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
    }


def body_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of torchvision's ResNet-18 of this width that `body_of` gives."""
    convolutions: dict[str, tuple[int, ...]] = {"conv1": (width, 3, 7, 7)}
    norms, inputs = {"bn1": width}, width
    for stage in range(4):
        outputs = width << stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            convolutions |= {f"{name}.conv1": (outputs, inputs, 3, 3), f"{name}.conv2": (outputs, outputs, 3, 3)}
            norms |= {f"{name}.bn1": outputs, f"{name}.bn2": outputs}
            if inputs != outputs:
                convolutions[f"{name}.downsample.0"] = (outputs, inputs, 1, 1)
                norms[f"{name}.downsample.1"] = outputs
            inputs = outputs
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {
        **{f"{name}.weight": shape for name, shape in convolutions.items()},
        **{f"{name}.{kind}": (channels,) for name, channels in norms.items() for kind in kinds},
    }


def _of_model(digest: str, stores: Sequence[ObjectStore]) -> Start:
    package = next((store.at(digest) for store in stores if store.exists(f"{digest}/{MANIFEST_FILE}")), None)
    if package is None:
        places = ", ".join(dict.fromkeys(store.uri() for store in stores))
        raise ConfigError(
            f"start_from: there is no model {digest} in {places}. Take the digest from the metadata of a "
            "trained_model, or name a safetensors file."
        )
    manifest = read_manifest(package, digest)
    network = str(read_json(package, manifest, RECIPE_FILE).get("network"))
    if not network.startswith("resnet18"):
        raise ConfigError(
            f"start_from: model {digest} is a {network}, expected a resnet18: choose a model of the recipe resnet18, "
            "baseline or finetune."
        )
    return Start(store_uri=package.uri(), key=WEIGHTS_FILE, sha256=manifest.files[WEIGHTS_FILE], model_digest=digest)


def _of_file(address: str, output: ObjectStore) -> Start:
    store, key = locate(address)
    if store.uri().startswith("file:") and not output.uri().startswith("file:"):
        raise ConfigError(
            f"start_from: {address!r} is a path, which the training's pods cannot read. Expected the digest of a model "
            "(64 hexadecimal digits), or s3://BUCKET/KEY: upload the file to the bucket models, for example."
        )
    info = store.stat(key) if key else None
    if info is None:
        raise ConfigError(
            f"start_from: {address!r} is not a file. Expected the digest of a model (64 hexadecimal digits), or the "
            "path or s3://BUCKET/KEY of a safetensors file."
        )
    if info.size > _MOST_BYTES:
        raise ConfigError(f"start_from: {address!r} has {info.size:,} bytes; at most {_MOST_BYTES:,} are read.")
    return Start(store_uri=store.uri(), key=key, sha256=sha256_bytes(store.read(key)))


def _why_unfit(data: bytes, width: int) -> str | None:
    """What is wrong with a file of weights for a ResNet-18 of this width, if anything."""
    try:
        found = body_of(dict(deserialize(data)))
    except SafetensorError as error:
        return f"is not a safetensors file: {error}. Convert it with safetensors.torch.save_file."
    expected = body_shapes(width)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in sorted(found.keys() - expected.keys())]
    for name, shape in expected.items():
        if name not in found:
            continue
        own, dtype = tuple(found[name]["shape"]), found[name]["dtype"]
        fits = own == shape or (shape[2:] == (3, 3) and own[:2] == shape[:2] and own[2:] in _TRIMMED)
        if not fits or dtype not in ("F16", "BF16", "F32", "F64"):
            problems.append(f"{name} is {dtype} {list(own)}, expected floats {list(shape)}")
    if not problems:
        return None
    return (
        f"is not of a ResNet-18 of width {width}: {'; '.join(problems[:3])} ({len(problems)} in all). Expected "
        "torchvision's names and shapes; for another width, override the recipe's `width`."
    )
