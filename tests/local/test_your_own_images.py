"""The commands of docs/your_own_images.md, in a folder with photographs of three classes."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fixtures.ports import free_port
from tests.fixtures.workspace import ROOT

pytestmark = pytest.mark.timeout(1800)
PAGE = (ROOT / "docs" / "your_own_images.md").read_text()
DEMO, DECLARATION, SECOND = re.findall(r"^```(?:sh|yaml)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
NUM_PICTURES = 20


def photograph(random: np.random.RandomState, label: int, number: int) -> Image.Image:
    """A noisy picture of 90x70 or 70x90 pixels with a bright area in a place and color of the class."""
    height, width = (90, 70) if number % 2 else (70, 90)
    pixels = random.randint(20, 90, (height, width, 3)).astype(np.uint8)
    top, left = random.randint(15, 25, 2)
    pixels[top : top + 30, left : left + 30, label] = random.randint(190, 250)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    for name in ("dagster.yaml", "pyproject.toml", "cifar_assets", "resources"):
        (made / name).symlink_to(ROOT / name)
    random = np.random.RandomState(0)
    for label, name in enumerate(("cat", "dog", "horse")):
        (made / "photos" / name).mkdir(parents=True)
        for number in range(1, NUM_PICTURES + 1):
            photograph(random, label, number).save(made / "photos" / name / f"{number}.jpg", quality=95)
    return made


@pytest.fixture(scope="module")
def environment(folder: Path) -> Iterator[dict[str, str]]:
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "INFERENCE_SERVICE_PORT": str(port)}
    yield made
    subprocess.run([sys.executable, "-m", "resources.inference_service.local", "stop"], cwd=folder, env=made)


def test_demo_names_its_assumptions_and_ends_with_answers(folder: Path, environment: dict[str, str]) -> None:
    assert "make demo SOURCE=photos" in DEMO
    shown = subprocess.check_output(["make", "-n", "demo", "SOURCE=photos"], cwd=ROOT, text=True)
    assert "python -m cifar_assets.demo" in shown
    done = subprocess.run(
        [sys.executable, "-m", "cifar_assets.demo"],
        cwd=folder,
        env={**environment, "CIFAR10_SOURCE": "photos"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cat, dog, horse" in done.stdout
    assert "Asked the service about" in done.stdout


def test_second_data_set_is_served_beside_it(folder: Path, environment: dict[str, str]) -> None:
    (folder / "data_sets.yaml").write_text(DECLARATION)
    commands = SECOND.replace("8081", str(int(environment["INFERENCE_SERVICE_PORT"]) + 1))
    done = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"class"' in done.stdout
    assert (folder / ".cifar" / "store" / "models" / "animals").is_dir()
