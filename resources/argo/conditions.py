"""When Argo's resource step ends: the states of `resources.pytorch_job.client`, in the language that the step speaks.

The step takes label selectors whose keys are paths into the job; `status.conditions` is a list, and a path into it can
only count. Any requirement of the failure condition fails the step, and it is looked at first; all of the success
condition's have to hold. Pure.
"""

from resources.kubernetes.job import JobState

_POSITIONS = 8
"""The operator keeps one condition of each of its six types."""

FAILURE_CONDITION = ",".join(f"status.conditions.{n}.type=={JobState.FAILED}" for n in range(_POSITIONS))
SUCCESS_CONDITION = "status.completionTime"
"""Written by the operator in one update with the final condition; a failed job was caught before."""

RESOURCE_IS_RETRIED = (
    'lastRetry.status == "Error" || '
    "!(lastRetry.message matches 'failure condition|has been deleted|specified deadline|exceeded its deadline')"
)
"""The step's pod was lost or told to stop, or the API server did not answer. `apply` finds the job that is there."""
