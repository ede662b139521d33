"""Runs the trainer as a separate process, as a pod does."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load

from cifar_assets.model_package import METRICS_FILE, RECIPE_FILE, WEIGHTS_FILE, ModelManifest, read_json, read_manifest
from cifar_assets.training.networks import PublishedNetwork, build_network
from cifar_assets.training.recipes import Recipe, get_recipe
from cifar_assets.training.spec import JobSpec
from resources.object_store import FolderStore
from tests.fixtures import pausing
from tests.unit.training.small_dataset import store_dataset

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["cifar_assets.training.__main__", "cifar_assets.training.job", "mlflow"])


COMMAND = (sys.executable, "-m", "cifar_assets.training")


@dataclass(frozen=True)
class Workplace:
    """A folder with a small dataset, and jobs on it."""

    folder: Path
    digest: str

    @classmethod
    def make(cls, folder: Path, train: int = 96, shard_rows: int = 64) -> "Workplace":
        return cls(folder, store_dataset(folder / "processed-data", train=train, shard_rows=shard_rows))

    def spec(self, output: str = "models", recipe: str = "resnet18", **changes: Any) -> JobSpec:
        """A job that takes seconds. `recipe_fields` overrides fields of the recipe, the rest fields of the spec."""
        small = {
            "width": 4,
            "epochs": 3,
            "batch_size": 16,
            "precision": "float32",
            "learning_rate": 0.05,
            "validate_every": 1,
        }
        values = {
            "dataset_uri": FolderStore(self.folder / "processed-data").uri(f"{self.digest}/"),
            "dataset_digest": self.digest,
            "recipe": get_recipe(recipe, small | changes.pop("recipe_fields", {})),
            "output_uri": self.models(output).uri(),
            "execution": {"threads": 1, "device": "cpu"},
        }
        return JobSpec.model_validate(values | changes)

    def models(self, output: str = "models") -> FolderStore:
        return FolderStore(self.folder / output)

    def published(self, output: str = "models") -> dict[str, ModelManifest]:
        """Manifests of the models in a bucket, by digest."""
        models = self.models(output)
        keys = [info.key for info in models.list() if info.key.endswith("/manifest.json")]
        digests = [key.partition("/")[0] for key in keys]
        return {digest: read_manifest(models.at(digest), digest) for digest in digests}

    def only_model(self, output: str = "models") -> tuple[str, dict[str, Any]]:
        """Digest and metrics of the one model in a bucket."""
        ((digest, manifest),) = self.published(output).items()
        return digest, read_json(self.models(output).at(digest), manifest, METRICS_FILE)

    def only_network(self, output: str = "models") -> PublishedNetwork:
        """The one model in a bucket as a torch module."""
        ((digest, manifest),) = self.published(output).items()
        package = self.models(output).at(digest)
        recipe = Recipe.model_validate_json(package.read(RECIPE_FILE))
        tensors = load(package.read(WEIGHTS_FILE))
        mean, std = (tuple(tensors[name].flatten().tolist()) for name in ("mean", "std"))
        network = PublishedNetwork(build_network(recipe, manifest), mean, std, recipe.views)
        network.load_state_dict(tensors)
        return network.eval()

    def checkpoints(self, output: str = "models") -> list[Path]:
        """Files of checkpoints, the newest last."""
        return sorted((self.folder / output / "checkpoints").rglob("step-*"), key=lambda path: path.name)


def run_trainer(
    spec: JobSpec, *launcher: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a job in a separate process to its end; `launcher` replaces the default command."""
    return subprocess.run(
        launcher or COMMAND,
        capture_output=True,
        text=True,
        env={**os.environ, "CIFAR_JOB_SPEC": spec.model_dump_json(), **(env or {})},
    )


def start_trainer(spec: JobSpec, *launcher: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a job in a separate process; `launcher` replaces the default command."""
    return subprocess.Popen(
        launcher or COMMAND,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CIFAR_JOB_SPEC": spec.model_dump_json(), **(env or {})},
    )


def fork_trainer(spec: JobSpec, env: Mapping[str, str] | None = None) -> ForkServerProcess:
    """Start a job in a forked process with torch already imported, so that twenty of them take seconds."""
    return _fork(spec, os.devnull, env or {})


def run_forked(spec: JobSpec, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a job with `fork_trainer` to its end. Returns exit code and output."""
    with tempfile.NamedTemporaryFile("r") as output:
        process = _fork(spec, output.name, env or {})
        process.join()
        assert process.exitcode is not None
        return process.exitcode, output.read()


def _fork(spec: JobSpec, output: str, env: Mapping[str, str]) -> ForkServerProcess:
    env = {**env, "CIFAR_JOB_SPEC": spec.model_dump_json()}
    process = _FORKSERVER.Process(target=_trainer_process, args=(output, env))
    process.start()
    return process


def _trainer_process(output: str, env: dict[str, str]) -> None:
    from cifar_assets.training.__main__ import main

    os.environ.update(env)
    if pausing.VARIABLE in env:
        pausing.pause_trainers()
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = main([])
    sys.stdout.flush()
    sys.exit(code)


def wait_for_line(process: subprocess.Popen[str], text: str) -> list[str]:
    """Read a process's output up to a line that contains the text."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"the trainer ended without {text!r}: {''.join(lines)}")


def json_file(store: FolderStore, key: str) -> Any:
    return json.loads(store.read(key))
