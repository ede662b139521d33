"""Names and labels of the workflows that Dagster submits."""

from resources.kubernetes.naming import derive_name

MANAGED_BY = "dagster-argo"
_LONGEST_SUFFIX = "-train-replicas-4294967295"
"""Argo shortens a pod's name when it has to; a name that leaves room is easier to find."""


def workflow_name(prefix: str, *, run_id: str, step_key: str) -> str:
    """Name of the workflow of one step of one Dagster run, at whatever attempt."""
    return derive_name(prefix, run_id, step_key, reserve=len(_LONGEST_SUFFIX))
