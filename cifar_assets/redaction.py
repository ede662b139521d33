"""Addresses without the credentials in them: whatever shows an address shows it through here."""

import re

_USER = re.compile(r"(?<=://)[^\s/?#'\"<>]*@|(?<![\w.%+~-])[\w.%+~-]+:[^\s/@'\"<>]+@(?!sha256:)")
_QUERY_VALUE = re.compile(r"(?<=[?&])([\w.~%\[\]-]+)=[^&\s#'\"<>)]*")
HIDDEN = "***"


def redacted(text: object) -> str:
    """The text with every URL's user, password and query values replaced: a signed URL is a credential."""
    return _QUERY_VALUE.sub(rf"\1={HIDDEN}", _USER.sub(f"{HIDDEN}@", str(text)))


def has_credentials(address: str) -> bool:
    """Whether the address holds a user, a password or a query."""
    return redacted(address) != address
