"""Whether a revision gets the requests meant for it, from the service's status and its pods. Pure.

KServe copies the generation that a Deployment or a Knative service observed into its own status, so its conditions
cannot be matched with a generation of the InferenceService. The mark on the pods can: KServe copies it there from what
it acted upon.
"""

from collections.abc import Sequence

from resources.inference_service.kserve.client import InferenceService
from resources.inference_service.kserve.pods import ServingPod


def find_missing(service: InferenceService, pods: Sequence[ServingPod], *, asleep: bool = False) -> str | None:
    """What is missing until the service's revision gets its requests, and no other does; None when nothing is.

    `asleep`: a serverless revision counts though it has no pod now.
    """
    found = _knative(service, pods, asleep) if service.serverless else _standard(service, pods)
    if found is None and not service.ready:
        return "; ".join(service.complaints) or "KServe does not call it ready yet"
    return found


def _standard(service: InferenceService, pods: Sequence[ServingPod]) -> str | None:
    ready = [pod for pod in pods if pod.mark == service.mark and pod.ready]
    others = [pod for pod in pods if pod.mark != service.mark and not pod.pod.finished]
    wanted = max(1, int(service.predictor.get("minReplicas") or 1))
    if len(ready) < wanted:
        return f"{len(ready)} of {wanted} new pods are ready"
    # Those that are ending still answer on open connections.
    return f"{len(others)} pods of another version are still there" if others else None


def _knative(service: InferenceService, pods: Sequence[ServingPod], asleep: bool) -> str | None:
    names = {pod.knative_revision for pod in pods if pod.mark == service.mark} - {None}
    created = service.predictor_status.get("latestCreatedRevision")
    latest = service.predictor_status.get("latestReadyRevision")
    if not names and not asleep:
        return "the new revision has no pod yet"
    if latest is None or latest != created or (names and latest not in names):
        return f"revision {created} is not ready; {latest or 'none'} is the latest that is"
    share = sum(
        target.get("percent") or 0
        for target in service.predictor_status.get("traffic") or ()
        if target.get("revisionName") == latest and target.get("latestRevision")
    )
    wanted = 100 if service.canary_percent is None else service.canary_percent
    return None if share == wanted else f"revision {latest} gets {share} % of the requests, not yet {wanted} %"
