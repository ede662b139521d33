"""No convolution or matrix product of a training step runs on a reference kernel of oneDNN, which is far slower."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cifar_assets.training.checkpoint import CheckpointStore
from cifar_assets.training.data import EpochAugmentation, epoch_batches, open_data
from cifar_assets.training.device import choose_processor, use_threads
from cifar_assets.training.distributed import Processes, StopSignal
from cifar_assets.training.loop import Trainer
from cifar_assets.training.recipes import RECIPES, get_recipe
from resources.object_store import FolderStore
from tests.unit.training.jobs import Workplace

PRODUCTS = ("convolution", "deconvolution", "matmul", "inner_product")


def take_steps(folder: str) -> None:
    """One step of each recipe at each of its resolutions."""
    place = Workplace.make(Path(folder))
    checkpoints = CheckpointStore(FolderStore(Path(folder, "checkpoints")), 1)
    for name, recipe in RECIPES.items():
        for phase in recipe.resolutions:
            print(f"recipe {name} at {phase.size or 'all'} pixels", flush=True)
            size = [{"start": 0, "size": phase.size}]
            changed = get_recipe(name, {"resolutions": size, "batch_size": 32})
            spec = place.spec().model_copy(update={"recipe": changed})
            use_threads(spec.execution)
            processor = choose_processor(spec.execution, changed.precision)
            data = open_data(spec, processor.device)
            trainer = Trainer(spec, data, processor, Processes(), checkpoints, StopSignal())
            augmentation = EpochAugmentation(changed, 0, 0, len(data.train), data.manifest.image_size)
            batch = epoch_batches(0, 0, len(data.train), changed.batch_size)[0]
            trainer.step(trainer.state.network.train(), batch, augmentation)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_no_convolution_or_matrix_product_of_a_step_runs_on_a_reference_kernel(tmp_path: Path) -> None:
    code = f"from tests.unit.training.test_kernels import take_steps; take_steps({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ONEDNN_VERBOSE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    used, slow, step = set(), [], ""
    for line in done.stdout.splitlines():
        fields = line.split(",")
        if line.startswith("recipe"):
            step = line
        elif "exec" in fields:  # onednn_verbose,v1,primitive,exec,cpu,convolution,jit:avx512_core,...
            primitive, kernel = fields[fields.index("exec") + 2 :][:2]
            used.add(primitive)
            if primitive in PRODUCTS and kernel.startswith("ref"):
                slow.append(f"{step}: {line}")
    assert "convolution" in used, done.stdout[-2000:]
    assert slow == []
