"""Errors that users read and act on. Each message says what failed, on which object, and what to do."""

from resources.redaction import RedactedError


class ExplainedError(RedactedError):
    """Base of this project's own errors. `transient`: the cause is external and may go away, so a retry may help."""

    def __init__(self, *parts: object, transient: bool = False):
        super().__init__(*parts)
        self.transient = transient


class ConfigError(ExplainedError):
    """A setting is missing or out of range."""


class DataError(ExplainedError):
    """Stored or incoming data is invalid."""


class IntegrityError(DataError):
    """Bytes do not match the digest that addresses them."""


class StoreError(ExplainedError):
    """The object store refused a request, or could not be reached, which is transient."""


class BucketNotFoundError(StoreError):
    """The named bucket does not exist."""


class ObjectNotFoundError(StoreError):
    """The named object does not exist."""


class ObjectChangedError(StoreError):
    """The named object was replaced since it was checked. It was left unchanged."""


class TrainingError(ExplainedError):
    """A training job did not end with a model."""


class DeployError(ExplainedError):
    """A model was not deployed, for the reason in the message. The previous model, if any, is still served."""
