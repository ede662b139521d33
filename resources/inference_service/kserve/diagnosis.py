"""Why a revision of the server does not come up: from its pods as they were seen over time, and their logs. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from resources.inference_service.kserve.pods import ServingPod
from resources.kubernetes.diagnosis import TRANSIENT_CAUSES, Cause, Obstacle, PodHistory, find_obstacle
from resources.kubernetes.pods import ContainerExit

ADVICE: Mapping[Cause, str] = {
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


@dataclass(frozen=True)
class Diagnosis:
    """The first thing that went wrong, what else was seen, and what to do."""

    cause: str
    """A Cause, or a word of one's own with an advice of its own."""
    summary: str
    transient: bool
    """Whether the cause may go away by itself."""
    details: tuple[str, ...] = ()
    where: str = ""
    log_tail: tuple[str, ...] = ()
    advice: str = ""
    """In place of the cause's own."""

    def report(self) -> str:
        """All of it, as the text of an error."""
        lines = [f"({self.cause}) {self.summary}", f"What to do: {self.advice or ADVICE[Cause(self.cause)]}"]
        lines += [f"- {detail}" for detail in self.details]
        if self.log_tail:
            lines.append(f"Last lines of {self.where}:")
            lines += [f"    {line}" for line in self.log_tail]
        return "\n".join(lines)

    def with_log(self, where: str, tail: Sequence[str]) -> "Diagnosis":
        return replace(self, where=where, log_tail=tuple(tail))


def find_crash(
    history: PodHistory, pods: Sequence[ServingPod], *, final_exit_codes: Sequence[int], max_restarts: int
) -> Diagnosis | None:
    """Why the server will not stay up: an end that a restart cannot mend, or too many of the others."""
    failures = history.failures()
    if not failures:
        return None
    last = failures[-1]
    restarts = max((container.restarts for pod in pods for container in pod.pod.containers), default=0)
    oom = next((end for end in failures if end.out_of_memory), None)
    final = next((end for end in failures if end.exit_code in final_exit_codes), None)
    if oom:
        return Diagnosis(Cause.OUT_OF_MEMORY, _exit_line(oom), transient=False, where=oom.pod)
    if final:
        return Diagnosis(Cause.EXIT_CODE, _exit_line(final), transient=False, where=final.pod)
    if restarts >= max_restarts:
        cause = Cause.KILLED if last.exit_code in (137, 143) else Cause.EXIT_CODE
        # The server gives another code to what a restart cannot mend; what is left may lie outside of it.
        return Diagnosis(cause, f"{_exit_line(last)}, after {restarts} restarts", transient=True, where=last.pod)
    return None


def find_serving_obstacle(pods: Sequence[ServingPod]) -> Obstacle | None:
    """The first reason for which not every pod of the revision has started; None when all have."""
    if not pods:
        return Obstacle(Cause.NO_PODS, "service", "KServe has made no pod for this version")
    return find_obstacle([pod.pod for pod in pods])


def diagnose_obstacle(
    obstacle: Obstacle, waited_seconds: float, complaints: Sequence[str], warnings: Sequence[str]
) -> Diagnosis:
    """Why a revision is given up before its server ran. `complaints`: of the service's conditions."""
    return Diagnosis(
        obstacle.cause,
        f"{obstacle} (for {waited_seconds:.0f} s)",
        transient=obstacle.cause in TRANSIENT_CAUSES,
        details=_details(complaints, warnings),
    )


def diagnose_timeout(
    seen: str, waited_seconds: float, pods: Sequence[ServingPod], complaints: Sequence[str], warnings: Sequence[str]
) -> Diagnosis:
    """Why a revision is given up though nothing definite is wrong with its pods."""
    unready = [pod.pod.name for pod in pods if not pod.ready]
    return Diagnosis(
        Cause.SLOW_START,
        f"not serving after {waited_seconds:.0f} s; last seen: {seen}",
        transient=True,
        details=_details(complaints, warnings),
        where=unready[0] if unready else "",
    )


def _details(complaints: Sequence[str], warnings: Sequence[str]) -> tuple[str, ...]:
    return (*complaints, *(f"event {warning}" for warning in warnings[-5:]))


def _exit_line(end: ContainerExit) -> str:
    words = f" ({end.reason})" if end.reason and end.reason != "Error" else ""
    return f"{end.replica}/{end.container} ended with exit code {end.exit_code}{words}"
