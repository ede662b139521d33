"""Faults of a request, each with the HTTP status and the JSON body that answer it."""

from resources.errors import ExplainedError


class RequestError(ExplainedError):
    """A request cannot be answered. `field` names the part of it: `instances[2]`, `image[0]`, `inputs[0].shape`."""

    status = 400

    def __init__(self, field: str, expected: str, received: str, *, status: int | None = None):
        super().__init__(f"{field}: expected {expected}, got {received}.")
        self.field = field
        self.expected = expected
        self.received = received
        if status is not None:
            self.status = status

    @property
    def headers(self) -> dict[str, str]:
        return {}

    def body(self) -> dict[str, str]:
        """What the client reads."""
        return {"error": str(self), "field": self.field, "expected": self.expected, "received": self.received}


class BusyError(RequestError):
    """The server is full. The client should try again after `retry_after` seconds."""

    status = 429

    def __init__(self, field: str, expected: str, received: str, *, retry_after: int):
        super().__init__(field, expected, received)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


def shorten(value: object) -> str:
    """A value as it may be repeated in an error or a log: printable and short, whatever a client sent."""
    text = ascii(value[:100] if isinstance(value, (str, bytes)) else value)
    size = len(value) if isinstance(value, (str, bytes)) else len(text)
    return text if len(text) <= 60 else f"{text[:60]}... ({size} characters)"
