"""The commands of docs/kubernetes.md train a model on the platform, deploy it and query it.

The commands before them, which set up the platform, and those that remove it are what the fixture `platform` runs.
"""

import re
from pathlib import Path

import pytest
from PIL import Image

from cifar_assets.contracts import CLASSES
from tests.cluster import page
from tests.cluster.kinds import is_installed
from tests.cluster.kubectl import PATIENCE, is_listening, kubectl
from tests.cluster.platform import Platform

PORTS = (9000, 5000, 8080)


@pytest.mark.thorough
def test_commands_lead_from_the_platform_to_an_answer(platform: Platform, tmp_path: Path) -> None:
    """In a copy of the checkout, with synthetic images in place of the download."""
    if not is_installed("serving.kserve.io"):
        pytest.skip("the cluster has no KServe")
    if taken := [port for port in PORTS if is_listening(port)]:
        pytest.skip(f"the commands forward the ports {PORTS}, of which {taken} are in use")
    for path in page.ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "picture.png")
    try:
        page.run(page.DAGSTER, tmp_path, {"CIFAR10_SOURCE": "synthetic"})
        output = page.run(page.QUERY, tmp_path)
    finally:
        kubectl("-n", platform.namespace, "delete", "inferenceservices,pytorchjobs", "--all", PATIENCE)
    answer = re.search(r'"class": ?"(\w+)"', output)
    assert answer, output
    assert answer[1] in CLASSES
