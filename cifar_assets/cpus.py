"""The number of CPUs that this process may use."""

import os
from pathlib import Path


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs in the affinity mask, or the container's limit (cgroup v2) if that is lower; at least 1.

    Libraries count the machine's CPUs: in a pod limited to 2 of 64 CPUs they would run 64 threads that contend for 2.
    """
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return cpus if quota == "max" else min(cpus, max(1.0, int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return cpus
