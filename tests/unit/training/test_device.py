import pytest
import torch

from cifar_assets.errors import ConfigError
from cifar_assets.training.device import check_compiler, choose_device, choose_processor, default_threads
from cifar_assets.training.distributed import read_processes
from cifar_assets.training.spec import Execution


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
