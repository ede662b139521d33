"""Label and annotation keys of the jobs this package creates, and those the training operator puts on their pods.

The first three follow dagster-k8s, so that one selector finds a Dagster run's pods and its PyTorchJobs.
"""

import hashlib

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "dagster-pytorch-job"

RUN_ID_LABEL = "dagster/run-id"
"""Run that is responsible for the job now. It changes when a retried run adopts the job."""
JOB_LABEL = "dagster/job"
OP_LABEL = "dagster/op"
STEP_LABEL = "dagster/step-digest"
"""Digest of the whole step key: a label value holds 63 characters, a step key any number."""

LAUNCH_ANNOTATION = "dagster/pytorch-job-launch"
"""Random id of one create call's intent: the stored object shows whose call made it, and where its messages are."""
WORK_ANNOTATION = "dagster/pytorch-job-work"
"""Digest of what the job computes: only a job with the same one may be adopted."""

OPERATOR_JOB_NAME_LABEL = "training.kubeflow.org/job-name"
OPERATOR_REPLICA_TYPE_LABEL = "training.kubeflow.org/replica-type"
OPERATOR_REPLICA_INDEX_LABEL = "training.kubeflow.org/replica-index"


def step_digest(step_key: str) -> str:
    """Label value that stands for a step key of any length and spelling."""
    return hashlib.sha256(step_key.encode()).hexdigest()[:32]


def selector(**labels: str) -> str:
    """Label selector of exact matches, from key=value pairs given as a mapping with `**`."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
