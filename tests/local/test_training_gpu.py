"""The trainer on a real GPU. `pytest --noconftest` runs this with only the trainer's packages and pytest."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_assets.model_package import WEIGHTS_FILE, read_manifest
from cifar_assets.training.start import Start
from resources.trainer.contract import EXIT_BAD_SPEC
from tests.unit.training.jobs import Workplace, json_file, run_trainer, start_trainer, wait_for_line

NUM_GPUS = torch.cuda.device_count()
LAUNCH = (sys.executable, "-m", "cifar_assets.training.launch", "--standalone")
ON_GPU = {"threads": 1, "checkpoint_every_steps": 2}
RECIPE = {"precision": "auto", "epochs": 6}

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not NUM_GPUS, reason="there is no GPU here"),
]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace.make(tmp_path)


def environment(place: Workplace, output: str) -> dict[str, Any]:
    """Of the only model in a bucket."""
    digest, _ = place.only_model(output)
    return json_file(place.models(output), f"{digest}/environment.json")


def finished(place: Workplace, spec: Any, *launcher: str) -> None:
    done = run_trainer(spec, *launcher)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", ["resnet18", "quick"])
def test_a_repeated_and_a_killed_training_publish_the_same_model(recipe: str, place: Workplace) -> None:
    fields = {**RECIPE, "width": None} if recipe == "quick" else RECIPE
    first, second, killed = (
        place.spec(output, recipe, recipe_fields=fields, execution=ON_GPU) for output in ("first", "second", "killed")
    )
    finished(place, first)
    finished(place, second)
    process = start_trainer(killed)
    wait_for_line(process, "Epoch 2/")
    process.kill()
    process.communicate()
    assert place.published("killed") == {}
    assert place.checkpoints("killed")
    finished(place, killed)
    assert place.published("first") == place.published("second") == place.published("killed")
    made_by = environment(place, "first")
    assert made_by["device"] == torch.cuda.get_device_name(0)
    has_bfloat16 = torch.cuda.get_device_capability(0) >= (8, 0)
    assert made_by["precision"] == ("bfloat16" if has_bfloat16 else "float32")


def test_a_model_trained_on_a_cpu_is_fine_tuned_on_a_gpu(place: Workplace) -> None:
    finished(place, place.spec("models"))
    digest, _ = place.only_model()
    package = place.models().at(digest)
    start = Start(
        store_uri=package.uri(),
        key=WEIGHTS_FILE,
        sha256=read_manifest(package, digest).files[WEIGHTS_FILE],
        model_digest=digest,
    )
    fields = {**RECIPE, "freeze": 2}
    finished(place, place.spec("tuned", "finetune", recipe_fields=fields, execution=ON_GPU, start=start))
    before, after = (place.only_network(output).state_dict() for output in ("models", "tuned"))
    assert torch.equal(before["network.conv1.weight"], after["network.conv1.weight"])
    assert not torch.equal(before["network.fc.weight"], after["network.fc.weight"])
    assert environment(place, "tuned")["device"] == torch.cuda.get_device_name(0)


def test_more_processes_than_gpus_are_refused(place: Workplace) -> None:
    done = run_trainer(place.spec(execution=ON_GPU), *LAUNCH, f"--nproc_per_node={NUM_GPUS + 1}")
    assert done.returncode == EXIT_BAD_SPEC, done.stderr
    assert f"has no GPU for itself: torch finds {NUM_GPUS} GPU(s)" in done.stdout + done.stderr


@pytest.mark.skipif(NUM_GPUS < 2, reason="there is only one GPU here")
def test_every_process_has_a_gpu_of_its_own(place: Workplace) -> None:
    finished(place, place.spec("both", recipe_fields=RECIPE, execution=ON_GPU), *LAUNCH, "--nproc_per_node=2")
    assert environment(place, "both")["processes"] == 2
