"""Errors a person is expected to read and act on. Each message says what failed, on which object, and what to do."""

from resources.redaction import RedactedError


class ExplainedError(RedactedError):
    """Base of this project's own errors."""


class ConfigError(ExplainedError):
    """A setting is missing or out of range; trying again without a change fails again."""


class DataError(ExplainedError):
    """Stored or incoming data is not what it claims to be."""


class StoreError(ExplainedError):
    """The object store refused or could not be reached. `transient` says that it was the latter: try again."""

    def __init__(self, message: str, *, transient: bool = False):
        super().__init__(message)
        self.transient = transient


class ObjectNotFoundError(StoreError):
    """The named object does not exist."""


class IntegrityError(DataError):
    """Bytes do not have the digest they are addressed by."""


class ObjectChangedError(StoreError):
    """The named object was replaced since it was looked at. Nothing was done with it."""


class TrainingError(ExplainedError):
    """A training job did not end with a model. `transient` says that the cause lies outside of it: try again."""

    def __init__(self, message: str, *, transient: bool = False):
        super().__init__(message)
        self.transient = transient


class DeployError(ExplainedError):
    """A model was not put into service. What served before, if anything did, still serves; the message says why.

    `transient` says that the cause lies outside of the model and its settings: try again.
    """

    def __init__(self, message: str, *, transient: bool = False):
        super().__init__(message)
        self.transient = transient
