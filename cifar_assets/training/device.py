"""The device a training runs on, its precision and threads, and the recorded environment."""

import importlib.metadata
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cifar_assets.cpus import available_cpus
from cifar_assets.training.recipes import Precision
from cifar_assets.training.spec import Execution
from resources.errors import ConfigError

_PACKAGES = ("torch", "numpy", "safetensors", "onnx", "onnxruntime", "mlflow-skinny", "dagster-pipes", "cifar-assets")


@dataclass(frozen=True)
class Processor:
    """A device and the precision of its convolutions."""

    device: torch.device
    dtype: torch.dtype

    @property
    def precision(self) -> str:
        """Name of the precision, such as `float32`."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which convolutions and matrix products run in `dtype`."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def choose_processor(execution: Execution, precision: Precision, local_rank: int = 0) -> Processor:
    """The requested device and precision. Raises ConfigError if there is no such device."""
    device = choose_device(execution.device, local_rank)
    is_bfloat16 = precision == "bfloat16" or (precision == "auto" and _has_fast_bfloat16(device))
    return Processor(device, torch.bfloat16 if is_bfloat16 else torch.float32)


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of this process, which does not share its GPU. Raises ConfigError if there is none for it."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= num_gpus:
        # NCCL rejects two processes on one GPU with an error that looks like a lost process
        raise ConfigError(
            f"Process {local_rank + 1} of this machine has no GPU for itself: torch finds {num_gpus or 'no'} GPU(s). "
            "Set nproc_per_node to at most that number, request more GPUs, set device to cpu, or fix the driver."
        )
    return torch.device("cuda", local_rank)


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware supports bfloat16: emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))


def use_repeatable_kernels(device: torch.device) -> None:
    """Make GPU arithmetic deterministic; CPU arithmetic already is."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # cuBLAS reads it on first use
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def use_threads(execution: Execution) -> None:
    """Set torch's CPU threads for this process."""
    torch.set_num_threads(execution.threads or default_threads())


def default_threads() -> int:
    """Number of threads: this process's fraction of the available CPUs, where torchrun's default is one thread."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and local_processes == 1:
        return max(1, int(wanted))
    return max(1, int(available_cpus()) // local_processes)


def describe_environment(processor: Processor, world_size: int) -> dict[str, Any]:
    """Versions of the libraries that affect the result, and the hardware."""
    device = processor.device
    installed = {found.name: found.version for found in importlib.metadata.distributions()}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in _PACKAGES if name in installed},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host": platform.node(),
        "cpu": models[0] if models else platform.processor(),
        "cpus": available_cpus(),
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": processor.precision,
    }
