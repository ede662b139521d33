"""Labels and annotations of the jobs this package creates, and those the training operator puts on their pods."""

MANAGED_BY = "dagster-pytorch-job"
# As dagster-k8s has them.
JOB_LABEL = "dagster/job"
OP_LABEL = "dagster/op"

LAUNCH_ANNOTATION = "dagster/pytorch-job-launch"
"""Random id of one create call's intent: the stored object shows whose call made it, and where its messages are."""
WORK_ANNOTATION = "dagster/pytorch-job-work"
"""Digest of what the job computes: only a job with the same one may be adopted."""

OPERATOR_JOB_NAME_LABEL = "training.kubeflow.org/job-name"
OPERATOR_REPLICA_TYPE_LABEL = "training.kubeflow.org/replica-type"
OPERATOR_REPLICA_INDEX_LABEL = "training.kubeflow.org/replica-index"
