import os
from pathlib import Path

import pytest
import torch

from cifar_assets.errors import ConfigError
from cifar_assets.training.device import check_compiler, choose_device, choose_processor, cpu_limit, default_threads
from cifar_assets.training.distributed import read_processes
from cifar_assets.training.spec import Execution

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
def test_a_containers_cpu_limit_counts(tmp_path: Path, content: str, expected: float):
    (tmp_path / "cpu.max").write_text(content)
    assert cpu_limit(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1\n", CPUS), ("150000\n", min(CPUS, 1.5))])
def test_the_limit_is_found_in_version_1_too(tmp_path: Path, quota: str, expected: float):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_limit(tmp_path) == expected


def test_without_cgroups_the_affinity_counts(tmp_path: Path):
    assert cpu_limit(tmp_path) == CPUS


def test_processes_of_one_machine_share_its_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert default_threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert default_threads() == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_an_error_that_says_so():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no GPU"):
        choose_device("cuda")


def test_a_missing_compiler_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no-such-compiler is not there: set execution\.compile to false"):
        check_compiler()


def test_precision_is_what_was_asked_for():
    cpu = Execution(device="cpu")
    assert choose_processor(cpu, "float32").dtype == torch.float32
    processor = choose_processor(cpu, "bfloat16")
    with processor.autocast():
        assert torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "1"), ("x", "1"), ("0", "")])
def test_an_impossible_rank_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str, world: str):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match="RANK"):
        read_processes()
