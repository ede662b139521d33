"""Names that hold at every layer: DNS-1035, and short enough for the pods, services and labels derived from them."""

import hashlib
import json
import re

from resources.pytorch_job.errors import JobConfigError

MAX_LABEL_LENGTH = 63
"""Longest DNS label and longest label value; the operator uses a job's name, and names derived from it, as both."""

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DIGEST_LENGTH = 10
_HINT_LENGTH = 8
_LONGEST_SUFFIX = "-worker-9999"


def derive_name(prefix: str, *identity: str, reserve: int = 0) -> str:
    """A DNS-1035 name of at most `63 - reserve` characters: readable prefix, hint of the first part, digest of all.

    Equal arguments give equal names. Prefixes that read alike after shortening still differ in the digest.
    """
    digest = hashlib.sha256(json.dumps([prefix, *identity]).encode()).hexdigest()[:_DIGEST_LENGTH]
    hint = _clean(identity[0])[:_HINT_LENGTH].rstrip("-") if identity else ""
    tail = f"-{hint}-{digest}" if hint else f"-{digest}"
    head = _clean(prefix) or "job"
    if not head[0].isalpha():
        head = f"job-{head}"
    return head[: MAX_LABEL_LENGTH - reserve - len(tail)].rstrip("-") + tail


def job_name(prefix: str, *, run_id: str, step_key: str, attempt: int) -> str:
    """Name of the PyTorchJob of one attempt at one step of one Dagster run."""
    return derive_name(prefix, run_id, step_key, str(attempt), reserve=len(_LONGEST_SUFFIX))


def check_job_name(name: str, replicas: int) -> None:
    """JobConfigError unless the name and everything derived from it is a DNS-1035 label."""
    if not _DNS_1035.fullmatch(name):
        raise JobConfigError(
            f"PyTorchJob name {name!r} is not a DNS-1035 label: use lower case letters, digits and '-', "
            "start with a letter and end with a letter or digit."
        )
    longest = f"{name}-worker-{max(replicas - 1, 0)}"
    if len(longest) > MAX_LABEL_LENGTH:
        raise JobConfigError(
            f"PyTorchJob name {name!r} is too long: its pod {longest!r} would have {len(longest)} characters, and "
            f"Kubernetes takes {MAX_LABEL_LENGTH}. Shorten it by {len(longest) - MAX_LABEL_LENGTH}."
        )


def _clean(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
