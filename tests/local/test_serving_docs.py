"""The commands and numbers of docs/serving.md."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_assets.contracts import CLASSES
from cifar_assets.serving.settings import ServingLimits, parse_settings
from resources.object_store import FolderStore
from tests.unit.serving.server_process import run_server
from tests.unit.serving.tiny_model import store_tiny_model

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", DOCUMENT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]


def run(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_curl_line_answers(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    Image.fromarray(pixels).save(tmp_path / "other.jpg")
    lines = [command for command in COMMANDS if command.startswith("curl")]
    assert len(lines) >= 6
    uri, digest = store_tiny_model(FolderStore(tmp_path / "models"))
    with run_server(uri, digest, tmp_path) as server:
        for line in lines:
            assert ":8080" in line
            result = run(line.replace(":8080", f":{server.port}"), tmp_path)
            assert result.returncode == 0, (line, result.stderr)
            if ":predict" in line:
                answer = json.loads(result.stdout)
                assert len(answer["predictions"]) == line.count("@") or "instances" in line
                assert answer["model_digest"] == digest
            assert result.stdout


def test_the_commands_of_the_local_deployment_exist(tmp_path) -> None:
    lines = [command for command in COMMANDS if command.startswith("python")]
    assert len(lines) == 2
    for line in lines:
        result = run(f"{sys.executable}{line.removeprefix('python')}", tmp_path)
        assert result.returncode == 3, result.stderr
        assert "Nothing is running in .cifar/serving" in result.stdout


def test_the_numbers_are_those_of_the_code() -> None:
    limits = ServingLimits()
    settings = parse_settings(["--model-uri", "x", "--model-digest", "y"], {})
    for text in (
        f"| {limits.max_header_bytes // 2**10} KiB and {limits.max_headers} of them, within "
        f"{limits.header_timeout:g} s |",
        f"| {limits.max_body_bytes // 2**20} MiB, within {limits.body_timeout:g} s and without a pause of "
        f"{limits.stall_timeout:g} s |",
        f"| {limits.image.max_bytes // 2**20} MiB |",
        f"| {limits.image.max_pixels:,}; JPEG {2 * limits.image.max_pixels:,} |",
        f"| pixels of all pictures in a request | {limits.max_pixels:,} |",
        f"| pictures in a request | {limits.max_images} |",
        f"(`--max-pending-requests`) | {limits.max_pending_requests} |",
        f"beyond the first {limits.small_body_bytes // 2**10} KiB of each | {limits.max_pending_bytes // 2**20} MiB |",
        f"over {limits.small_body_bytes // 2**10} KiB, or more than {limits.small_pixels:,} pixels to decode | "
        f"{limits.max_large_requests} |",
        f"| pixels waiting to be decoded | {limits.max_pending_pixels:,} |",
        f"(`--queue-images`) | {limits.queue_images}, a quarter",
        f"(`--max-connections`) | {limits.max_connections} |",
        f"| {limits.idle_timeout:g} s | closed |",
        f"| time without reading an answer | {limits.stall_timeout:g} s |",
        f"`--linger` seconds ({settings.linger:g})",
        f"`--grace` seconds ({settings.grace:g})",
        f"{settings.host}:{settings.port}",
        ", ".join(CLASSES),
    ):
        assert text in DOCUMENT.replace("\n", " "), text
