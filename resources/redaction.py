"""Removes credentials from addresses. Use it wherever an address is shown."""

import re

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^\s/?#\"<>]*@|(?<![\w.%+~-])[\w.%+~-]+:[^\s/@'\"<>]+@(?!sha256:)")
_END = r"(?=[')\].,;:!]*(?:[\s&#\"<>]|$))"  # the value, without punctuation of the surrounding sentence
_QUERY_VALUE = re.compile(rf"(?<=[?&])([^&=\s#\"<>]+)=[^&\s#\"<>]*?{_END}")


def redacted(text: object) -> str:
    """The text with the user, password and query values of every URL replaced: a signed URL is a credential."""
    return _QUERY_VALUE.sub(rf"\1={HIDDEN}", _USER.sub(f"{HIDDEN}@", str(text)))


def has_credentials(address: str) -> bool:
    """Whether the address contains a user, a password or a query."""
    return redacted(address) != address


class RedactedError(Exception):
    """The error with credentials removed from the addresses in its message."""

    def __init__(self, *parts: object):
        super().__init__(*(redacted(part) if isinstance(part, str) else part for part in parts))
