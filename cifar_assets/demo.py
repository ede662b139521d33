"""`make demo`: materialize the four assets as a user would, then send test images to the served model."""

import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg

from cifar_assets.assets import keys
from cifar_assets.dataset.formats.images import to_pillow
from cifar_assets.dataset.versions.reader import open_split
from resources.digests import canonical_json
from resources.inference_service.client import InferenceClient
from resources.mlflow.target import DEFAULT_NAME
from resources.object_store.resource import LocalObjectStore
from resources.redaction import HIDDEN, redacted

log = logging.getLogger("demo")
_NUM_PICTURES = 20
_PICTURE_FOLDER = Path(".cifar/demo")
RAW_DATASET, TRAINED_MODEL, INFERENCE_SERVICE = (
    dg.AssetKey([DEFAULT_NAME, asset]) for asset in (keys.RAW_DATASET, keys.TRAINED_MODEL, keys.INFERENCE_SERVICE)
)
FOUR_ASSETS = f'+key:"{INFERENCE_SERVICE.to_user_string()}"'
"""The service and all its upstream assets. "*" would also train the model of the Argo workflow."""


def main() -> int:
    """Run the demo. If the materialization fails, its exit code is returned."""
    prepare()
    started = time.monotonic()
    if code := launch("--assets", FOUR_ASSETS, trains=True):
        return code
    _report(time.monotonic() - started)
    return 0


def prepare() -> None:
    """Log to stdout, which images are used first, and use this folder whatever DAGSTER_HOME the shell has set."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    source = _source()
    log.info("Images: %s%s", source, _SYNTHETIC_NOTE if source.startswith("synthetic") else "")
    os.environ.pop("DAGSTER_HOME", None)


def launch(*arguments: str, trains: bool = False) -> int:
    """Run `dg launch` with these arguments, and with less training for synthetic images. Returns the exit code."""
    command = ["dg", "launch", *arguments]
    if trains and _source().startswith("synthetic"):
        config = {"ops": {TRAINED_MODEL.to_python_identifier(): {"config": _SYNTHETIC_TRAINING}}}
        command += ["--config-json", canonical_json(config).decode()]
    log.info("$ %s", shlex.join(command))
    recording = {"RECORDED_FRACTION": os.environ.get("RECORDED_FRACTION") or "1"}
    environment = {**os.environ, **recording, "CIFAR10_SOURCE": _source(), "DAGSTER_DEPLOYMENT": "local"}
    command[0] = str(Path(sys.executable).with_name("dg"))
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        log.error("The run failed; see the lines above. `make dev` shows it in the Dagster UI.")
    return code


def served() -> dict[str, Any]:
    """Metadata of the service's last materialization."""
    return _metadata(INFERENCE_SERVICE)


def _metadata(key: dg.AssetKey) -> dict[str, Any]:
    with dg.DagsterInstance.from_config(str(Path.cwd())) as instance:
        event = instance.get_latest_materialization_event(key)
    if event is None or event.asset_materialization is None:
        raise SystemExit(f"{key.path[-1]} has no materialization: run `make demo` first.")
    return {name: value.value for name, value in event.asset_materialization.metadata.items()}


def reuse_source() -> None:
    """Let `launch` import the images of the last `make demo` again. SystemExit if its source is not known."""
    made = str(_metadata(RAW_DATASET).get("source", "an unknown source"))
    if redacted(_source()) == made:
        return
    if HIDDEN in made:
        raise SystemExit(f"The credentials of {made} are not recorded: set CIFAR10_SOURCE to the complete address.")
    if made.startswith(("an unknown source", "version ")):  # an earlier version that was made current again
        raise SystemExit(f"The last raw dataset was made from {made}: run `make demo` with its CIFAR10_SOURCE first.")
    os.environ["CIFAR10_SOURCE"] = made


def _source() -> str:
    return os.environ.get("CIFAR10_SOURCE") or "synthetic"


# A small dataset of simple images needs only a few steps with small batches, half of them at half the resolution.
_SYNTHETIC_TRAINING = {
    "recipe": "resnet18",
    "overrides": {
        "optimizer": "sgd",
        "warmup": 0.25,
        "epochs": 4,
        "batch_size": 64,
        "learning_rate": 0.05,
        "resolutions": [{"start": 0.0, "size": 16.0}, {"start": 0.75}],
    },
}
_SYNTHETIC_NOTE = (
    " (ten classes drawn from a seed, so that the demo needs no download; "
    "`make demo CIFAR10_SOURCE=download` uses the real CIFAR-10)"
)


def _report(seconds: float) -> None:
    made = served()
    split = open_split(LocalObjectStore().processed, str(made["dataset_digest"]), "test")
    labels = [split.manifest.classes[label] for label in split.labels[:_NUM_PICTURES]]
    pictures = [_PICTURE_FOLDER / f"test-{index}.png" for index in range(len(labels))]
    _PICTURE_FOLDER.mkdir(parents=True, exist_ok=True)
    for path, image in zip(pictures, split.take(list(range(len(labels)))), strict=True):
        to_pillow(image).save(path)
    client = InferenceClient(str(made["url"]), is_traffic=True)
    answers = client.predict_files(pictures).classes
    right = [index for index, label in enumerate(labels) if answers[index] == label]
    example = right[0] if right else 0
    is_strict = os.environ.get("ACCURACY_THRESHOLD") or split.manifest.has_cifar10_classes
    needed = "" if is_strict else "more than "
    lines = [
        "",
        f"Assumed        {_metadata(RAW_DATASET).get('assumed', 'nothing')}",
        f"Test accuracy  {float(str(made['test_accuracy'])):.2%}; needed: {needed}{float(str(made['threshold'])):.2%}",
        f"Model          version {made['model_version']}, digest {made['model_digest']}",
        f"Took           {seconds:.0f} s to materialize all four assets",
        f"Asked the service about {len(labels)} test pictures: {len(right)} right.",
        "",
        f"Ask it yourself, in a browser at {made['url']} or by a command; the picture shows: {labels[example]}",
        f"  curl -F image=@{pictures[example]} {made['url']}/v1/models/{client.model_name}:predict",
        "See the graph, the runs and the pictures: make dev. End the service: make stop.",
    ]
    log.info("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
