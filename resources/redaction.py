"""Addresses without the credentials in them: whatever shows an address shows it through here."""

import re

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^\s/?#\"<>]*@|(?<![\w.%+~-])[\w.%+~-]+:[^\s/@'\"<>]+@(?!sha256:)")
_END = r"(?=[')\].,;:!]*(?:[\s&#\"<>]|$))"  # of the value, before the punctuation of the sentence around it
_QUERY_VALUE = re.compile(rf"(?<=[?&])([^&=\s#\"<>]+)=[^&\s#\"<>]*?{_END}")


def redacted(text: object) -> str:
    """The text with every URL's user, password and query values replaced: a signed URL is a credential."""
    return _QUERY_VALUE.sub(rf"\1={HIDDEN}", _USER.sub(f"{HIDDEN}@", str(text)))


def has_credentials(address: str) -> bool:
    """Whether the address holds a user, a password or a query."""
    return redacted(address) != address


class RedactedError(Exception):
    """An error that shows no credentials of the addresses in its message."""

    def __init__(self, *parts: object):
        super().__init__(*(redacted(part) if isinstance(part, str) else part for part in parts))
