"""Label keys of the objects that a Dagster step makes in a cluster.

All but the step's follow dagster-k8s, so that one selector finds a run's pods and its custom resources.
"""

import hashlib

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"

RUN_ID_LABEL = "dagster/run-id"
"""Run that is responsible for the object now. It changes when a retried run adopts the object."""
STEP_LABEL = "dagster/step-digest"
"""Digest of the whole step key: a label value holds 63 characters, a step key any number."""


def step_digest(step_key: str) -> str:
    """Label value that stands for a step key of any length and spelling."""
    return hashlib.sha256(step_key.encode()).hexdigest()[:32]


def selector(**labels: str) -> str:
    """Label selector of exact matches, from key=value pairs given as a mapping with `**`."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
