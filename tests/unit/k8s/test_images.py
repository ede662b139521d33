"""The Dockerfile, checked without a build."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
ROLES = ("trainer", "server", "dagster", "mlflow", "kfp")
LOCK: dict[str, Any] = {p["name"]: p for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}


def lines(role: str) -> list[str]:
    """The instructions of the role's target, after those of its base."""
    targets: dict[str, list[str]] = {}
    for line in (ROOT / "images/Dockerfile").read_text().replace("\\\n", " ").splitlines():
        if start := re.fullmatch(r"FROM (\S+) AS (\w+)", line):
            targets[start[2]] = list(targets.get(start[1], []))
        elif line and not line.startswith("#") and targets:
            list(targets.values())[-1].append(line)
    return targets[role]


def extras(role: str) -> list[str]:
    return re.findall(r"--extra (\w+)", "\n".join(lines(role)))


def locked(role: str) -> set[str]:
    """Names of all packages that the lock file installs for the role's extras."""
    project = LOCK["cifar-assets"]
    todo = [d["name"] for d in project["dependencies"]]
    todo += [d["name"] for extra in extras(role) for d in project["optional-dependencies"].get(extra, [])]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [d["name"] for d in LOCK[name].get("dependencies", [])]
    return found


@pytest.mark.parametrize("role", ROLES)
def test_runs_as_a_numeric_user_and_takes_versions_from_the_lock_file(role: str) -> None:
    assert "USER 1000:1000" in lines(role)
    (install,) = [line for line in lines(role) if line.startswith("RUN")]
    assert "$SYNC" in install
    assert any('SYNC="uv sync --frozen --no-dev --no-install-project"' in line for line in lines(role))
    assert extras(role)


@pytest.mark.parametrize("role", ROLES)
def test_extras_exist(role: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras(role)) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("role", ["trainer", "server", "dagster", "kfp"])
def test_our_code_is_the_last_layer(role: str) -> None:
    kinds = [line.split()[0] for line in lines(role)]
    last_run = max(i for i, kind in enumerate(kinds) if kind == "RUN")
    code = [i for i, line in enumerate(lines(role)) if line.startswith(("COPY cifar_assets", "COPY resources"))]
    assert code
    assert min(code) > last_run
    assert set(kinds[min(code) :]) == {"COPY"}


def test_only_the_trainer_has_torch() -> None:
    assert "torch" in locked("trainer")
    for role in ("server", "dagster", "mlflow"):
        assert "torch" not in locked(role)
    assert "onnxruntime" in locked("server")
    assert "dagster" not in locked("server") | locked("trainer")


def test_context_holds_only_what_is_copied() -> None:
    ignore = (ROOT / "images/Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore
    copies = [line for role in ROLES for line in lines(role) if line.startswith("COPY")]
    copied = {name.rstrip("/") for line in copies for name in line.split()[1:-1]}
    assert copied == {line[1:] for line in ignore if line.startswith("!")}
