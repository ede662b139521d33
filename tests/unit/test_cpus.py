"""The CPUs of a process in a container."""

import os
from pathlib import Path

import pytest

from cifar_assets.cpus import available_cpus

CPUS = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("max 100000", CPUS),
        ("50000 100000", 1.0),
        ("100000 100000", 1.0),
        ("6400000 100000", CPUS),
        ("", CPUS),
        ("?", CPUS),
    ],
)
def test_a_containers_cpu_limit_counts(tmp_path: Path, content: str, expected: float) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert available_cpus(tmp_path) == expected


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert available_cpus(tmp_path) == CPUS
