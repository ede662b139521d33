"""Imports: resources none of the project, images nothing they lack, CIFAR-10 constants only the dataset package."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_assets.contracts import CLASSES

ROOT = Path(__file__).parents[2]
DATA_SIDE = ("dataset", "contracts.py")
POWERS = (ast.Pow, ast.LShift, ast.RShift)
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "resources").rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", MODULES)
def test_resources_import_nothing_of_the_project(path: str) -> None:
    assert [name for name in imported((ROOT / path).read_text()) if name.partition(".")[0] == "cifar_assets"] == []


def test_only_the_data_side_names_cifar10s_classes_and_size() -> None:
    """Trainer, server, checks and reports read them from the manifest of the dataset or of the model."""
    package = ROOT / "cifar_assets"
    sources = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in DATA_SIDE]
    named = re.compile(r"\b(CLASSES|IMAGE_SIZE|CIFAR10)\b")
    assert [path.name for path in sources if named.search(path.read_text())] == []


OTHER_TENS = {
    "contracts.py": (1, "CIFAR-10's declaration"),
    "dataset/formats/archive.py": (1, "the official archive"),
    "dataset/formats/images.py": (2, "limits of files"),
    "dataset/formats/isolated.py": (1, "seconds"),
    "dataset/formats/survey.py": (1, "class names in a message"),
    "dataset/index.py": (5, "bytes of a sha256"),
    "dataset/landing/join.py": (2, "class names in a message; bytes of a sha256"),
    "dataset/landing/rejection.py": (1, "characters of a digest"),
    "dataset/sheet.py": (3, "pictures in a row; the size of captions without pictures"),
    "dataset/sources/synthetic.py": (1, "the images it draws"),
    "dataset/versions/reader.py": (1, "bytes of a sha256"),
    "dataset/versions/verdicts.py": (1, "names in a message"),
    "predictions/run.py": (2, "pixels of a batch, for memory"),
    "seed_study/job.py": (1, "seeds"),
    "serving/feedback.py": (1, "labels of a request"),
    "serving/metrics.py": (1, "images of a batch"),
    "serving/settings.py": (3, "seconds; bytes"),
    "training/data.py": (2, "pixels of a batch, for memory"),
    "training/loop.py": (2, "pixels of a sample, for memory"),
    "training/recipes.py": (4, "the size that recipes are written for; epochs and batch sizes"),
}
"""Files of the package with the numbers 10 or 32: how often, and what for."""


def test_no_file_takes_images_to_have_ten_classes_or_32_pixels() -> None:
    """Any other 10 or 32 is either one of these, and is counted above, or should come from the manifest."""
    package = ROOT / "cifar_assets"
    found = {path.relative_to(package).as_posix(): tens_in(path.read_text()) for path in package.rglob("*.py")}
    assert {name: number for name, number in found.items() if number} == {
        name: number for name, (number, _) in OTHER_TENS.items()
    }


def test_the_class_names_of_cifar10_are_written_once() -> None:
    for path in (ROOT / "cifar_assets").rglob("*.py"):
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not constants & set(CLASSES) or path.name == "contracts.py", path


def tens_in(source: str) -> int:
    """How often the numbers 10 and 32 are written, except as exponents and in shifts."""
    nodes = list(ast.walk(ast.parse(source)))
    powers = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, POWERS)]
    exempt = {id(part) for node in powers for part in (node.left, node.right)}
    return sum(
        isinstance(node, ast.Constant) and type(node.value) is int and node.value in (10, 32) and id(node) not in exempt
        for node in nodes
    )


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (("cifar_assets.training.__main__", "cifar_assets.pipeline_steps.__main__"), ("dagster", "kubernetes")),
        (("cifar_assets.serving", "cifar_assets.serving.__main__"), ("dagster", "kubernetes", "torch", "mlflow")),
        (("resources.object_store.s3", "resources.errors", "resources.mlflow.target"), ("dagster", "mlflow")),
    ],
    ids=["trainer", "server", "object store"],
)
def test_images_do_without_dagster(modules: tuple[str, ...], absent: tuple[str, ...]) -> None:
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
