"""Imports: resources none of the project, images nothing they lack, CIFAR-10 constants only the dataset package."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA_SIDE = ("dataset", "contracts.py")
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
    named = re.compile(r"\b(CLASSES|IMAGE_SIZE|IMAGE_SHAPE|CIFAR10)\b")
    assert [path.name for path in sources if named.search(path.read_text())] == []


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
