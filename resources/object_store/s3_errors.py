"""What an S3 fault means to the person who has to act on it."""

import errno
import re
import ssl

from minio.error import InvalidResponseError, S3Error, ServerError
from urllib3.exceptions import HTTPError, LocationParseError, NewConnectionError, SSLError

from resources.errors import ObjectChangedError, StoreError

_TRANSIENT_CODES = frozenset(
    {
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "XMinioServerNotInitialized",
    }
)
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EIO)
_ADVICE = {
    "AccessDenied": "The credentials are known but not allowed to do this: check the policy of AWS_ACCESS_KEY_ID.",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known to this server: check it, and the endpoint.",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: check it for a typing "
    "error or a line break at its end.",
    **dict.fromkeys(
        ("ExpiredToken", "InvalidToken", "InvalidTokenId"),
        "AWS_SESSION_TOKEN is missing, expired, or belongs to other keys: renew all three.",
    ),
    "RequestTimeTooSkewed": "The clocks of this machine and of the server differ by over 15 minutes: set them right.",
    "NoSuchBucket": "The bucket does not exist: make it, or correct the name in the s3:// address.",
    "InvalidBucketName": "The bucket's name is not allowed: 3 to 63 lower-case letters, digits, dots and hyphens.",
    "PreconditionFailed": "The object was replaced while it was being read: read it again.",
    "XMinioStorageFull": "The server's disk is full: free some space.",
    "BadRequest": "The server may speak TLS: use https:// in AWS_ENDPOINT_URL then.",
    "AuthorizationHeaderMalformed": "The server expects another region: set AWS_REGION to the one in the message.",
}


def is_transient(error: Exception) -> bool:
    """Whether the same call may well succeed in a moment."""
    if isinstance(error, S3Error):
        return error.code in _TRANSIENT_CODES
    if isinstance(error, ServerError):
        return error.status_code in (429, 500, 502, 503, 504)
    if isinstance(error, InvalidResponseError):
        # A proxy in front of the server answers in HTML; the status is in the message alone.
        return re.search(r"Response code: (429|5\d\d)\b", str(error)) is not None
    if isinstance(error, SSLError | ssl.SSLError | LocationParseError) or _is_of_this_disk(error):
        return False
    return isinstance(error, HTTPError | OSError)


def _is_of_this_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_FAULTS


def explain(error: Exception, uri: str, endpoint: str, attempts: int) -> StoreError:
    """The error with the object, the server and the next step."""
    # What was replaced meanwhile can be read again, but from its beginning.
    replaced = isinstance(error, S3Error) and error.code == "PreconditionFailed"
    message = f"{uri} at {endpoint}: {_explanation(error, attempts)}"
    if replaced:
        return ObjectChangedError(message, transient=True)
    return StoreError(message, transient=is_transient(error))


def _explanation(error: Exception, attempts: int) -> str:
    if isinstance(error, S3Error):
        advice = _ADVICE.get(error.code or "", "See the server's log.")
        return f"{error.code}: {error.message}. {advice}"
    if isinstance(error, SSLError | ssl.SSLError):
        return (
            f"no secure connection ({error}). Set AWS_CA_BUNDLE to the server's certificate authority, or use "
            "http:// in AWS_ENDPOINT_URL where the server speaks no TLS."
        )
    if isinstance(error, InvalidResponseError):
        return (
            f"the answer is not from an S3 server ({error}). AWS_ENDPOINT_URL may name a web console or "
            "a proxy, or use http:// for a server that speaks TLS."
        )
    if _is_of_this_disk(error):
        return f"this machine's disk failed ({error}). Check free space and permissions."
    if isinstance(error, NewConnectionError | HTTPError | OSError):
        return (
            f"not reached in {attempts} attempts ({error}). Check that the server runs and that "
            "AWS_ENDPOINT_URL names its host and port."
        )
    return f"{error}. See the server's log."
