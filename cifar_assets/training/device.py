"""The processor a training runs on, and what it is good at."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from cifar_assets.cpus import available_cpus
from cifar_assets.training.recipes import Precision
from cifar_assets.training.spec import Execution
from resources.errors import ConfigError


@dataclass(frozen=True)
class Processor:
    """A device and the arithmetic convolutions use on it."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which convolutions and matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def choose_processor(execution: Execution, precision: Precision, local_rank: int = 0) -> Processor:
    """The device and precision asked for. Raises ConfigError when there is no such device."""
    device = choose_device(execution.device, local_rank)
    if precision == "auto":
        dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    else:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return Processor(device, dtype)


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of this process, which shares its GPU with no other. Raises ConfigError where there is none for it."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(
            "The job asks for device cuda, and torch finds no GPU: ask for auto or cpu, or fix the driver."
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        # nccl would refuse two processes of one GPU by an error that looks like a process lost
        raise ConfigError(
            f"Process {local_rank + 1} of this machine has no GPU of its own, there are {num_gpus}: set nproc_per_node "
            "to that number or less, ask for more GPUs, or for device cpu."
        )
    return torch.device("cuda", local_rank)


def use_repeatable_kernels(device: torch.device) -> None:
    """Have the same arithmetic give the same bits each time on this device; a CPU does so by itself."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # read by cuBLAS when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def check_compiler() -> None:
    """Raise ConfigError where torch.compile would find no compiler, minutes into a training."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"The job asks for `compile`, which takes a C++ compiler, and {compiler} is not there: set "
            "execution.compile to false, or install it where the training runs (our image has none)."
        )


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is done in hardware: emulated it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def use_threads(execution: Execution) -> int:
    """Set torch's CPU threads for this process and return their number."""
    torch.set_num_threads(execution.threads or default_threads())
    return torch.get_num_threads()


def default_threads() -> int:
    """This process's share of the CPUs it may use. torchrun's own default of one thread is not taken over."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted and wanted.isdigit() and local_processes == 1:
        return max(1, int(wanted))
    return max(1, int(available_cpus()) // local_processes)
