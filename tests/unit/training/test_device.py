import os

import pytest
import torch

from cifar_assets.training.device import (
    choose_device,
    choose_processor,
    default_threads,
    use_repeatable_kernels,
)
from cifar_assets.training.distributed import read_processes
from cifar_assets.training.spec import Execution
from resources.errors import ConfigError


def test_processes_of_one_machine_share_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert default_threads() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert default_threads() == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_an_error_that_says_so() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no GPU"):
        choose_device("cuda")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    for wanted in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="Process 3 of this machine has no GPU for itself: torch finds 2 GPU"):
            choose_device(wanted, 2)
    assert choose_device("cpu", 2) == torch.device("cpu")


@pytest.mark.parametrize(("device", "repeatable"), [("cuda", True), ("cpu", False)])
def test_gpu_kernels_are_deterministic(device: str, repeatable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for name, value in (("benchmark", True), ("deterministic", False), ("allow_tf32", True)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    try:
        use_repeatable_kernels(torch.device(device))
        assert torch.are_deterministic_algorithms_enabled() == repeatable
        assert torch.backends.cudnn.deterministic == repeatable
        assert torch.backends.cudnn.benchmark != repeatable
        assert torch.backends.cudnn.allow_tf32 != repeatable
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == repeatable
    finally:
        torch.use_deterministic_algorithms(False)


def test_precision_is_what_was_asked_for() -> None:
    cpu = Execution(device="cpu")
    assert choose_processor(cpu, "float32").dtype == torch.float32
    processor = choose_processor(cpu, "bfloat16")
    with processor.autocast():
        assert torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "1"), ("x", "1"), ("0", "")])
def test_an_impossible_rank_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str, world: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match="RANK"):
        read_processes()
