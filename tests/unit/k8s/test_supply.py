"""External inputs are listed and pinned: images, GitHub actions, the installer, Python packages."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
LIST: dict[str, Any] = yaml.safe_load((ROOT / "k8s/images.yaml").read_text())
DIGESTS = {entry["image"]: entry["digest"] for entry in LIST["external"]}
LISTED = {*DIGESTS, *(entry["image"] for entry in LIST["built"]), *LIST["absent"]}
REPOSITORIES = {image.rpartition(":")[0] for image in LISTED}
LOCK = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
TAGGED = re.compile(r"(?<![\w./:-])((?:[\w.-]+/)*[a-z][\w.-]*):(\w(?:[\w.-]*\w)?)")
"""repository:tag in prose, commands and YAML."""
REGISTRY = re.compile(r"(?:docker\.io|quay\.io|ghcr\.io|gcr\.io|localhost|dev\.local|registry\.k8s\.io)(?:/[\w.-]+)+")


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split()]


def image_fields(node: Any, key: str = "") -> list[str]:
    """Values of every field that names an image."""
    if isinstance(node, dict):
        if key == "image" and {"repository", "tag"} <= set(node):
            return [f"{node['repository']}:{node['tag']}"]
        named = f"{node['newName']}:{node['newTag']}" if "newName" in node else None
        return [*([named] if named else []), *(i for k, v in node.items() for i in image_fields(v, k))]
    if isinstance(node, list):
        return [image for item in node for image in image_fields(item, key)]
    if isinstance(node, str):
        if key == "image":
            return [node]
        if "\n" in node or node.startswith("- "):  # a field that contains a patch or a manifest
            return [m["image"] for m in re.finditer(r"\bimage: *['\"]?(?P<image>[^\s'\"}]+)", node)]
    return []


NOT_MANIFESTS = ("images.yaml", "objects.yaml")
"""This list, and the template of the Helm chart."""
MANIFESTS = [p for p in tracked("k8s/*.yaml", "tests/cluster/*.yaml") if p.name not in NOT_MANIFESTS]
TEXTS = tracked("README.md", "docs/*.md", "k8s", "images", "tests/cluster/*.py", "resources/*.py", "cifar_assets/*.py")


OBJECTS = {path: [d for d in yaml.safe_load_all(path.read_text()) if d] for path in MANIFESTS}
REPLACED = {image["name"] for objects in OBJECTS.values() for o in objects for image in o.get("images", [])}
"""Short names that an overlay replaces, such as `cifar-dagster`."""


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_manifest_names_only_listed_images(path: Path) -> None:
    for image in image_fields(OBJECTS[path]):
        parameter = image.startswith("{{")  # filled in by Argo
        assert parameter or image in LISTED | REPLACED, f"{image} is not in k8s/images.yaml"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_names_only_listed_images(path: Path) -> None:
    text = path.read_text()
    for repository in REGISTRY.findall(text):
        assert repository in REPOSITORIES, f"{repository} is not in k8s/images.yaml"
    for repository, tag in TAGGED.findall(text):
        if repository in REPOSITORIES:
            assert f"{repository}:{tag}" in LISTED, f"{repository}:{tag} is not in k8s/images.yaml"


@pytest.mark.parametrize("path", tracked("*Dockerfile"), ids=lambda path: str(path.relative_to(ROOT)))
def test_dockerfile_starts_from_a_listed_image(path: Path) -> None:
    text = path.read_text()
    default = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    targets = set(re.findall(r"^FROM \S+ AS (\w+)", text, re.MULTILINE))
    assert {default.get(base.removeprefix("$"), base) for base in bases} - targets <= LISTED
    built = [entry for entry in LIST["built"] if entry["dockerfile"] == str(path.relative_to(ROOT))]
    assert built
    assert all(entry.get("target") in targets or not targets for entry in built)


def test_every_listed_image_is_used_and_every_digest_is_real_or_unknown() -> None:
    text = "\n".join(
        path.read_text() for path in [*TEXTS, *tracked("*Dockerfile", "*.mk")] if path.name != "images.yaml"
    )
    for image in LISTED:
        repository, _, tag = image.rpartition(":")
        assert repository.rpartition("/")[2] in text, image
        assert tag not in ("", "latest")
    for digest in DIGESTS.values():
        assert digest == "unknown" or re.fullmatch(r"sha256:[0-9a-f]{64}", digest)


def test_pinned_component_has_every_known_digest() -> None:
    component = yaml.safe_load((ROOT / "k8s/pinned/kustomization.yaml").read_text())
    pinned = {entry["name"]: entry["digest"] for entry in component["images"]}
    assert pinned == {image.rpartition(":")[0]: digest for image, digest in DIGESTS.items() if digest != "unknown"}


def test_actions_are_pinned_by_commit() -> None:
    for path in tracked(".github/workflows"):
        uses = re.findall(r"uses: *(.+)", path.read_text())
        assert uses
        for action in uses:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


def test_uv_has_one_version_everywhere() -> None:
    texts = [path.read_text() for path in tracked("Makefile", "*.mk", "*Dockerfile", ".github", ".ci")]
    (version,) = re.findall(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {found for text in texts for found in re.findall(r"\buv==([\w.]+)", text)} == {version}


def test_pip_installs_only_exact_versions() -> None:
    installs = [
        (path.name, line)
        for path in tracked("Makefile", "*.mk", "*Dockerfile", ".github", ".ci", "README.md", "docs/*.md")
        for line in re.findall(r"pip install ([^&\\\n]*)", path.read_text())
    ]
    assert installs
    for name, line in installs:
        for package in (word for word in line.split() if not word.startswith("-")):
            project, _, version = package.strip("\"'").partition("==")
            assert version, f"{name}: {package} has no exact version"
            assert project == "uv" or LOCK[project] == version, f"{name}: {package} is not the version of uv.lock"
