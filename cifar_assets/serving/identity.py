"""Which model is served."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelIdentity:
    """Name in addresses and answers, version for people, digest for decisions."""

    name: str
    version: str
    digest: str
