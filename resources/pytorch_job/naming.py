"""Names of jobs, which their pods' names are derived from."""

import re

from resources.kubernetes.errors import SettingsError
from resources.kubernetes.naming import MAX_LABEL_LENGTH, derive_name

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST_SUFFIX = "-worker-9999"


def job_name(prefix: str, *, run_id: str, step_key: str, attempt: int) -> str:
    """Name of the PyTorchJob of one attempt at one step of one Dagster run."""
    return derive_name(prefix, run_id, step_key, str(attempt), reserve=len(_LONGEST_SUFFIX))


def check_job_name(name: str, replicas: int) -> None:
    """SettingsError unless the name and everything derived from it is a DNS-1035 label."""
    if not _DNS_1035.fullmatch(name):
        raise SettingsError(
            f"PyTorchJob name {name!r} is not a DNS-1035 label: use lower case letters, digits and '-', "
            "start with a letter and end with a letter or digit."
        )
    longest = f"{name}-worker-{max(replicas - 1, 0)}"
    if len(longest) > MAX_LABEL_LENGTH:
        raise SettingsError(
            f"PyTorchJob name {name!r} is too long: its pod {longest!r} would have {len(longest)} characters, and "
            f"Kubernetes takes {MAX_LABEL_LENGTH}. Shorten it by {len(longest) - MAX_LABEL_LENGTH}."
        )
