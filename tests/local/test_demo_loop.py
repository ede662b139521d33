"""`make demo` and then `make demo-loop`, as a user runs them, with a few drawn images."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.ports import free_port
from tests.fixtures.tiny_data import write_drawn_images
from tests.fixtures.workspace import ROOT, Workspace

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Workspace]:
    for name in ("dagster.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    write_drawn_images(source, train=1500, test=600)
    environment = {
        "PYTHONPATH": str(ROOT),
        "CIFAR10_SOURCE": str(source),
        "ACCURACY_THRESHOLD": "0",
        "INFERENCE_SERVICE_PORT": str(free_port()),
    }
    made = Workspace(tmp_path, environment)
    yield made
    made.python("-m", "resources.inference_service.local", "stop")


def test_darkened_pictures_are_noticed_labeled_and_trained_on(checkout: Workspace) -> None:
    demo = checkout.python("-m", "cifar_assets.demo")
    assert demo.returncode == 0, demo.stdout
    assert "Asked the service about 20 test pictures" in demo.stdout
    loop = checkout.python("-m", "cifar_assets.demo_loop")
    assert loop.returncode == 0, loop.stdout
    assert "The check drift says: Pictures are darker" in loop.stdout
    assert "Labeled 20 pictures: raw-data/landing/labeled/" in loop.stdout
    told = re.search(r"Version (\d+) answered \d+ of the 300 darkened pictures right. Version (\d+),", loop.stdout)
    assert told, loop.stdout
    assert int(told[2]) > int(told[1])


def test_without_a_demo_it_says_what_to_run_first(checkout: Workspace) -> None:
    loop = checkout.python("-m", "cifar_assets.demo_loop")
    assert loop.returncode == 1
    assert loop.stdout.endswith("run `make demo` first.\n")
