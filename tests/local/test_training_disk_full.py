"""The disk fills up while a checkpoint or the model is written."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_assets.training.checkpoint import CheckpointStore
from tests.unit.training.jobs import Workplace, run_forked

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs takes root")
RECIPE = {"width": 16, "momentum": 0.0}
"""Without momentum a checkpoint is about as large as the weights, and smaller than a model with its ONNX file."""
EXECUTION = {"threads": 1, "device": "cpu", "checkpoint_every_steps": 2, "keep_checkpoints": 1}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    """A workplace whose bucket `full` lies on a small disk."""
    place = Workplace.make(tmp_path)
    folder = tmp_path / "full"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mount.stderr}")
    yield place
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("checkpoints_that_fit", "written"), [(1.5, "checkpoints"), (2.1, "model")])
def test_full_disk_leaves_no_partial_files_and_the_same_weights(
    place: Workplace, checkpoints_that_fit: float, written: str
) -> None:
    undisturbed = place.spec("undisturbed", "baseline", recipe_fields=RECIPE, execution=EXECUTION)
    assert run_forked(undisturbed)[0] == 0
    digest, _ = place.only_model("undisturbed")
    size = len(place.models("undisturbed").read(f"{digest}/model.safetensors"))

    disk = place.folder / "full"
    filler = disk / "filler"
    free = os.statvfs(disk)
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - int(checkpoints_that_fit * size)))
    spec = undisturbed.model_copy(update={"output_uri": place.models("full").uri()})
    code, output = run_forked(spec)
    assert code == 1, output
    assert "No space left on device" in output
    assert "Check free space" in output
    assert "unexpected reason" not in output
    assert ("Test accuracy" in output) == (written == "model")

    assert place.published("full") == {}
    assert list(disk.rglob(".writing-*")) == []
    (checkpoint,) = place.checkpoints("full")
    assert CheckpointStore(place.models("full").at(f"checkpoints/{spec.identity}"), 1).load_newest()

    filler.unlink()
    code, output = run_forked(spec)
    assert code == 0, output
    assert f"Continuing from the checkpoint of step {int(checkpoint.name.split('-')[1])}" in output
    assert place.only_model("full")[0] == digest
    assert place.checkpoints("full") == []
