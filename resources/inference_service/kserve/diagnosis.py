"""Why a revision of the server does not come up: from its pods as they were seen over time. Pure."""

from collections.abc import Mapping, Sequence

from resources.inference_service.kserve.pods import ServingPod
from resources.kubernetes.diagnosis import (
    Cause,
    Diagnosis,
    Obstacle,
    PodHistory,
    WatchLimits,
    exit_cause,
    exit_line,
    find_obstacle,
)

_ADVICE: Mapping[Cause, str] = {
    Cause.OUT_OF_MEMORY: "Raise `memory_limit`, or lower what the server holds at a time.",
    Cause.EXIT_CODE: "The last lines of its log say why.",
    Cause.KILLED: "It was ended from outside, or did not get ready within `startup_seconds`; its log may say why.",
    Cause.NOT_STARTED: "Check the image: its entry point has to be the model server.",
    Cause.EVICTED: "The node ran short of memory or disk. Try again, with requests closer to use.",
    Cause.UNSCHEDULABLE: "Lower `cpu` and `memory`, or add nodes: an update needs room for one more replica.",
    Cause.IMAGE: "Check the image's name and tag, that the node can reach its registry, and `image_pull_secrets`.",
    Cause.CONFIGURATION: "Create the Secret or ConfigMap that it names, in the service's namespace, or correct "
    "`env_secrets` and `env_config_maps`.",
    Cause.NO_PODS: "Check that KServe's controller runs, its log, and the namespace's quota.",
    Cause.SLOW_START: "Look at the pods with kubectl describe, or raise `rollout_timeout_seconds`.",
    Cause.UNKNOWN: "Look at the service and its pods with kubectl describe.",
}


def diagnose_canary(percent: int, fault: str, *, transient: bool = False) -> Diagnosis:
    """Why a model that came up, and got some of the requests, was refused."""
    summary = f"with {percent} % of the requests it was refused: {fault}"
    advice = "See that the server prepares images as training does; deploy another model meanwhile."
    return Diagnosis("canary", summary, advice, transient)


def find_crash(
    history: PodHistory, pods: Sequence[ServingPod], limits: WatchLimits, *, max_restarts: int
) -> tuple[Diagnosis, str] | None:
    """Why the server will not stay up, and in which pod: an end that no restart cures, or too many of the others."""
    failures = history.failures()
    if not failures:
        return None
    ends = [end for end in failures if end.out_of_memory or end.exit_code in limits.final_exit_codes]
    restarts = max((container.restarts for pod in pods for container in pod.pod.containers), default=0)
    if not ends and restarts < max_restarts:
        return None
    end = ends[0] if ends else failures[-1]
    cause = exit_cause(end)
    summary = exit_line(end) if ends else f"{exit_line(end)}, after {restarts} restarts"
    found = Diagnosis(cause, summary, _ADVICE[cause], limits.is_worth_retrying(cause, end.exit_code))
    return found, end.pod


def find_serving_obstacle(pods: Sequence[ServingPod]) -> Obstacle | None:
    """The first reason for which not every pod of the revision has started; None when all have."""
    if not pods:
        return Obstacle(Cause.NO_PODS, "service", "KServe has made no pod for this version")
    return find_obstacle([pod.pod for pod in pods])


def diagnose_obstacle(cause: Cause, summary: str, details: Sequence[str], limits: WatchLimits) -> Diagnosis:
    """Why a revision is given up before its server ran, or though nothing definite is wrong with its pods."""
    return Diagnosis(cause, summary, _ADVICE[cause], limits.is_worth_retrying(cause), details=tuple(details))
