"""docs/your_own_images.md as a reader follows it: its commands, on pictures of three classes.

They run in a copy of this checkout, in which trainings on few images take fewer steps.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fixtures.ports import free_port
from tests.fixtures.workspace import ROOT

PAGE = (ROOT / "docs" / "your_own_images.md").read_text()
UV = """#!/bin/sh
# uv with the environment of the tests: `sync` has nothing to do, `run` runs the command.
[ "$1" = run ] || exit 0
shift
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (shutil.which("make") and shutil.which("curl")), reason="needs make and curl"),
]


def first_of_two_ports() -> int:
    """A port whose following one is free too, for the next data set."""
    first = free_port()
    while (second := free_port()) != first + 1:
        first = second
    return first


def code_of(language: str) -> list[str]:
    """The page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


class Checkout:
    """A copy of this checkout, and a shell in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(
            ROOT, folder, ignore=shutil.ignore_patterns(".*", "docs", "k8s", "tests", "__pycache__"), dirs_exist_ok=True
        )
        recipes = folder / "cifar_assets/training/recipes.py"
        source, num_changed = re.subn("(_LEAST_STEPS = 5000), 200$", r"\1, 40", recipes.read_text(), flags=re.MULTILINE)
        assert num_changed == 1
        recipes.write_text(source)
        (folder / "bin").mkdir()
        (folder / "bin/uv").write_text(UV)
        (folder / "bin/uv").chmod(0o755)
        self.port = first_of_two_ports()
        unset = {"CIFAR10_SOURCE", "DATA_SETS", "DAGSTER_HOME", "ACCURACY_THRESHOLD", "MAKEFLAGS"}
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in unset},
            "PATH": os.pathsep.join((str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])),
            "PYTHONPATH": str(folder),
            "INFERENCE_SERVICE_PORT": str(self.port),
        }

    def shell(self, commands: str) -> str:
        """Run commands as printed, except for the port of the service. Returns their output."""
        commands = commands.replace(":8081/", f":{self.port + 1}/")
        done = subprocess.run(
            ["bash", "-euc", commands],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    found = Checkout(tmp_path_factory.mktemp("checkout"))
    write_photographs(found.folder / "photos")
    yield found
    found.shell("make stop || true")


def write_photographs(folder: Path) -> None:
    """Pictures of 60 to 300 pixels: stripes of a cat, the disc of a dog, the bar of a horse, in any light."""
    random = np.random.RandomState(0)
    for name, color in {"cat": (200, 130, 60), "dog": (120, 90, 180), "horse": (90, 170, 90)}.items():
        (folder / name).mkdir(parents=True)
        for number in range(1, 26):
            width, height = random.randint(60, 301, 2)
            x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
            shape = {"cat": np.sin(9 * x) > 0, "dog": x**2 + y**2 < 0.4, "horse": abs(y) < 0.3}[name]
            light = random.uniform(0.6, 1.2) * (1 + 0.3 * random.uniform(-1, 1) * x)
            pixels = np.where(shape[..., None], color, 128) * light[..., None] + random.normal(
                0, 12, (height, width, 3)
            )
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.jpg")


def test_a_folder_of_photographs_becomes_a_served_model(checkout: Checkout) -> None:
    demo, _ = code_of("sh")
    output = checkout.shell(demo)
    assert "3 classes, from the folder names: cat, dog, horse" in output
    assert re.search(r"needed: more than \d\d\.\d\d%", output)


def test_a_declared_data_set_gets_a_served_model_of_its_own(checkout: Checkout) -> None:
    (declaration,) = code_of("yaml")
    _, commands = code_of("sh")
    (checkout.folder / "data_sets.yaml").write_text(declaration)
    answer = json.loads(checkout.shell(commands).splitlines()[-1])
    (prediction,) = answer["predictions"]
    assert set(prediction["probabilities"]) <= {"cat", "dog", "horse"}
    assert prediction["class"] == "cat"
