"""How much of the machine this process may use."""

import os
from pathlib import Path

_QUOTA_AND_PERIOD = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
"""Files of cgroups version 2 and version 1."""


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs of the affinity mask, or the container's limit where that is lower; at least 1.

    Libraries count the machine's CPUs: in a pod limited to 2 of 64 they would run 64 threads that wait for each other.
    """
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for names in _QUOTA_AND_PERIOD:
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            return cpus if quota in ("max", "-1") else min(cpus, max(1.0, int(quota) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return cpus
