"""Errors a person is expected to read and act on. Each message says what failed, on which object, and what to do."""

from resources.redaction import RedactedError


class ExplainedError(RedactedError):
    """Base of this project's own errors. `transient`: the cause lies outside and may pass, so that a retry may help."""

    def __init__(self, *parts: object, transient: bool = False):
        super().__init__(*parts)
        self.transient = transient


class ConfigError(ExplainedError):
    """A setting is missing or out of range."""


class DataError(ExplainedError):
    """Stored or incoming data is not what it claims to be."""


class IntegrityError(DataError):
    """Bytes do not have the digest they are addressed by."""


class StoreError(ExplainedError):
    """The object store refused, or could not be reached, which is transient."""


class ObjectNotFoundError(StoreError):
    """The named object does not exist."""


class ObjectChangedError(StoreError):
    """The named object was replaced since it was looked at. Nothing was done with it."""


class TrainingError(ExplainedError):
    """A training job did not end with a model."""


class DeployError(ExplainedError):
    """A model was not put into service. What served before, if anything did, still serves; the message says why."""
