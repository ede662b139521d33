"""Names and labels of a step's objects in a cluster: DNS-1035, and short enough for names derived from them."""

import hashlib
import json
import re

from resources.kubernetes.errors import SettingsError

MAX_LABEL_LENGTH = 63
"""Longest DNS label and longest label value; operators use an object's name, and names derived from it, as both."""

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DIGEST_LENGTH = 10
_HINT_LENGTH = 8


def derive_name(prefix: str, *identity: str, reserve: int = 0) -> str:
    """A DNS-1035 name of at most `63 - reserve` characters: readable prefix, hint of the first part, digest of all.

    Equal arguments give equal names. Prefixes that are equal after truncation still differ in the digest.
    """
    digest = hashlib.sha256(json.dumps([prefix, *identity]).encode()).hexdigest()[:_DIGEST_LENGTH]
    hint = _clean(identity[0])[:_HINT_LENGTH].rstrip("-") if identity else ""
    tail = f"-{hint}-{digest}" if hint else f"-{digest}"
    head = _clean(prefix) or "job"
    if not head[0].isalpha():
        head = f"job-{head}"
    return head[: MAX_LABEL_LENGTH - reserve - len(tail)].rstrip("-") + tail


def check_name(kind: str, name: str, *derived: str) -> None:
    """SettingsError unless the name of an object of this kind, and the names derived from it, are DNS-1035 labels."""
    if not _DNS_1035.fullmatch(name):
        raise SettingsError(
            f"{kind} name {name!r} is not a DNS-1035 label: use lowercase letters, digits and '-', start with a "
            "letter and end with a letter or digit."
        )
    longest = max(name, *derived, key=len)
    excess = len(longest) - MAX_LABEL_LENGTH
    if excess > 0:
        raise SettingsError(
            f"{kind} name {name!r} is too long: {longest!r}, derived from it, would have {len(longest)} "
            f"characters, and Kubernetes takes {MAX_LABEL_LENGTH}. Shorten it by {excess}."
        )


def candidate_name(name: str) -> str:
    """Name of the canary's InferenceService, for the service with this name."""
    return f"{name}-canary"


def _clean(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"

RUN_ID_LABEL = "dagster/run-id"
"""Run that currently owns the object. It changes when a retry run adopts the object."""
STEP_LABEL = "dagster/step-digest"
"""Digest of the whole step key: a label value is limited to 63 characters, a step key is not."""


def step_digest(step_key: str) -> str:
    """Label value for a step key of any length and spelling."""
    return hashlib.sha256(step_key.encode()).hexdigest()[:32]


def selector(**labels: str) -> str:
    """Label selector for exact matches, from key=value pairs passed as `**mapping`."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
