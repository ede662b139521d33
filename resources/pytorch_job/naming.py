"""Names of jobs, which their pods' names are derived from."""

from resources.kubernetes.errors import SettingsError
from resources.kubernetes.naming import MAX_LABEL_LENGTH, check_dns_1035, derive_name

_LONGEST_SUFFIX = "-worker-9999"


def job_name(prefix: str, *, run_id: str, step_key: str, attempt: int) -> str:
    """Name of the PyTorchJob of one attempt at one step of one Dagster run."""
    return derive_name(prefix, run_id, step_key, str(attempt), reserve=len(_LONGEST_SUFFIX))


def check_job_name(name: str, replicas: int) -> None:
    """SettingsError unless the name and everything derived from it is a DNS-1035 label."""
    check_dns_1035("PyTorchJob", name)
    longest = f"{name}-worker-{max(replicas - 1, 0)}"
    if len(longest) > MAX_LABEL_LENGTH:
        raise SettingsError(
            f"PyTorchJob name {name!r} is too long: its pod {longest!r} would have {len(longest)} characters, and "
            f"Kubernetes takes {MAX_LABEL_LENGTH}. Shorten it by {len(longest) - MAX_LABEL_LENGTH}."
        )
