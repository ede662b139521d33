"""What a training ran on: versions and hardware."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from cifar_assets.cpus import available_cpus
from cifar_assets.training.device import Processor
from cifar_assets.training.distributed import Processes

_PACKAGES = ("torch", "numpy", "safetensors", "onnx", "onnxruntime", "mlflow-skinny", "dagster-pipes", "cifar-assets")


def describe_environment(processor: Processor, processes: Processes) -> dict[str, Any]:
    """Versions of what matters to the result, and the hardware."""
    device = processor.device
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cpus": available_cpus(),
        "threads": torch.get_num_threads(),
        "memory_gigabytes": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "processes": processes.count,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(processor.dtype).removeprefix("torch."),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
